"""Where a number came from: commit, versions, machine, command."""

import ast
import functools
import hashlib
import inspect
import io
import os
import platform
import shlex
import subprocess
import sys
import tokenize
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


@functools.cache
def source_of(encoding: str) -> str | None:
    """sha256 of the code that makes an encoding: the file of its class and what that imports of the package, without comments,
    docstrings and blank lines. The same on every machine, and the same until something is computed otherwise; None where the
    class is in no file.
    """
    waiting, parts = [ENCODINGS[encoding].__module__], dict[str, str]()
    while waiting:
        module = waiting.pop()
        if module not in parts:
            try:
                text = inspect.getsource(sys.modules[module])
            except (OSError, TypeError):  # a class typed into a notebook
                return None
            imports = [node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
            waiting += [name for name in imports if name.startswith("positional.")]
            parts[module] = bare(text)
    return hashlib.sha256("\n".join(parts[module] for module in sorted(parts)).encode()).hexdigest()


def bare(text: str) -> str:
    """Python source without comments, docstrings, blank lines and spaces at the ends of lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            said = node.body[0]
            for row in range(said.lineno, (said.end_lineno or said.lineno) + 1):
                lines[row - 1] = ""
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def warn_of_other_source(path: Path, state: Any) -> None:
    """Say it where the code of its encoding is not the one that the checkpoint at `path`, of this `state`, was made by."""
    encoding = state.config["encoding"]
    if state.source not in (None, source_of(encoding)):
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
