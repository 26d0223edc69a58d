"""Turn text into shards of uint16 tokens, the form in which training reads it.

python prepare_fineweb.py                                    # FineWeb-Edu sample-10BT → data/fineweb-edu-10B, 10B tokens, 20 GB
python prepare_fineweb.py --source demo                      # the English inside Python, as bytes → data/demo, 2 MB
python prepare_fineweb.py --source 'texts/*.parquet' notes/ --out data/mine --val_tokens 1_000_000

The stream is <|endoftext|> before each document, documents in the source's order, special tokens in a text encoded as
text; shard 0 is validation. That is token for token what build-nanogpt's and llm.c's fineweb.py write. Interrupted at
any point, the same command continues and ends with the same bytes, whatever the number of workers.
"""

import argparse
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from corpus import Piece, read_pieces
from errors import UserError, command
from shards import HEADER_BYTES, MANIFEST, ShardWriter, read_manifest, write_json
from sources import Source, is_hub, open_source
from tokenizer import TOKENIZERS, Tokenizer, load_tokenizer

FINEWEB = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT"
BATCH_CHARS = 1 << 18  # text encoded at a time by one worker
BYTES_PER_TOKEN = {"gpt2": 4.4, "bytes": 1.0}  # of English, to estimate with
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
PROGRESS, SCRATCH, LOCK = ".progress.json", ".download", ".lock"


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    source: list[str]
    out: Path
    tokenizer: str
    shard_tokens: int
    val_tokens: int
    limit_tokens: int | None
    workers: int

    @property
    def terms(self) -> dict[str, Any]:
        """What decides the bytes of the shards, together with the source's files."""
        names = ("source", "tokenizer", "shard_tokens", "val_tokens", "limit_tokens")
        return {name: getattr(self, name) for name in names}


class Batch(NamedTuple):
    """Consecutive pieces of source file number `file`; `item` is the first one's number in that file."""

    file: int
    item: int
    pieces: list[Piece]


class Encoded(NamedTuple):
    """A batch's tokens (n,) uint16; `ends` (pieces,) is where in them each piece ends."""

    batch: Batch
    tokens: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: `offset` tokens into piece number `item` of file number `file`.

    `null` and `empty` count the documents skipped before that piece.
    """

    file: int = 0
    item: int = 0
    offset: int = 0
    null: int = 0
    empty: int = 0

    def passed(self, batch: Batch, n_pieces: int, offset: int) -> "Cursor":
        """The cursor `n_pieces` and `offset` tokens into `batch`, where this one was at the batch's beginning."""
        texts = [piece.text for piece in batch.pieces[:n_pieces]]
        return Cursor(batch.file, batch.item + n_pieces, offset, self.null + texts.count(None), self.empty + texts.count(""))


def prepare(job: Job) -> None:
    """Write the shards and the manifest of `job`, or what is missing of them. Raises UserError."""
    tokenizer = load_tokenizer(job.tokenizer)
    try:
        with locked(job.out):
            earlier, finished = read_earlier(job.out)
            refuse_other_work(job.out, earlier, job.terms)
            if finished and is_hub(job.source):  # its revision is pinned, no need to ask the hub
                return report(job.out, "finished already")
            source = open_source(job.source, job.out / SCRATCH, earlier.get("revision"))
            files = [[file.name, file.size] for file in source.files]
            refuse_other_work(job.out, earlier, {"files": files})
            if finished:
                return report(job.out, "finished already")
            terms = job.terms | {"revision": source.revision, "files": files}
            write_folder(job, source, tokenizer, terms, intact(job.out, earlier.get("shards", [])))
            report(job.out, "finished")
    except OSError as error:
        raise UserError(f"{error.filename or job.out}: {error.strerror or error}") from None


