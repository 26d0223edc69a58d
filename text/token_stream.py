"""A source's documents → one stream of tokens → a folder of shards, from where an earlier start left it.

The stream is the end-of-text token before each document and the document's tokens; null and empty documents have none.
Which pieces make a batch depends on where a start continues, the tokens do not.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby, islice, zip_longest
from pathlib import Path
from threading import local
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from core.errors import UserError
from core.files import write_json
from text.corpus import Piece, Source, read_pieces
from text.shard_writer import ShardWriter
from text.shards import HEADER_BYTES, MANIFEST, SHARD_SUFFIXES, ShardEntry, first_error, read_manifest
from text.tokenizer import Tokenizer

BATCH_CHARS = 1 << 18  # text encoded at a time by one worker
PROGRESS = ".progress.json"


class Batch(NamedTuple):
    """Consecutive pieces of source file number `file`, called `name`; `item` is the first one's number in that file."""

    file: int
    name: str
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

    file: NonNegativeInt = 0
    item: NonNegativeInt = 0
    offset: NonNegativeInt = 0
    null: NonNegativeInt = 0
    empty: NonNegativeInt = 0

    def passed(self, batch: Batch, n_pieces: int, offset: int) -> "Cursor":
        """The cursor `n_pieces` and `offset` tokens into `batch`, where this one was at the batch's beginning."""
        texts = [piece.text for piece in batch.pieces[:n_pieces]]
        return Cursor(batch.file, batch.item + n_pieces, offset, self.null + texts.count(None), self.empty + texts.count(""))


class FinishedShard(ShardEntry):
    """A shard as the progress file lists it, with the place in the stream where it ends."""

    end: Cursor


def _name_and_size(pair: list[Any]) -> list[Any]:
    if [type(one) for one in pair] != [str, int]:
        raise ValueError(f"{pair!r} is not the name and the size of a file")
    return pair


class Earlier(BaseModel):
    """What an earlier start's manifest and progress file say of how it would go on, besides its terms."""

    model_config = ConfigDict(extra="allow", strict=True)

    files: list[Annotated[list[Any], AfterValidator(_name_and_size)]] = []
    revision: str | None = None
    val_tokens: PositiveInt | None = None
    column: str = "text"  # this and the next two decide the bytes, too, and were not always there
    config: str | None = None
    split: str | None = None


class Unfinished(Earlier):
    """The progress file."""

    shards: list[FinishedShard] = []


def read_batches(source: Source, start: Cursor, column: str = "text") -> Generator[Batch, None, None]:
    """The pieces of a source's `column` from `start` on, in batches of about BATCH_CHARS that do not cross files."""
    for file in range(start.file, len(source.files)):
        item = start.item if file == start.file else 0
        name, chars = source.files[file].name, 0
        with source.fetch(file) as path, calling(path, name), closing(read_pieces(path, column)) as pieces:
            batch = Batch(file, name, item, [])
            for piece in islice(pieces, item, None):
                batch.pieces.append(piece)
                chars += 64 + len(piece.text or "")
                if chars >= BATCH_CHARS:
                    yield batch
                    batch, chars = Batch(file, name, batch.item + len(batch.pieces), []), 0
            if batch.pieces:
                yield batch


