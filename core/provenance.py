"""Where a number came from: commit, versions, machine, command."""

import ast
import functools
import hashlib
import inspect
import os
import platform
import shlex
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from core.console import this_command
from core.distributed import Distributed, format_name
from core.files import ROOT
from positional import ENCODINGS


@functools.cache
def git_version() -> str | None:
    """Commit of this source tree, with "-dirty" where files differ from it; None outside a git checkout of its own.

    CAROPE_COMMIT in the environment comes before what git says: of a copy that has no .git.
    """
    if commit := os.environ.get("CAROPE_COMMIT"):
        return commit
    if not (ROOT / ".git").exists():  # git would look further up, and find another project
        return None
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # GIT_INDEX_FILE, in a hook
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=own).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


KIND = "syntax:"  # starts these hashes; earlier ones were of whole files and cannot be compared with them


@functools.cache
def source_of(encoding: str) -> str | None:
    """sha256 of what computes an encoding, as syntax: its class and every class, function and constant that it is made of.

    It follows names defined in positional/ or beside the class, but not in positional.base, which only calls attention.
    Comments, docstrings, annotations, messages and the place of a definition do not count: the hash is the same on every
    machine and changes only with what is computed. None where there is no file.
    """
    first = ENCODINGS[encoding]
    waiting, parts = [(first.__name__, first)], dict[str, str]()
    while waiting:
        name, thing = waiting.pop()
        if name in parts:
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            parts[name] = repr(thing)
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        except (OSError, TypeError):  # a class typed into a notebook
            return None
        parts[name] = syntax(tree)
        around = vars(sys.modules[thing.__module__])
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & around.keys()
        waiting += [(name, around[name]) for name in names if is_of_encodings(around[name], first.__module__)]
    return KIND + hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()


def is_of_encodings(value: Any, beside: str) -> bool:
    """Whether the value of a name says how an encoding of the module `beside` computes."""
    if inspect.isclass(value) or inspect.isfunction(value):
        module = value.__module__
        return module == beside or (module.startswith("positional.") and module != "positional.base")
    return isinstance(value, int | float | str | tuple)


UNSAID = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}  # fields that decide nothing
SAYINGS = {"beyond", "changes"}  # attributes of an encoding that only say something


def syntax(node: Any) -> str:
    """What an abstract syntax tree computes, in the same words under every version of Python."""
    if isinstance(node, list):
        return f"[{', '.join(filter(None, map(syntax, node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_saying = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in SAYINGS
    if is_docstring or is_saying:
        return ""
    if isinstance(node, ast.JoinedStr):
        return "message"
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in UNSAID and value not in (None, []))
    return f"{type(node).__name__}({', '.join(f'{name}={syntax(value)}' for name, value in fields)})"


def warn_of_other_source(path: Path, state: Any) -> None:
    """Say it where the code of its encoding is not the one that the checkpoint at `path`, of this `state`, was made by."""
    encoding = state.config["encoding"]
    if (state.source or "").startswith(KIND) and state.source != source_of(encoding):
        commit = f"commit {state.git[:10]} has what it was trained by" if state.git else "of which commit it was is unknown"
        print(f"warning: {path}: the code of encoding {encoding!r} has changed since; {commit}", file=sys.stderr)


def environment(dist: Distributed, step: int) -> dict[str, Any]:
    """One start of a run: from which step, when, by which command, commit, versions and hardware."""
    return {
        "from_step": step,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(this_command()),
        "git": git_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "world_size": dist.world_size,
        "device": device_name(dist.device),
        "dtype": format_name(dist.dtype),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself, e.g. "NVIDIA H100 80GB HBM3" or a processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, {platform.machine()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
