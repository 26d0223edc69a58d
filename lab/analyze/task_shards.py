"""Examples of tasks as a folder of token shards that `train.py --data FOLDER` reads.

Training reads rows of block_size tokens from the beginning of the stream on. Shards here are made of blocks of just that
length, each of whole examples; so every row begins with an end-of-text token and no example is cut.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy import __version__ as numpy_version
from tqdm import tqdm

from core.console import no_bar
from core.errors import UserError
from core.files import locked, write_json
from lab.analyze.task_data import LONGEST, SHORTEST, VOCABULARIES, block
from text.shard_writer import ShardWriter
from text.shards import MANIFEST, SHARD_SUFFIXES

SHARD_TOKENS = 100_000_000
VAL_SHARE = 20  # one in so many tokens, and at most
VAL_TOKENS = 1_000_000
MOST_TOKENS = 2**40


def write_shards(folder: Path, tasks: Sequence[str], length: int, tokens: int, seed: int, tokenizer: str) -> dict[str, Any]:
    """Write about `tokens` training tokens, a twentieth as many of validation, and the manifest, which it returns.

    Raises UserError for an impossible length, fewer tokens than one block, or a folder with shards in it.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"--length = {length}: must be at least {SHORTEST}, for a task to have room, and at most {LONGEST}")
    if not length <= tokens <= MOST_TOKENS:
        raise UserError(f"--tokens = {tokens}: must be at least one window, --length = {length}, and at most {MOST_TOKENS}")
    with locked(folder):
        if any(path.suffix in SHARD_SUFFIXES for path in folder.iterdir()):
            raise UserError(f"{folder}: holds shards already; choose another folder, or delete it")
        n_blocks = {"val": max(1, min(tokens // VAL_SHARE, VAL_TOKENS) // length), "train": tokens // length}
        shards: list[dict[str, Any]] = []
        for split, total in n_blocks.items():
            at_once = max(1, SHARD_TOKENS // length)
            for first in range(0, total, at_once):
                path = folder / f"{split}_{len(shards):06d}.bin"
                numbers = range(first, min(total, first + at_once))
                shards.append(write_one(path, list(tasks), length, numbers, seed, split, tokenizer))
        manifest = {
            "source": ["tasks"], "tasks": list(tasks), "length": length, "seed": seed, "tokenizer": tokenizer,
            "n_vocab": VOCABULARIES[tokenizer].n_vocab, "eot": VOCABULARIES[tokenizer].eot,
            "tokens": sum(shard["tokens"] for shard in shards), "documents": sum(shard["documents"] for shard in shards),
            "shards": shards, "versions": {"python": platform.python_version(), "numpy": numpy_version},
        }  # fmt: skip
        write_json(folder / MANIFEST, manifest)
    return manifest


def write_one(
    path: Path, tasks: list[str], length: int, numbers: range, seed: int, split: str, tokenizer: str
) -> dict[str, Any]:
    """Write the blocks `numbers` of a split as one shard, whole or not at all; returns its entry in the manifest."""
    shard, documents = ShardWriter(path, len(numbers) * length), 0
    try:
        for index in tqdm(numbers, desc=path.name, unit="window", leave=False, disable=no_bar()):
            for tokens in block(tasks, seed, split, index, length, tokenizer):
                documents += 1
                shard.write(tokens)
        sha256 = shard.close()
    except BaseException:
        shard.abort()
        raise
    return {"file": path.name, "split": split, "tokens": shard.n_tokens, "documents": documents, "sha256": sha256}
