"""What torch makes of a host: threads, memory, fallbacks. Import it before torch, which reads these settings when it comes.

What the environment says already is left as it is. And what a caller says to a process: `ranks`, `signals_to`.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from core.errors import UserError

# On a CPU that others use too, threads that spin for each other long hold up each other.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Tensors of hundreds of megabytes come and go with every step. As glibc comes, each is mapped anew, page by page of 4 KiB, and
# the kernel clears every one: half of a training step's time. Here they take pages of 2 MiB, and keep what was freed.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# What Apple's GPUs cannot do yet (comrope's matrix exponential) the CPU does for them.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep freed memory for the next tensor; nothing where there is no glibc."""
    with suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


if not any(name.startswith("MALLOC_") for name in os.environ):
    keep_freed_memory()


TO_LEAVE = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, whoever ends processes, and a terminal that closes


@contextmanager
def signals_to(receive: Callable[[int], object], *names: str) -> Iterator[None]:
    """While entered, each of the signals of these `names` calls `receive` with its number.

    Those that this process was started to ignore, as nohup starts it, stay ignored, and those that the system lacks are none.
    """
    found = [signal.Signals[name] for name in names if hasattr(signal, name)]
    heard = [number for number in found if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _frame: receive(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ranks(NamedTuple):
    """This process among all of a start, and among those on its machine."""

    rank: int
    local_rank: int
    world_size: int


def ranks() -> Ranks:
    """What torchrun tells this process in environment variables; without any of them it is alone.

    Raises UserError where only some are there, or where they cannot be: a rank that nobody waits for would write nothing.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not any(name in os.environ for name in names):
        return Ranks(0, 0, 1)
    told = {name: os.environ.get(name, "") for name in (*names, "MASTER_ADDR", "MASTER_PORT")}
    there, missing = ([name for name, value in told.items() if bool(value) is given] for given in (True, False))
    way_out = "start it with torchrun, or `unset RANK LOCAL_RANK WORLD_SIZE` for a process alone"
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"{', '.join(missing)} {are} missing in the environment, which has {', '.join(there)}; {way_out}", alone=True
        )
    rank, local_rank, world_size = (int(told[name]) if told[name].isdecimal() else -1 for name in names)
    if not 0 <= local_rank <= rank < world_size:
        said = ", ".join(f"{name} = {told[name]!r}" for name in names)
        raise UserError(f"{said}: in the environment, and cannot be; {way_out}", alone=True)
    return Ranks(rank, local_rank, world_size)
