"""A process waits at a named point: HOLD="module:function 3 FILE" in the environment, before the third call of the function.

Python imports this by itself where its folder is in PYTHONPATH; conftest.Hold arranges that. The process that comes there makes
FILE, for which the test waits, and continues once FILE.go is there. FILE is made once: a process that comes later, the
next run of a table, say, does not wait. Of several ranks only rank 0 does.
"""

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def holding(function: Callable[..., Any], nth: int, file: str) -> Callable[..., Any]:
    """`function`, before whose call number `nth` the process waits."""
    calls = 0

    @functools.wraps(function)
    def held(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and os.environ.get("RANK", "0") == "0" and not os.path.exists(file):
            open(file, "x").close()
            while not os.path.exists(f"{file}.go"):
                time.sleep(0.01)
        return function(*args, **kwargs)

    return held


class Hook(MetaPathFinder):
    """Wraps the function as soon as its module is there, before anybody can import it from the module."""

    def __init__(self, where: str, nth: int, file: str) -> None:
        self.module, self.path, self.nth, self.file = *where.split(":"), nth, file

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            *owners, last = self.path.split(".")
            owner: Any = functools.reduce(getattr, owners, module)
            setattr(owner, last, holding(getattr(owner, last), self.nth, self.file))

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


if "HOLD" in os.environ:
    where, nth, file = os.environ["HOLD"].split(maxsplit=2)
    sys.meta_path.insert(0, Hook(where, int(nth), file))
