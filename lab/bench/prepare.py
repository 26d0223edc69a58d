"""prepare_fineweb.py from text to shards, against the tokenizer alone and against a pool of processes.

    python -m lab.bench prepare --source 'texts/*.parquet'
    python -m lab.bench prepare --source 'texts/*.parquet' --limit_tokens 5_000_000 --rounds 3

- alone: tiktoken's encode_ordinary in one process, document by document, the texts already in memory, the ids thrown away
- apart-N: N such processes that share nothing, each with every N-th text: what N workers can reach on this machine
- ours-N: prepare_fineweb.py with N workers: reading, encoding, shards, sha256, fsync
- pool-N: the recipe of build-nanogpt's fineweb.py, written anew: a multiprocessing pool of N processes encodes a document at
  a time (imap, chunks of 16), the parent copies the ids into a shard's array in memory and saves it with numpy

All take the same documents and run one after another in every round, each in a new process of its own, with its vocabulary
and pyarrow loaded before the clock starts. Tokens are those of `alone`; the end-of-text tokens that the others add are not
counted.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.console import new_folder
from core.errors import UserError
from core.measure import speedup, spread
from prepare_fineweb import n_cores, parse_args, positive, prepare
from text.corpus import read_pieces
from text.demo import demo_documents
from text.sources import open_source
from text.tokenizer import load_tokenizer

DEMO_REPEATS = 10  # the demo corpus is 2 MB, a second's work
SHARD_TOKENS = 100_000_000  # of the pool; ours has its own default


class Job(NamedTuple):
    """What every candidate is given; the first `n_texts` of the source are encoded, all of them for None."""

    source: list[str]
    tokenizer: str
    n_texts: int | None
    limit_tokens: int | None
    scratch: str


class Took(NamedTuple):
    """Seconds, tokens, and the most bytes resident in the process and its children, pages they share counted for each."""

    seconds: float
    tokens: int
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab.bench prepare`."""
    add = parser.add_argument
    add("--source", nargs="+", metavar="WHERE", help="as for prepare_fineweb.py [default: the demo corpus, ten times over]")
    add("--limit_tokens", "--limit-tokens", type=positive, metavar="N", help="stop after this many tokens [default: all]")
    add("--workers", type=positive, nargs="+", default=sorted({1, n_cores()}), help="[default: 1 and all cores: %(default)s]")
    add("--rounds", type=positive, default=5, help="[default: %(default)s]")
    add(
        "--scratch",
        type=new_folder,
        metavar="FOLDER",
        help="where shards are written and removed again [default: the system's]",
    )


