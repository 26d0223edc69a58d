"""Candidates of a benchmark that take turns, each in a process of its own: one computes, the others wait.

Each compiles while others compile, each has its own peak memory, and a failure of one does not affect the rest.
A candidate is a module that is started with its job as JSON. Once it is ready it describes itself in a line of JSON, and it
answers each line it receives with another.
"""

import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from core.files import ROOT
from core.watchdog import PARENT


class Candidate:
    """A candidate's process, and what is known of it: `about`, the `seconds` of its parts in each round, or its `failure`."""

    def __init__(self, name: str, module: str, job: dict[str, Any], without: Sequence[str] = ()) -> None:
        """`without`: variables of our environment that it is not to have."""
        self.name, self.module, self.job, self._without = name, module, job, without
        self.about: dict[str, Any] = {}
        self.seconds: dict[str, list[float]] = {}
        self.failure: str | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start its process; `get_ready` waits for it."""
        env = {key: value for key, value in os.environ.items() if key not in self._without} | {PARENT: str(os.getpid())}
        command, pipe = [sys.executable, "-m", self.module, json.dumps(self.job)], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def get_ready(self) -> None:
        """Take in what it says of itself once it is ready, or that it has failed."""
        self.about = self._answer()

    def fileno(self) -> int:
        """What there is to read once it has something to say."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer; {} where it has failed."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError):  # it is gone; its exit code says more
            print(question, file=self._process.stdin, flush=True)
        return self._answer()

    def take_turn(self, counts: bool) -> None:
        """Let it compute; keep the seconds where the round `counts`, and whatever else it says of itself."""
        answer = self.ask("turn")
        for part, seconds in answer.pop("seconds", {}).items():
            if counts:
                self.seconds.setdefault(part, []).append(seconds)
        self.about |= answer

    def fail(self, why: str) -> None:
        """End it, for this reason."""
        self.failure = self.failure or why
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """End its process."""
        if self._process and self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self.failure = self.failure or f"ended with exit code {self._process.wait()}; its message stands above"
        return {}


def start_all(candidates: Sequence[Candidate], at_once: int, seconds: float | None) -> None:
    """Start the candidates in order, `at_once` at a time; who is not ready after `seconds` has failed."""
    waiting, starting = list(candidates), list[Candidate]()
    deadline = None if seconds is None else time.monotonic() + seconds
    while waiting or starting:
        while waiting and len(starting) < at_once:
            starting.append(waiting.pop(0))
            starting[-1].start()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        answering = select.select(starting, [], [], left)[0]
        for candidate in answering:
            candidate.get_ready()
            starting.remove(candidate)
        if not answering:
            for candidate in (*starting, *waiting):
                candidate.fail(f"not ready after {seconds:.0f} s")
            return


def take_turns(candidates: Sequence[Candidate], rounds: int, warmup: int, after_each: Callable[[], object]) -> None:
    """`rounds` rounds after `warmup` that do not count; in each every candidate takes its turn, in an order drawn anew.

    Call `after_each` round that counts.
    """
    order = random.Random(1)
    for number in range(-warmup, rounds):
        for candidate in order.sample(candidates, len(candidates)):
            if not candidate.failure:
                candidate.take_turn(counts=number >= 0)
        if number >= 0:
            after_each()


def own_stdout() -> IO[str]:
    """In a candidate, before anything is printed: where answers go. What else prints to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(answers: IO[str], about: dict[str, Any], answer: Callable[[str], dict[str, Any]]) -> None:
    """In a candidate: say that it is ready, then `answer` each line that comes, until none comes any more."""
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=answers, flush=True)
