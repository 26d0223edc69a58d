"""The loader alone: batches out of token shards in the page cache, the share of each part, and memory over an epoch.

    python -m lab.bench data                                    # 200M random tokens, written to a temporary folder
    python -m lab.bench data config/tiny.toml --data=data/fineweb-edu-10B --micro_batches 64 32

Tokens a second are those of one rank, from `batches[step, micro]` to int64 tensors on the device. The parts are timed on the
same tokens: `copy` brings them out of the page cache, `check` looks for ids beyond the vocabulary, `convert` makes int64 of
them. The epoch after that touches each page for the first time since it was mapped. Memory is what /proc tells (Linux):
anonymous, which must not grow, and pages of the mapped shards, which the system takes back when it needs them.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.config import load_config
from core.data import Batches, TokenStream, to_ids
from core.distributed import Distributed
from core.measure import interleave, speedup, spread
from prepare_fineweb import positive
from text.shard_writer import write_shard

SHARD_TOKENS = 100_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab.bench data`."""
    add = parser.add_argument
    add("--tokens", type=positive, default=200_000_000, help="how many random tokens to write [default: %(default)s]")
    add("--micro_batches", "--micro-batches", type=positive, nargs="+", default=[64, 32], help="[default: 64 32]")
    add("--batches", type=positive, default=200, help="batches in a round [default: %(default)s]")
    add("--rounds", type=positive, default=20, help="[default: %(default)s]")


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Time the loader and its parts for each shape, then read an epoch; returns the JSON fields. Raises UserError."""
    cfg = load_config(rest)
    dist = Distributed.start(cfg.device, cfg.dtype)
    shapes = {}
    own = any(word.startswith("--data") for word in rest)
    with shards(cfg.data if own else None, cfg.vocab_size, args.tokens) as folder:
        for micro_batch in args.micro_batches:
            a_step = {"data": str(folder), "micro_batch": micro_batch, "tokens_per_step": micro_batch * cfg.block_size}
            loader = Batches(cfg.model_copy(update=a_step), "train", dist)
            candidates = work(loader, args.batches)
            seconds = interleave(candidates, args.rounds, device=dist.device)
            n_tokens = args.batches * micro_batch * cfg.block_size
            name = f"{micro_batch}x{cfg.block_size}"
            shapes[name] = spread(seconds["loader"], n_tokens) | {
                "us_per_batch": {part: round(1e6 * min(each) / args.batches, 1) for part, each in seconds.items()},
                "share": {part: speedup(seconds["loader"], each) for part, each in seconds.items() if part != "loader"},
            }
            print(describe(name, shapes[name]))
        whole = epoch(loader)
    grown, rate = whole["anonymous_growth_bytes"], whole["epoch_tokens_per_second"]
    print(
        f"epoch of {whole['epoch_tokens']:,} tokens: {rate / 1e6:.1f}M tokens/s, anonymous memory grew by {grown / 1e6:.2f} MB"
    )
    first = next(iter(shapes.values()))
    wanted = ("tokens_per_second", "ms_median", "ms_p10", "ms_p90")
    return {key: first[key] for key in wanted} | {"config": cfg.model_dump(), "shapes": shapes} | whole


@contextmanager
def shards(folder: str | None, vocab_size: int, n_tokens: int) -> Iterator[Path]:
    """`folder`, or a temporary one with random training shards; either is brought into the page cache."""
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        draw = np.random.default_rng(0)
        for i, start in enumerate(range(0, 0 if folder else n_tokens, SHARD_TOKENS)):
            size = min(SHARD_TOKENS, n_tokens - start)
            write_shard(Path(made, f"train_{i + 1:06d}.bin"), draw.integers(0, vocab_size, size, dtype=np.uint16))
        stream = TokenStream(folder or made, "train", 2**16)
        for index in range(len(stream.paths)):
            stream.shard(index).max()
        yield Path(folder or made)


def work(loader: Any, n: int) -> dict[str, Any]:
    """The loader reading `n` batches, and each of its parts alone on the same tokens."""
    stream, size = loader.stream, loader.cfg.micro_batch * loader.cfg.block_size + 1
    starts = [loader.start(step, 0) % max(1, stream.lengths[0] - size) for step in range(n)]
    held = [np.array(stream.shard(0)[start : start + size]) for start in starts[:8]]

    def load() -> None:
        for step in range(n):
            loader[step, 0]

    def copy() -> None:
        for start in starts:
            np.array(stream.shard(0)[start : start + size])

    def check() -> None:
        for i in range(n):
            held[i % len(held)].max()

    def convert() -> None:
        for i in range(n):
            to_ids(held[i % len(held)], loader.dist.device)

    return {"loader": load, "copy": copy, "check": check, "convert": convert}


def epoch(loader: Any) -> dict[str, Any]:
    """Read every batch of an epoch; how fast that is, and how memory changes from its first tenth to its end."""
    n_tokens = loader.cfg.micro_batch * loader.cfg.block_size
    steps = math.ceil(len(loader.stream) / n_tokens)
    for step in range(first := steps // 10 + 1):
        loader[step, 0]
    before, begin = memory(), time.perf_counter()
    for step in range(first, steps):
        loader[step, 0]
    seconds, after = time.perf_counter() - begin, memory()
    return {
        "epoch_tokens": len(loader.stream),
        "epoch_tokens_per_second": round((steps - first) * n_tokens / seconds, 1),
        "anonymous_bytes": after["RssAnon"],
        "anonymous_growth_bytes": after["RssAnon"] - before["RssAnon"],
        "mapped_growth_bytes": after["RssFile"] - before["RssFile"],
    }


def memory() -> dict[str, int]:
    """Resident bytes of this process: anonymous (RssAnon) and of mapped files (RssFile); zeros where there is no /proc."""
    found = {"RssAnon": 0, "RssFile": 0}
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return found


def describe(name: str, figures: dict[str, Any]) -> str:
    """One line for people."""
    parts = ", ".join(f"{part} {us:.0f}" for part, us in figures["us_per_batch"].items())
    return f"{name}: {figures['tokens_per_second'] / 1e6:.1f}M tokens/s; best µs a batch: {parts}"
