"""A user's mistake is one line on stderr and exit code 2, never a traceback."""

import functools
import os
import sys
from collections.abc import Callable

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


def command(main: Callable[[], int | None]) -> Callable[[], None]:
    """Turn `main` into a script's entry point: UserError → one line and exit 2; Ctrl-C → 130."""

    @functools.wraps(main)
    def run() -> None:
        """Call `main`, then leave the process with its exit code."""
        try:
            code = main()
        except UserError as error:
            if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            code = 130
        except BrokenPipeError:  # the reader of our output left, as in `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        sys.exit(code)

    return run
