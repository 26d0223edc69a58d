"""Sizes and progress, for people."""

import shutil
import sys
from pathlib import Path
from typing import Any

from core.console import quiet, remark
from core.errors import UserError


def gigabytes(n_bytes: int) -> str:
    """Bytes for people, in units of 1000."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"


def check_space(out: Path, what: str, need: int) -> None:
    """Say `what` is to come into the folder `out`, and the bytes it takes. Raises UserError where the disk has fewer."""
    free = shutil.disk_usage(out).free
    remark(f"{out}: {what}; needs {gigabytes(need)}, {gigabytes(free)} are free", stdout=True)
    if need > free:
        raise UserError(
            f"{out}: too little space, {gigabytes(need)} are needed and {gigabytes(free)} free; make room, choose another "
            "--out or a smaller --limit_tokens"
        )


def progress_bar(expected: int, done: int) -> Any:  # -> tqdm
    """A bar in tokens on a terminal; a line a minute elsewhere, nothing with --quiet."""
    from tqdm import tqdm

    class Lines:
        flush = sys.stderr.flush

        def write(self, text: str) -> None:
            if line := text.strip("\r\n").rstrip():
                sys.stderr.write(line + "\n")

    terminal = sys.stderr.isatty()
    return tqdm(
        total=expected,
        initial=done,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 60,
        file=sys.stderr if terminal else Lines(),
        disable=quiet(),
    )