@contextmanager
def calling(path: Path, name: str) -> Iterator[None]:
    """Have errors call the file at `path` by its name in the source; a fetched file is gone when they are read."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None


def encode_in_order(
    batches: Generator[Batch, None, None], tokenizer: Tokenizer, workers: int
) -> Generator[Encoded, None, None]:
    """Encode `batches` in `workers` threads, a bounded number at a time, and yield them in their order.

    Threads are enough: tiktoken lets go of the interpreter's lock while it encodes.
    """
    window: deque[Future[Encoded]] = deque()
    own = local()

    def begin() -> None:
        own.tokenizer = tokenizer.copy() if workers > 1 else tokenizer

    def encode(batch: Batch) -> Encoded:
        return encode_batch(batch, own.tokenizer)

    with closing(batches), ThreadPoolExecutor(workers, initializer=begin) as pool:
        try:
            for batch in batches:
                window.append(pool.submit(encode, batch))
                if len(window) > 2 * workers + 2:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode_batch(batch: Batch, tokenizer: Tokenizer) -> Encoded:
    """Tokens of a batch: the end-of-text token before each document, nothing for a null or empty one. Raises UserError."""
    parts = [np.empty(0, dtype=np.uint16)]
    sizes: list[int] = []  # tokens of each piece that has any
    for first, run in groupby((piece for piece in batch.pieces if piece.text), key=lambda piece: piece.first):
        texts = [piece.text or "" for piece in run]
        try:
            encoded = [tokenizer.encode_documents(texts)] if first else [tokenizer.encode(text) for text in texts]
        except ValueError as error:  # a run of some 100,000 spaces is too much for tiktoken's regular expression
            raise UserError(_which_fails(batch.name, texts, tokenizer, error)) from None
        parts += encoded
        begins = np.flatnonzero(encoded[0] == tokenizer.eot)
        sizes += np.diff(begins, append=len(encoded[0])).tolist() if first else [len(ids) for ids in encoded]
    of_texts = iter(sizes)
    ends = np.cumsum([next(of_texts) if piece.text else 0 for piece in batch.pieces])
    return Encoded(batch, np.concatenate(parts), ends)


def _which_fails(name: str, texts: list[str], tokenizer: Tokenizer, error: ValueError) -> str:
    for text in texts:
        try:
            tokenizer.encode(text)
        except ValueError:
            return f"{name}: a document cannot be encoded ({error}): {text[:40]!r}…"
    return f"{name}: a document cannot be encoded ({error})"


class ShardFolder:
    """The shards of a token stream, and beside them the progress file from which a later start continues."""

    def __init__(self, out: Path, terms: dict[str, Any], eot: int, shards: list[dict[str, Any]]) -> None:
        """Continue after the finished `shards`; `terms` decide the bytes: source, shard_tokens, val_tokens, limit_tokens."""
        self.out, self.terms, self.eot, self.shards = out, terms, eot, shards
        self._limit: int | None = terms["limit_tokens"]
        self.n_tokens = sum(shard["tokens"] for shard in shards)
        self.end = Cursor(**shards[-1]["end"]) if shards else Cursor()
        self._n_opened = len(shards)
        self._shard: ShardWriter | None = None
        self._documents = 0  # begun in the open shard
        self._closing: Future[None] | None = None
        self._closer = ThreadPoolExecutor(1)  # waits for the disk while the next shard is being filled
        write_json(out / PROGRESS, terms | {"shards": shards})

    @property
    def at_limit(self) -> bool:
        """Whether --limit_tokens is reached."""
        return self.n_tokens == self._limit

    def append(self, encoded: Encoded) -> None:
        """Write a batch's tokens from the cursor on, up to the limit."""
        batch, tokens, ends = encoded
        begin, at = self.end, self.end.offset
        while at < len(tokens) and not self.at_limit:
            shard = self._shard = self._shard or self._open()
            n = shard.write(tokens[at:])
            self._documents += int(np.count_nonzero(tokens[at : at + n] == self.eot))
            self.n_tokens, at = self.n_tokens + n, at + n
            # the piece that holds the last token written: the same one wherever the batches began
            piece = int(np.searchsorted(ends, at))
            self.end = begin.passed(batch, piece, at - int(ends[piece - 1] if piece else 0))
            if shard.full:
                self._finish_shard()
        if not self.at_limit:
            self.end = begin.passed(batch, len(batch.pieces), 0)

    def close(self) -> None:
        """Finish the last shard. Raises UserError, and leaves no shard, if there is nothing to train on."""
        if self._shard and self._n_opened > 1:
            self._finish_shard()
        if self._closing:
            self._closing.result()
        if self._n_opened < 2:
            for shard in self.shards:
                (self.out / shard["file"]).unlink()
            self.shards.clear()
            raise UserError(self._nothing_to_train_on())

    def __enter__(self) -> "ShardFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._closer.shutdown(wait=True)
        if self._shard:
            self._shard.abort()
        if not self.shards:
            (self.out / PROGRESS).unlink(missing_ok=True)

    def _nothing_to_train_on(self) -> str:
        source, val_tokens = " ".join(self.terms["source"]), self.terms["val_tokens"]
        if not self.n_tokens:
            return f"--source {source}: holds no text, only {self.end.null} null and {self.end.empty} empty documents"
        return (
            f"--source {source}: all its {self.n_tokens:,} tokens fit into the validation shard, --val_tokens {val_tokens:,}; "
            "nothing is left to train on; give a smaller --val_tokens"
        )

    def _open(self) -> ShardWriter:
        index, self._n_opened = self._n_opened, self._n_opened + 1
        capacity = self.terms["shard_tokens" if index else "val_tokens"]
        if self._limit:
            capacity = min(capacity, self._limit - self.n_tokens)
        return ShardWriter(self.out / f"{'train' if index else 'val'}_{index:06d}.bin", capacity)

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
        write_json(self.out / PROGRESS, self.terms | {"shards": self.shards})


def read_earlier(out: Path, progress: str = PROGRESS, unfinished: type[Earlier] = Unfinished) -> tuple[dict[str, Any], bool]:
    """What an earlier start left in `out`, its manifest or its `progress` file, {} if nothing; and whether it finished.

    Raises UserError where it is damaged, names files outside `out`, or shards are there without it.
    """
    path = out / MANIFEST
    try:
        manifest = read_manifest(out)
        if manifest is not None:
            return Earlier.model_validate(manifest).model_dump(), True
        path = out / progress
        return unfinished.model_validate_json(path.read_bytes()).model_dump(), False
    except FileNotFoundError:
        if any(path.suffix in SHARD_SUFFIXES for path in out.iterdir()):
            raise UserError(f"{out}: holds shards that this command did not write; choose another --out") from None
        return {}, False
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: damaged ({first_error(error)}); delete {out} or choose another --out") from None


def refuse_other_work(out: Path, earlier: dict[str, Any], terms: dict[str, Any]) -> None:
    """Raise UserError where `terms` differ from those of an earlier start."""
    for name, here in terms.items():
        there = earlier.get(name)
        if earlier and there != here:
            if name == "files":  # their names and sizes may be many: name the first that differs
                there, here = next((a, b) for a, b in zip_longest(there or [], here) if a != b)
            raise UserError(
                f"{out}: holds work of other arguments, {name} was {there} and is now {here}; "
                f"choose another --out, or delete {out}"
            )


def intact(out: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The leading `shards` that lie in `out` with their right size."""
    sizes = [HEADER_BYTES + 2 * shard["tokens"] for shard in shards]
    paths = [out / shard["file"] for shard in shards]
    # Path.is_file raises for some names, as one too long, which a damaged progress file may hold
    good = [os.path.isfile(path) and path.stat().st_size == size for path, size in zip(paths, sizes, strict=True)]
    return shards[: [*good, False].index(False)]