def run(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Time every candidate in every round; returns the JSON fields. Raises UserError."""
    if rest:
        raise UserError(f"{rest[0]}: no such option of lab.bench prepare; see --help")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        job = make_job(args, scratch)
        candidates = [
            ("alone", 1),
            *((kind, n) for n in args.workers for kind in ("ours", "pool")),
            *(("apart", n) for n in args.workers if n > 1),
        ]
        took: dict[str, list[Took]] = {}
        for number in range(args.rounds):
            first = number % len(candidates)
            for kind, n in candidates[first:] + candidates[:first]:
                name = kind if kind == "alone" else f"{kind}-{n}"
                took.setdefault(name, []).append(in_a_new_process(kind, n, job))
    return figures(took, args) | {"source": args.source or ["demo"]}


def figures(took: dict[str, list[Took]], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON fields; prints a line for each candidate."""
    seconds = {name: [one.seconds for one in each] for name, each in took.items()}
    tokens = took["alone"][0].tokens
    results = {}
    for name, each in took.items():
        results[name] = spread(seconds[name], tokens) | {
            "ratio": speedup(seconds[name], seconds["alone"]),
            "peak_memory_bytes": max(one.peak_bytes for one in each),
        }
        rate, ratio, peak = (results[name][key] for key in ("tokens_per_second", "ratio", "peak_memory_bytes"))
        print(f"{name:>8}: {rate / 1e6:6.2f}M tokens/s, {ratio:5.2f} × encode_ordinary alone, {peak / 1e6:6.0f} MB")
    versus = {n: speedup(seconds[f"ours-{n}"], seconds[f"pool-{n}"]) for n in args.workers}
    for n, ratio in versus.items():
        print(f"ours ÷ pool, {n} at work: {ratio:.2f}")
    best = results[f"ours-{max(args.workers)}"]
    return {key: best[key] for key in ("tokens_per_second", "ms_median", "ms_p10", "ms_p90")} | {
        "tokens": tokens,
        "workers": args.workers,
        "candidates": results,
        "ours_over_pool": {str(n): ratio for n, ratio in versus.items()},
    }


def make_job(args: argparse.Namespace, scratch: str) -> Job:
    """The documents that everybody gets; counts how many make up `limit_tokens`."""
    source = args.source or [write_demo(Path(scratch, "demo.parquet"))]
    n_texts = None
    if args.limit_tokens:
        encode, n_texts, tokens = load_tokenizer("gpt2").encode, 0, 0
        for text in texts(source, scratch):
            n_texts, tokens = n_texts + 1, tokens + 1 + len(encode(text))
            if tokens >= args.limit_tokens:
                break
    return Job(source, "gpt2", n_texts, args.limit_tokens, scratch)


def write_demo(path: Path) -> str:
    """The demo corpus, DEMO_REPEATS times, as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": demo_documents() * DEMO_REPEATS}), path)
    return str(path)


def texts(source: list[str], scratch: str) -> Iterator[str]:
    """The texts that preparation encodes: documents, and of very long ones the pieces."""
    opened = open_source(source, Path(scratch, "fetched"))
    for i in range(len(opened.files)):
        with opened.fetch(i) as path:
            yield from (piece.text for piece in read_pieces(path) if piece.text)


def in_a_new_process(kind: str, n: int, job: Job) -> Took:
    """Run one candidate with `n` at work, where nothing of the others is in memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(candidate, kind, n, job).result()


def candidate(kind: str, n: int, job: Job) -> Took:
    """Run one candidate in this process."""
    import pyarrow.parquet  # noqa: F401

    load_tokenizer(job.tokenizer)
    took = {"alone": alone, "apart": apart, "ours": ours, "pool": pooled}[kind](n, job)
    return took._replace(peak_bytes=took.peak_bytes + peak_bytes(os.getpid()))


def peak_bytes(pid: int) -> int:
    """The most bytes a process has held resident; 0 where there is no /proc. (ru_maxrss begins with the parent's.)"""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def alone(_n: int, job: Job) -> Took:
    """encode_ordinary and nothing else."""
    return encode_every(job, 0, 1)


def apart(n: int, job: Job) -> Took:
    """The slowest of `n` processes that begin to encode together, each its share of the texts."""
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(n)
    with ProcessPoolExecutor(n, mp_context=context, initializer=_set_ready, initargs=(ready,)) as pool:
        took = list(pool.map(encode_every, [job] * n, range(n), [n] * n))
    return Took(max(one.seconds for one in took), sum(one.tokens for one in took), 0)


_ready: Any = None


def _set_ready(barrier: Any) -> None:
    global _ready
    _ready = barrier


def encode_every(job: Job, first: int, n: int) -> Took:
    """encode_ordinary of every `n`-th text from number `first` on, once the other processes have their texts too."""
    in_memory = list(islice(texts(job.source, job.scratch), first, job.n_texts, n))
    encode: Any = load_tokenizer(job.tokenizer)._tiktoken.encode_ordinary  # type: ignore[attr-defined]
    if _ready:
        _ready.wait()
    begin = time.perf_counter()
    tokens = sum(len(encode(text)) for text in in_memory)
    return Took(time.perf_counter() - begin, tokens, 0)


def ours(n: int, job: Job) -> Took:
    """The command itself, with `n` workers."""
    with tempfile.TemporaryDirectory(dir=job.scratch) as out, open(os.devnull, "w") as silence:
        words = ["--source", *job.source, "--out", f"{out}/shards", "--tokenizer", job.tokenizer, "--workers", str(n)]
        words += ["--limit_tokens", str(job.limit_tokens)] if job.limit_tokens else []
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            begin = time.perf_counter()
            prepare(parse_args(words))
            return Took(time.perf_counter() - begin, 0, 0)


def pooled(n: int, job: Job) -> Took:
    """A document at a time to `n` processes, their ids copied into an array that is saved when full."""
    with tempfile.TemporaryDirectory(dir=job.scratch) as out, multiprocessing.get_context("fork").Pool(n) as pool:
        pool.map(document_ids, ["warm"] * n, chunksize=1)
        begin, shards = time.perf_counter(), 0
        shard, filled = np.empty((SHARD_TOKENS,), dtype=np.uint16), 0
        for ids in pool.imap(document_ids, islice(texts(job.source, job.scratch), job.n_texts), chunksize=16):
            while filled + len(ids) >= SHARD_TOKENS:
                room = SHARD_TOKENS - filled
                shard[filled:] = ids[:room]
                np.save(f"{out}/{shards}.npy", shard)
                ids, filled, shards = ids[room:], 0, shards + 1
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
        np.save(f"{out}/{shards}.npy", shard[:filled])
        seconds = time.perf_counter() - begin
        return Took(seconds, 0, sum(peak_bytes(child.pid or 0) for child in multiprocessing.active_children()))


def document_ids(text: str) -> Any:  # -> np.ndarray
    """What a process of the pool does with a document: (n,) uint16, the end-of-text token first."""
    tokenizer: Any = load_tokenizer("gpt2")
    ids = np.array([tokenizer.eot, *tokenizer._tiktoken.encode_ordinary(text)])
    if not ((ids >= 0) & (ids < 2**16)).all():
        raise ValueError("an id does not fit into uint16")
    return ids.astype(np.uint16)
