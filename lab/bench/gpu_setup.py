"""Set up what `make gpu` needs from what gpu_pack packed: packages, text and shards. Python and pip are enough for it."""

import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from core.errors import UserError

TEXT = "text.jsonl.xz"


def install_wheels(kit: Path, site: Path) -> None:
    """Install the packed wheels into the folder `site`, which is emptied first. Raises UserError where pip cannot."""
    wheels = sorted(map(str, kit.glob("wheels/*.whl")))
    shutil.rmtree(site, ignore_errors=True)
    words = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    if wheels and subprocess.run([sys.executable, "-m", "pip", *words, *wheels]).returncode:
        raise UserError(f"{kit}/wheels: pip cannot install them; its message stands above")


def unpack(kit: Path, folder: Path) -> Path:
    """The packed text as a file in `folder`; xz compares its sha256. Raises UserError where it is damaged or not there."""
    text, packed = folder / "text.jsonl", kit / TEXT
    if text.exists():
        return text
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lzma.open(packed) as source, open(f"{text}.part", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
        os.replace(f"{text}.part", text)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{packed}: cannot be unpacked ({error}); python -m lab.bench.gpu_pack --text makes it") from None
    return text


def prepare(text: Path, folder: Path, val_tokens: Mapping[str, int], env: Mapping[str, str]) -> None:
    """Shards of `text`, in a folder for each tokenizer of `val_tokens`. Raises UserError where prepare_fineweb.py fails."""
    for tokenizer, n_val in val_tokens.items():
        where = ["--source", str(text), "--out", str(folder / tokenizer)]
        what = ["--tokenizer", tokenizer, "--val_tokens", str(n_val), "--workers", "4"]
        if code := subprocess.run([sys.executable, "prepare_fineweb.py", "--quiet", *where, *what], env=env).returncode:
            raise UserError(f"{folder / tokenizer}: prepare_fineweb.py ended with exit code {code}; its message stands above")
