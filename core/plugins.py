"""Encodings from outside the repository: --plugin FILE.py, on every script, as often as there are files.

A plugin is a Python file with classes under @register. It runs because the command line names it, and never because a run's
folder does: that only says which one the run was made with.
"""

import hashlib
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from core.errors import UserError
from core.files import sha256_file
from positional import ENCODINGS


class Plugin(NamedTuple):
    """A file that was loaded, and the encodings that it registered."""

    path: Path
    sha256: str
    encodings: frozenset[str]


_LOADED: dict[str, Plugin] = {}  # by the name of its module


def load(file: str) -> None:
    """Register the encodings of the plugin `file`; nothing where that is done.

    Raises UserError where it cannot be read, fails, registers no encoding, or has the name of another.
    """
    path = Path(file).resolve()
    name = "plugin_" + re.sub(r"\W", "_", path.stem)
    if str(path.parent) not in sys.path:  # for what the file imports from beside it; last, so that it hides nothing
        sys.path.append(str(path.parent))
    if name in _LOADED:
        if _LOADED[name].path != path:
            raise UserError(f"--plugin {file}: {_LOADED[name].path} has the same name; rename one of the two")
        return
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"--plugin {file}: cannot be read ({error.strerror}); give a Python file") from None
    before = ENCODINGS.copy()
    try:
        _execute(name, path, text)
        added = frozenset(ENCODINGS.keys() - before)
        if not added:
            raise UserError(f'--plugin {file}: registers no encoding; @register("NAME") above a class does')
    except BaseException:
        ENCODINGS.clear()
        ENCODINGS.update(before)
        del sys.modules[name]
        raise
    _LOADED[name] = Plugin(path, hashlib.sha256(text).hexdigest(), added)


def _execute(name: str, path: Path, text: bytes) -> None:
    # Not by importlib, whose cached bytecode is taken for current where size and second of the file's last change are the same
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(path)
    try:
        exec(compile(text, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else places[-1] if places else None
        where = "" if line is None else f", line {line}"
        why = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"--plugin {path}{where}: {type(error).__name__}: {why}") from None


def plugin_of(encoding: str) -> Plugin | None:
    """The plugin that the encoding comes from; None of one that is in positional/."""
    return next((plugin for plugin in _LOADED.values() if encoding in plugin.encodings), None)


def plugin_paths() -> list[str]:
    """The files that are loaded."""
    return [str(plugin.path) for plugin in _LOADED.values()]


def plugin_words() -> list[str]:
    """The words that load in another script what is loaded here. Raises UserError where a file is not what it was then."""
    for plugin in _LOADED.values():
        if not plugin.path.is_file() or sha256_file(plugin.path) != plugin.sha256:
            raise UserError(f"--plugin {plugin.path}: has changed since this command began; start it again")
    return [word for path in plugin_paths() for word in ("--plugin", path)]
