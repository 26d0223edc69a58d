"""The ranks of one start meet, and get a key-value store that no earlier start has written into.

torchrun keeps its store when it starts ranks again, and gloo then takes the addresses of dead processes for those of live
ones. The count of restarts cannot tell starts apart, as it differs between nodes. So rank 0 names each start, and a rank
believes the name only when rank 0 has answered this very process.
"""

import json
import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, rendezvous

from core.errors import UserError

POLL_S = 0.02
START, PREFIX = "carope/start", "carope/"


def meet(timeout: float) -> tuple[Store, int, int, str]:
    """Wait for all ranks, `timeout` seconds at most; returns their store, this rank, their number, the name of the start.

    Reads torchrun's environment variables. Raises UserError naming the ranks that have not come.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    deadline = time.monotonic() + timeout
    start = _invite(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)
    return PrefixStore(start, store), rank, world_size, start


def _invite(store: Store, world_size: int, deadline: float) -> str:
    """Rank 0: name this start, wait until every other rank has left its mark under the name, answer all of them."""
    start, marks = PREFIX + secrets.token_hex(8), {0: ""}
    store.set(START, start)
    while len(marks) < world_size:
        for rank in range(1, world_size):
            if rank not in marks and store.check([key := f"{start}/mark/{rank}"]):
                marks[rank] = store.get(key).decode()
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(world_size) if rank not in marks)
            raise UserError(f"rank {missing} of {world_size} did not start in time (--dist_timeout)", alone=True)
        time.sleep(POLL_S)
    store.set(f"{start}/answer", json.dumps(marks))
    return start


def _join(store: Store, rank: int, deadline: float) -> str:
    """Another rank: leave a mark under the latest name until rank 0 answers with it."""
    mark = secrets.token_hex(8)
    while time.monotonic() < deadline:
        if store.check([START]):
            start = store.get(START).decode()
            store.set(f"{start}/mark/{rank}", mark)
            if store.check([f"{start}/answer"]) and json.loads(store.get(f"{start}/answer")).get(str(rank)) == mark:
                return start
        time.sleep(POLL_S)
    raise UserError(f"rank 0 did not answer rank {rank} in time (--dist_timeout)", alone=True)
