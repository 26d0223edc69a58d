"""The command lines of all scripts, and what they say beside results: progress and remarks, which --quiet leaves out."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from system.errors import UserError, command

QUIET = "CAROPE_QUIET"  # in the environment, so that ranks and scripts that a command starts are quiet, too


class CommandLine(argparse.ArgumentParser):
    """argparse with the script's docstring as help, --quiet, no abbreviations, and a mistake as UserError."""

    def __init__(self, description: str | None, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **options)
        what = "no progress and no remarks: results, warnings and errors only"
        self.add_argument("--quiet", action=_Quiet, nargs=0, default=argparse.SUPPRESS, help=what)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        if re.search(r"invalid (int|float) value: '[0-9.]+(,[0-9.]+)+'", message):
            message += "; numbers of a list are given with spaces between them"
        raise UserError(f"{message}; see --help")


class _Quiet(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option: str | None = None) -> None:
        os.environ[QUIET] = "1"
        os.environ["WANDB_SILENT"] = "true"


def help_first(parse: Callable[[], object]) -> None:
    """Where --help is asked for, answer it now, by `parse`, before torch is imported, which takes seconds."""

    def answer() -> None:
        parse()

    if {"-h", "--help"} & set(sys.argv[1:]):
        command(answer)()


def quiet() -> bool:
    """Whether --quiet was given, to this command or to the one that started it."""
    return os.environ.get(QUIET) == "1"


def remark(text: str, stdout: bool = False) -> None:
    """Say what is neither a result nor a warning, on stderr unless told."""
    if not quiet():
        print(text, file=sys.stdout if stdout else sys.stderr, flush=True)


def no_bar() -> bool | None:
    """What tqdm takes as `disable`: a bar on a terminal only, and none with --quiet."""
    return True if quiet() else None
