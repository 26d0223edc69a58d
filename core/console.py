"""The command lines of all scripts, and what they say beside results: progress and remarks, which --quiet leaves out."""

import argparse
import ast
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from core.errors import UserError

QUIET = "CAROPE_QUIET"  # in the environment, so that ranks and scripts that a command starts are quiet, too


class CommandLine(argparse.ArgumentParser):
    """argparse with the script's docstring as help, --quiet, --plugin, no abbreviations, and a mistake as UserError."""

    def __init__(self, description: str | None, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        options.setdefault("prog", program())  # of a subcommand argparse gives its own
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **options)
        what = "no progress and no remarks: results, warnings and errors only"
        self.add_argument("--quiet", action=_Quiet, nargs=0, default=argparse.SUPPRESS, help=what)
        add_plugin(self)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        if re.search(r"invalid (int|float) value: '[0-9.]+(,[0-9.]+)+'", message):
            message += "; numbers of a list are given with spaces between them"
        raise UserError(f"{message}; see --help")


def this_command() -> list[str]:
    """The words after `python` that started this process: a script, or -m and a module of ours, and its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name.partition(".")[0] not in ("core", "lab"):
        return sys.argv
    return ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def program() -> str:
    """The name of this command in its --help."""
    first, *rest = this_command()
    return f"python -m {rest[0]}" if first == "-m" else Path(first).name


def docstring_of(file: str | Path) -> str:
    """The docstring of a module by its source, which Python has under -OO, too."""
    return ast.get_docstring(ast.parse(Path(file).read_text(encoding="utf-8"))) or ""


def given_path(word: str) -> str:
    """The type of an argument that is a path: ~ is the home folder, which a shell does not see behind an = sign.

    Raises UserError for a name that is not UTF-8: neither safetensors nor pyarrow opens it.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        raise UserError(f"{word!a}: a name that is not UTF-8; rename it, or link to it by another name")
    return os.path.expanduser(word)


def new_file(word: str) -> str:
    """The type of an argument that is a file to be written. Raises UserError at once where that would fail in the end."""
    found = Path(given_path(word))
    if found.exists() and not found.is_file():
        raise UserError(f"{word}: {'a folder' if found.is_dir() else 'no ordinary file'}; give the name of a file")
    if not found.absolute().parent.is_dir():
        raise UserError(f"{word}: its folder is not there; make it first")
    if not os.access(found.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"{word}: cannot be written, its folder is read-only; give a file elsewhere")
    return str(found)


def new_folder(word: str) -> str:
    """The type of an argument that is a folder to be written to, made if need be. Raises UserError as `new_file` does."""
    found = Path(given_path(word))
    there = next(p for p in [found.absolute(), *found.absolute().parents] if p.exists())
    if not there.is_dir():
        raise UserError(f"{word}: {'' if there == found.absolute() else f'{there} is '}no folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{word}: cannot be written, {there} is read-only; give a folder elsewhere")
    return str(found)


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """Give the parser --plugin, which loads the file where it is met, so before what comes after the parsing."""
    what = "a Python file with encodings of your own (docs/new-encoding.md); as often as there are files"
    parser.add_argument("--plugin", action=_Plugin, type=given_path, metavar="FILE.py", default=argparse.SUPPRESS, help=what)


class _Plugin(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option: str | None = None) -> None:
        from core.plugins import load  # needs torch, which text preparation does without

        load(str(values))


class _Quiet(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option: str | None = None) -> None:
        os.environ[QUIET] = "1"
        os.environ["WANDB_SILENT"] = "true"


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
