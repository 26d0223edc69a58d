"""How a script ends: a user's mistake is one line on stderr and exit code 2, never a traceback."""

import atexit
import errno
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal after saving; start the same command again to go on
EXIT_UNREAD = 141  # 128 + SIGPIPE: nobody read what was printed
EXIT_LOST_RANK = 71  # EX_OSERR: another rank died or hangs; the same command goes on from the last checkpoint


def printable(text: str) -> str:
    """`text` out of a file, fit for a message: a space for whatever would break the line or the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


class UserError(Exception):
    """Something the user can put right; the message says what, where, the limit and the way out.

    Every rank meets the same one, and local rank 0 says it; `alone` where only this rank does.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        super().__init__(printable(message))
        self.alone = alone


def unusable(error: OSError) -> UserError | None:
    """The file or disk that a user can put right, in words; None where `error` is of another kind."""
    users = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if error.filename is None or error.errno not in users:
        return None
    return UserError(f"{error.filename}: {error.strerror}", alone=True)


def at_least(smallest: float, **options: float | Sequence[float] | None) -> None:
    """Raise UserError for the first option that has a value below `smallest`, or NaN; None is an option not given."""
    for name, given in options.items():
        for value in given if isinstance(given, Sequence) else [] if given is None else [given]:
            if not value >= smallest:
                raise UserError(f"--{name} = {value}: must be at least {smallest}")


class _Ending:
    """What the process's end needs to know: the exit code of `command`, and whether to do without Python's clearing up."""

    code: int | None = None
    at_once = False


def end_at_once() -> None:
    """Let this process end, once all files are closed and every atexit function has run, before Python takes itself apart.

    Without this a thread of gloo's that comes late to let go of a tensor (torch 2.13) meets an interpreter that is going
    away, and the process, all its work done, ends by SIGABRT.
    """
    _Ending.at_once = True


@atexit.register  # the first to be registered, as this module is imported before torch, and so the last to be called
def _end() -> None:
    if _Ending.at_once and _Ending.code is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_Ending.code)


class Unheeding(io.FileIO):
    """The raw side of an output stream: what cannot be written, as nobody reads it or the disk is full, is dropped."""

    def write(self, data: Any) -> int:
        """Write `data`, or not."""
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def open_all_three() -> None:
    """Open /dev/null on each of the descriptors 0, 1 and 2 that is closed; the next file to be opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free, so `number`
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


open_all_three()  # before any other file is opened


def speak_anyway(*names: str) -> None:
    """Make these streams of sys drop what they cannot write, instead of raising an error.

    stdout prints a question mark for each character that the terminal does not have.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # a test's or a notebook's own
        with suppress(OSError, ValueError):
            stream.flush()
        raw = (Unheeding if name in names else io.FileIO)(stream.fileno(), "wb", closefd=False)
        errors = "replace" if name == "stdout" else stream.errors
        form = (stream.encoding, errors, None, stream.line_buffering, stream.write_through)
        new = io.TextIOWrapper(io.BufferedWriter(raw), *form)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def command(main: Callable[[], int | None] | None = None, *, work_in_files: bool = False) -> Any:
    """Turn `main` into a script's entry point: UserError, or a file that is `unusable` → one line and exit 2; Ctrl-C → 130.

    A stderr that fails never stops it. With `work_in_files`, for scripts that write their product to files, a stdout that fails
    does not either; in others a reader of stdout who leaves, as in `… | head`, ends the script with 141, as SIGPIPE would.
    """
    if main is None:
        return functools.partial(command, work_in_files=work_in_files)

    @functools.wraps(main)
    def run() -> None:
        """Call `main`, then leave the process with its exit code."""
        _Ending.code = 1  # of a traceback
        speak_anyway("stderr", *(["stdout"] if work_in_files else []))
        try:
            code: str | int | None = main()
            sys.stdout.flush()
        except SystemExit as request:
            code = request.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            code = 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_UNREAD
        except (UserError, OSError) as caught:
            error = caught if isinstance(caught, UserError) else unusable(caught)
            if error is None:
                raise
            if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:  # torchrun ends all ranks when one has ended: the one that says why must be the first
                time.sleep(30)
            code = 2
        _Ending.code = code if isinstance(code, int) else int(code is not None)
        sys.exit(code)

    return run
