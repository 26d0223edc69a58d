"""Where a number came from: commit, versions, machine, command."""

import functools
import os
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from core.console import this_command
from core.distributed import Distributed, format_name
from core.files import ROOT


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
