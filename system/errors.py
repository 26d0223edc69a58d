"""How a script ends: a user's mistake is one line on stderr and exit code 2, never a traceback."""

import atexit
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal after saving; start the same command again to go on
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


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Turn `main` into a script's entry point: UserError → one line and exit 2; Ctrl-C → 130."""

    @functools.wraps(main)
    def run() -> None:
        """Call `main`, then leave the process with its exit code."""
        _Ending.code = 1  # of a traceback
        try:
            code: str | int | None = main()
        except SystemExit as request:
            code = request.code
        except UserError as error:
            if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:  # torchrun ends all ranks when one has ended: the one that says why must be the first
                time.sleep(30)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            code = 130
        except BrokenPipeError:  # the reader of our output left, as in `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        _Ending.code = code if isinstance(code, int) else int(code is not None)
        sys.exit(code)

    return run
