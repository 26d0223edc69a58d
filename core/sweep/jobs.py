"""Start our scripts as processes of their own: one that has the terminal, or several at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.distributed import pick_device
from core.errors import EXIT_REQUEUE, UserError
from core.files import ROOT
from core.host import TO_LEAVE, signals_to
from core.plugins import plugin_words
from core.watchdog import PARENT

POLL_S = 0.2


def stopped() -> SystemExit:
    """Say that the same command goes on; the exit code is what schedulers know as "again"."""
    print("stopped; the same command goes on from here", file=sys.stderr)
    return SystemExit(EXIT_REQUEUE)


class Over(UserError):
    """What ends all jobs, not only the one that it is about."""


class Place(NamedTuple):
    """Where a run of several at a time computes: the GPUs that it sees, and its threads on a CPU; none and 0 set neither."""

    gpus: tuple[str, ...] = ()
    threads: int = 0


def places(at_once: int, nproc: int, devices: Sequence[str]) -> list[Place]:
    """Where `at_once` runs of `nproc` processes each (0: one) compute: GPUs of their own, or shared where there are fewer.

    A single run sees all that there is; on a CPU several share its cores. Raises UserError where the ranks of the runs need
    more GPUs than there are: no two ranks of NCCL share one.
    """
    if at_once == 1:
        return [Place()]
    if not any(pick_device(device).type == "cuda" for device in devices):
        return [Place(threads=max(1, (os.cpu_count() or 1) // (at_once * max(1, nproc))))] * at_once
    n = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:n]
    visible = named if len(named) == n and all(named) else [str(i) for i in range(n)]
    if nproc and at_once * nproc > n:
        raise UserError(f"--jobs {at_once} of --nproc {nproc}: need {at_once * nproc} GPUs, {n} are there")
    each = max(1, nproc)
    return [Place(tuple(visible[(i * each + k) % n] for k in range(each))) for i in range(at_once)]


def environment(place: Place = Place()) -> dict[str, str]:  # noqa: B008  nothing changes it
    """Of a child that is not to outlive this process, at its place."""
    ours = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for -m, wherever the user is
    own = {PARENT: str(os.getpid()), "PYTHONPATH": ours}
    own |= {"OMP_NUM_THREADS": str(place.threads)} if place.threads else {}
    return os.environ | own | ({"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)} if place.gpus else {})


def command(script: str, arguments: Sequence[str], nproc: int) -> list[str]:
    """The words that start one of our scripts, on nproc ranks where nproc > 0, with our plugins. Raises Over."""
    try:
        plugins = plugin_words()
    except UserError as error:
        raise Over(str(error)) from None
    launcher = ["-m", "core.launch", f"--nproc_per_node={nproc}"] if nproc else []
    return [sys.executable, *launcher, str(ROOT / script), *arguments, *plugins]


def start(script: str, arguments: Sequence[str], nproc: int) -> int:
    """Run one of our scripts, on nproc ranks where nproc > 0; returns its exit code.

    Signals go on to it, so that it saves and leaves: EXIT_REQUEUE.
    """
    child, received = subprocess.Popen(command(script, arguments, nproc), env=environment()), list[int]()

    def pass_on(number: int) -> None:
        received.append(number)
        child.send_signal(signal.SIGTERM)

    with signals_to(pass_on, *TO_LEAVE):
        code = child.wait()
    return EXIT_REQUEUE if received else code


class Job:
    """Scripts to run one after the other, each a list of words, on `nproc` ranks where nproc > 0.

    What they print goes to the file `output`, or to the terminal where there is none, but for what `silent` scripts say on
    stdout.
    """

    def __init__(
        self, name: str, scripts: Sequence[Sequence[str]], output: Path | None, nproc: int = 0, silent: Sequence[str] = ()
    ) -> None:
        self.name, self.output, self._left = name, output, list(scripts)
        self._nproc, self._silent = nproc, silent
        self._child: subprocess.Popen[bytes] | None = None
        self.began = 0.0

    def advance(self, place: Place) -> bool:
        """Start the next script where none runs; True once all are done. Raises UserError where one fails."""
        if self._child is not None:
            if (code := self._child.poll()) is None:
                return False
            self._child = None
            if code == EXIT_REQUEUE:
                raise stopped()
            if code:
                raise UserError(f"{self.name}: failed with exit code {code}{self._why()}")
        if not self._left:
            return True
        self.began = self.began or time.monotonic()
        script, *words = self._left.pop(0)
        options: dict[str, Any] = {"env": environment(place)}
        sys.stdout.flush()  # before what it says
        with ExitStack() as held:
            if self.output:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                options |= {"stdout": held.enter_context(open(self.output, "ab")), "stderr": subprocess.STDOUT}
            elif script in self._silent:
                options["stdout"] = subprocess.DEVNULL
            self._child = subprocess.Popen(command(script, words, self._nproc), **options)
        return False

    def _why(self) -> str:
        if self.output is None:
            return "; its message stands above"
        said = self.output.read_text(errors="replace").strip().splitlines() or ["(nothing)"]
        return f": {said[-1]} ({self.output} has all it said)"

    def stop(self) -> None:
        """Ask the script that runs to save and leave."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until the script that runs has left."""
        if self._child is not None:
            self._child.wait()


def run_all(
    jobs: Sequence[Job],
    at: Sequence[Place],
    seconds: float,
    done: Callable[[Job], None],
    began: Callable[[Job], None] = lambda job: None,
    stagger: float = 0.0,
) -> bool:
    """Run the jobs, one at a time at each of the places `at`, and call `began` and `done` of each.

    Returns False where `seconds` were too few (0: no limit). Between the starts of two lie `stagger` seconds or more, so that
    jobs on one GPU do not all compile, then all compute. What fails does not keep the others from their turn. On a signal, or
    when time is up, the scripts are asked to save and leave. Raises SystemExit(75) after a signal, Over where a job does; at
    the end UserError that names all that failed.
    """
    waiting, running, free, failures = list(jobs), dict[Job, Place](), list(at), list[str]()
    deadline, next_start, received = time.monotonic() + seconds if seconds else float("inf"), 0.0, list[int]()
    with signals_to(received.append, *TO_LEAVE):
        try:
            while (waiting or running) and not received and time.monotonic() < deadline:
                while waiting and free and time.monotonic() >= next_start:
                    job = waiting.pop(0)
                    running[job] = free.pop(0)
                    began(job)
                    next_start = time.monotonic() + stagger
                for job, place in list(running.items()):
                    try:
                        if not job.advance(place):
                            continue
                        done(job)
                    except Over:
                        raise
                    except UserError as error:
                        failures.append(str(error))
                    free.append(running.pop(job))
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
