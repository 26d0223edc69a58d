"""Which rank is behind: every rank tells the others where it is, and none waits forever for one that is gone.

Each rank writes its place (a counter and words) into the process group's key-value store twice a second, from a
thread of its own, so that a rank that is busy or waiting still shows that it lives. Works alike for gloo and NCCL.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

from core.errors import EXIT_LOST_RANK, EXIT_REQUEUE

BEAT_S = 0.5
PARENT = "CAROPE_PARENT"  # in the environment: the process that starts this one and should not be outlived


def follow_parent() -> None:
    """Be told by SIGTERM when torchrun, core.launch or table1.py, having started this process, ends, even by SIGKILL.

    Else a run would go on alone and hold its folder. Raises SystemExit where it has ended already. Linux only.
    """
    PR_SET_PDEATHSIG = 1
    parent = os.environ.get(PARENT)
    if parent is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent is not None and parent != str(os.getppid()):
            print("error: the process that started this one is gone", file=sys.stderr)
            raise SystemExit(EXIT_REQUEUE)


class Report(NamedTuple):
    """What a rank last said: how many beats it has sent, how many places it has passed, and where it is."""

    beats: int
    passed: int
    place: str


class Watchdog:
    """Ends this process, in words, when it has not moved for `timeout` seconds: `at` says that it moves. `start`: see meet.

    All ranks pass the same places in the same order, so the one that has passed fewest is the one the others wait for.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, start: str) -> None:
        self.rank, self.world_size, self.timeout, self._start = rank, world_size, timeout, start
        self._beats, self._passed, self._place, self._since = 0, 0, "starting", time.monotonic()
        self._store = self._connect()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """This rank has come to `place`, e.g. "step 12, micro-step 3, computing"."""
        self._place, self._since = place, time.monotonic()
        self._passed += 1

    def close(self) -> None:
        """Stop watching. A thread left inside the store when Python ends would end the process by SIGABRT."""
        self._stop.set()
        self._thread.join(timeout=5)

    def lost(self) -> str | None:
        """In words, the ranks that have fallen silent; None where all of them still send. Takes two seconds."""
        before = self._reports()
        for _ in range(4):
            self._stop.wait(BEAT_S)
            self._beat()
        silent = {r: now for r, now in self._reports().items() if r != self.rank and now.beats == before[r].beats}
        return _words(silent, "is gone", "are gone") if silent else None

    def _connect(self) -> Any:
        """A connection of its own: a blocked call on the process group's would hold up the beats."""
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))

    def _key(self, rank: int) -> str:
        return f"{self._start}/watchdog/{rank}"

    def _watch(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()
            if time.monotonic() - self._since > self.timeout:
                self._give_up()

    def _beat(self) -> None:
        self._beats += 1
        with suppress(RuntimeError):  # the store went with its host
            self._store.set(self._key(self.rank), json.dumps([self._beats, self._passed, self._place]))

    def _reports(self) -> dict[int, Report]:
        """The last report of each rank; zero beats where there is none."""
        reports = dict.fromkeys(range(self.world_size), Report(0, 0, "starting"))
        with suppress(RuntimeError):
            for rank in reports:
                if self._store.check([self._key(rank)]):
                    reports[rank] = Report(*json.loads(self._store.get(self._key(rank))))
        return reports

    def _give_up(self) -> NoReturn:
        """Say which rank is behind, once among all ranks, and end this process."""
        silent, reports = self.lost(), self._reports()
        behind = min(report.passed for report in reports.values())
        late = {rank: report for rank, report in reports.items() if report.passed == behind}
        if len(late) == len(reports):
            late = {}
        what = silent or _words(late, "hangs", "hang") if silent or late else f"all ranks hang at {self._place}"
        if self.rank in late:
            faulthandler.dump_traceback(all_threads=True)  # where it hangs
        if self.is_first_to_say(what):
            print(
                f"error: {what}; no progress for {self.timeout:g} s (--dist_timeout); the same command goes on from the "
                "last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_LOST_RANK)

    def is_first_to_say(self, what: str) -> bool:
        """Whether no other rank has said which rank is lost: all leave at about the same time, and would name each other."""
        mine = f"{self.rank}: {what}"
        try:
            return self._store.compare_set(self._key(-1), "", mine).decode() == mine
        except RuntimeError:
            return True


def _words(ranks: dict[int, Report], one: str, many: str) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    places = "; ".join(dict.fromkeys(report.place for report in ranks.values()))
    return f"rank{'s' if len(ranks) > 1 else ''} {names} {many if len(ranks) > 1 else one}, last seen at {places}"