def write_folder(job: Job, source: Source, tokenizer: Tokenizer, terms: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Go on after the finished `shards`, write the rest and the manifest, and clear away what is temporary."""
    for leftover in job.out.glob(".*.tmp"):
        leftover.unlink()
    expected = preflight(job, source, sum(shard["tokens"] for shard in shards))
    with ShardFolder(job, tokenizer.eot, terms, shards) as folder, progress_bar(expected, folder.n_tokens) as bar:
        start = folder.end
        with closing(encode_in_order(read_batches(source, start), tokenizer, job.workers)) as stream:
            for encoded in stream:
                folder.append(encoded)
                bar.update(folder.n_tokens - bar.n)
                if folder.n_tokens == job.limit_tokens:
                    break
        folder.close()
        bar.total = bar.n
    manifest = terms | {
        "n_vocab": tokenizer.n_vocab,
        "eot": tokenizer.eot,
        "tokens": folder.n_tokens,
        "documents": sum(shard["documents"] for shard in folder.shards),
        "skipped": {"null": folder.end.null, "empty": folder.end.empty},
        "shards": [{key: value for key, value in shard.items() if key != "end"} for shard in folder.shards],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "pyarrow", "tiktoken")},
    }
    write_json(job.out / MANIFEST, manifest)
    (job.out / PROGRESS).unlink()
    shutil.rmtree(job.out / SCRATCH, ignore_errors=True)


def read_batches(source: Source, start: Cursor) -> Iterator[Batch]:
    """The source's pieces from `start` on, in batches of about BATCH_CHARS that do not cross files."""
    for file in range(start.file, len(source.files)):
        item = start.item if file == start.file else 0
        with source.fetch(file) as path, closing(read_pieces(path)) as pieces:
            batch, chars = Batch(file, item, []), 0
            for piece in islice(pieces, item, None):
                batch.pieces.append(piece)
                chars += 64 + len(piece.text or "")
                if chars >= BATCH_CHARS:
                    yield batch
                    batch, chars = Batch(file, batch.item + len(batch.pieces), []), 0
            if batch.pieces:
                yield batch


def encode_in_order(batches: Iterator[Batch], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Encode `batches` in `workers` threads, a bounded number at a time, and yield them in their order.

    Threads are enough: tiktoken lets go of the interpreter's lock while it encodes.
    """
    window: deque[Future[Encoded]] = deque()
    with closing(batches), ThreadPoolExecutor(workers) as pool:  # type: ignore[type-var]
        try:
            for batch in batches:
                window.append(pool.submit(encode_batch, batch, tokenizer))
                if len(window) > 2 * workers + 2:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode_batch(batch: Batch, tokenizer: Tokenizer) -> Encoded:
    """Tokens of a batch: the end-of-text token before each document, nothing for a null or empty one."""
    eot = np.array([tokenizer.eot], dtype=np.uint16)
    parts, ends, end = [np.empty(0, dtype=np.uint16)], [], 0
    for text, first in batch.pieces:
        if text:
            parts += [eot, tokenizer.encode(text)] if first else [tokenizer.encode(text)]
            end += len(parts[-1]) + first
        ends.append(end)
    return Encoded(batch, np.concatenate(parts), np.array(ends))


class ShardFolder:
    """The shards of a token stream, and beside them the progress file from which a later start continues."""

    def __init__(self, job: Job, eot: int, terms: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        self.job, self.eot, self.terms, self.shards = job, eot, terms, shards
        self.n_tokens = sum(shard["tokens"] for shard in shards)
        self.end = Cursor(**shards[-1]["end"]) if shards else Cursor()
        self._n_opened = len(shards)
        self._shard: ShardWriter | None = None
        self._documents = 0  # begun in the open shard
        self._closing: Future[None] | None = None
        self._closer = ThreadPoolExecutor(1)  # waits for the disk while the next shard is being filled
        write_json(job.out / PROGRESS, terms | {"shards": shards})

    def append(self, encoded: Encoded) -> None:
        """Write a batch's tokens from the cursor on, up to the limit."""
        batch, tokens, ends = encoded
        begin, at = self.end, self.end.offset
        while at < len(tokens) and self.n_tokens != self.job.limit_tokens:
            shard = self._shard = self._shard or self._open()
            n = shard.write(tokens[at:])
            self._documents += int(np.count_nonzero(tokens[at : at + n] == self.eot))
            self.n_tokens, at = self.n_tokens + n, at + n
            # the piece that holds the last token written: the same one wherever the batches began
            piece = int(np.searchsorted(ends, at))
            self.end = begin.passed(batch, piece, at - int(ends[piece - 1] if piece else 0))
            if shard.full:
                self._finish_shard()
        if self.n_tokens != self.job.limit_tokens:
            self.end = begin.passed(batch, len(batch.pieces), 0)

    def close(self) -> None:
        """Finish the last shard. Raises UserError if there is nothing to train on."""
        if self._n_opened < 2:
            skipped = f"{self.end.null} null and {self.end.empty} empty documents"
            raise UserError(
                f"the whole source is {self.n_tokens:,} tokens (and {skipped}), all of which --val_tokens "
                f"{self.job.val_tokens:,} takes for validation, so nothing is left to train on; give a smaller --val_tokens"
                if self.n_tokens
                else f"--source {' '.join(self.job.source)}: holds no text ({skipped})"
            )
        if self._shard:
            self._finish_shard()
        if self._closing:
            self._closing.result()

    def __enter__(self) -> "ShardFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._closer.shutdown(wait=True)
        if self._shard:
            self._shard.abort()
        if error[0] and len(self.shards) < 2 and self._n_opened < 2 or not self.shards:
            (self.job.out / PROGRESS).unlink(missing_ok=True)

    def _open(self) -> ShardWriter:
        index, job = self._n_opened, self.job
        self._n_opened += 1
        capacity = job.shard_tokens if index else job.val_tokens
        if job.limit_tokens:
            capacity = min(capacity, job.limit_tokens - self.n_tokens)
        return ShardWriter(job.out / f"{'train' if index else 'val'}_{index:06d}.bin", capacity)

    def _finish_shard(self) -> None:
        shard, documents, end = self._shard, self._documents, self.end
        assert shard
        if self._closing:
            self._closing.result()
        self._closing = self._closer.submit(self._close, shard, documents, end)
        self._shard, self._documents = None, 0

    def _close(self, shard: ShardWriter, documents: int, end: Cursor) -> None:
        try:
            sha256 = shard.close()
        except BaseException:
            shard.abort()
            raise
        name = shard.path.name
        entry = {"file": name, "split": name.split("_")[0], "tokens": shard.n_tokens, "documents": documents, "sha256": sha256}
        self.shards.append(entry | {"end": asdict(end)})
        write_json(self.job.out / PROGRESS, self.terms | {"shards": self.shards})
