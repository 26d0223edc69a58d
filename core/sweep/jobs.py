"""Start our scripts as processes of their own: one before the eyes of the user, or several at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import EXIT_REQUEUE, UserError
from core.files import ROOT
from core.host import heard
from core.plugins import plugin_words
from core.watchdog import PARENT

POLL_S = 0.2


@contextmanager
def signals_to(receive: Callable[[], None]) -> Iterator[list[int]]:
    """While entered, SIGINT, SIGTERM and SIGHUP call `receive`; yields the list of those that came. Ignored ones stay so."""
    received: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        received.append(number)
        receive()

    before = {number: signal.signal(number, handler) for number in heard("SIGINT", "SIGTERM", "SIGHUP")}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stopped() -> SystemExit:
    """Say that the same command goes on; the exit code is what schedulers know as "again"."""
    print("stopped; the same command goes on from here", file=sys.stderr)
    return SystemExit(EXIT_REQUEUE)


def environment(threads: int = 0) -> dict[str, str]:
    """Of a child that is not to outlive this process, with so many threads of its own where `threads` says."""
    ours = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for -m, wherever the user is
    own = {PARENT: str(os.getpid()), "PYTHONPATH": ours}
    return os.environ | own | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def start(script: str, arguments: Sequence[str], nproc: int) -> int:
    """Run one of our scripts, on nproc ranks where nproc > 0; returns its exit code.

    Signals go on to it, so that it saves and leaves: EXIT_REQUEUE.
    """
    launcher = ["-m", "core.launch", f"--nproc_per_node={nproc}"] if nproc else []
    command = [sys.executable, *launcher, str(ROOT / script), *arguments, *plugin_words()]
    child = subprocess.Popen(command, env=environment())
    with signals_to(lambda: child.send_signal(signal.SIGTERM)) as received:
        code = child.wait()
    return EXIT_REQUEUE if received else code


def launch(script: str, arguments: Sequence[str], nproc: int) -> None:
    """`start`, but raise SystemExit(75) after a signal, and UserError where the script fails."""
    code = start(script, arguments, nproc)
    if code == EXIT_REQUEUE:
        raise stopped()
    if code:
        raise UserError(f"{script} {' '.join(arguments)}: failed with exit code {code}; its message stands above")


class Job:
    """Scripts to run one after the other, each a list of words; what they print goes to `output`."""

    def __init__(self, name: str, scripts: Sequence[Sequence[str]], output: Path) -> None:
        self.name, self.output, self._left = name, output, list(scripts)
        self._child: subprocess.Popen[bytes] | None = None
        self.began = 0.0

    def advance(self, threads: int) -> bool:
        """Start the next script where none runs; True once all are done. Raises UserError where one fails."""
        if self._child is not None:
            if (code := self._child.poll()) is None:
                return False
            self._child = None
            if code == EXIT_REQUEUE:
                raise stopped()
            if code:
                said = self.output.read_text(errors="replace").strip().splitlines() or ["(nothing)"]
                raise UserError(f"{self.name}: failed with exit code {code}: {said[-1]} ({self.output} has all it said)")
        if not self._left:
            return True
        self.began = self.began or time.monotonic()
        script, *words = self._left.pop(0)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.output, "ab") as file:
            command = [sys.executable, str(ROOT / script), *words, *plugin_words()]
            self._child = subprocess.Popen(command, env=environment(threads), stdout=file, stderr=subprocess.STDOUT)
        return False

    def stop(self) -> None:
        """Ask the script that runs to save and leave."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until the script that runs has left."""
        if self._child is not None:
            self._child.wait()


def run_all(
    jobs: Sequence[Job], at_once: int, threads: int, seconds: float, done: Callable[[Job], None], stagger: float = 0.0
) -> bool:
    """Run the jobs, `at_once` of them at a time, and call `done` after each; False where `seconds` were too few (0: no limit).

    Between the starts of two lie `stagger` seconds or more, so that jobs on one GPU do not all compile, then all compute. What
    fails does not keep the others from their turn. On a signal, or when time is up, the scripts are asked to save and leave.
    Raises SystemExit(75) after a signal; at the end UserError that names all that failed.
    """
    waiting, running, failures = list(jobs), list[Job](), list[str]()
    deadline, next_start = time.monotonic() + seconds if seconds else float("inf"), 0.0
    with signals_to(lambda: None) as received:
        try:
            while (waiting or running) and not received and time.monotonic() < deadline:
                while waiting and len(running) < at_once and time.monotonic() >= next_start:
                    running.append(waiting.pop(0))
                    next_start = time.monotonic() + stagger
                for job in list(running):
                    try:
                        if not job.advance(threads):
                            continue
                        done(job)
                    except UserError as error:
                        failures.append(str(error))
                    running.remove(job)
                time.sleep(POLL_S)
        finally:
            for act in (Job.stop, Job.wait):
                for job in running:
                    act(job)
    if received:
        raise stopped()
    if failures:
        raise UserError("; ".join(failures))
    return not (waiting or running)
