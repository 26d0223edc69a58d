"""What a source of documents is, and documents out of its files.

parquet, jsonl and txt are read by readers of ours, with bounded memory, twice as fast as by `datasets`, and a flipped bit is
noticed; csv, json and arrow by `datasets`. A long document comes in pieces that encode to the same
tokens as the whole, so that neither memory nor the number of workers is bound to the size of a document.
"""

import glob
import io
import json
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

from core.errors import UserError

PIECE_CHARS = 1 << 18  # longer documents are cut
PARQUET_BATCH_BYTES = 4 << 20  # text decoded at a time, where documents are of one length,
BATCH_ROWS = 32  # and documents, for where a few are a thousand times as long as the others
COMPRESSED_TEXT_RATIO = 3.0  # bytes of text per byte of English in gzip or zstd
SUFFIX = re.compile(r"\.(parquet|jsonl|txt)((?<!parquet)(?:\.gz|\.zst))?$")  # what a folder stands for
OTHER_SUFFIX = re.compile(r"\.(csv|tsv|json|arrow)((?<!arrow)(?:\.gz|\.bz2|\.xz|\.zst))?$")  # what is taken where it is named
SUFFIXES = ".parquet, .jsonl[.gz|.zst], .txt[.gz|.zst], .csv, .tsv, .json or .arrow"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SAFE_CUT = re.compile(r"\S(?=[ \n])")


class SourceFile(NamedTuple):
    """One file of a source: its name, its size on disk and the text in it (an estimate), both in bytes."""

    name: str
    size: int
    text_bytes: int
    sha256: str | None = None  # in hex, where the hub tells it


class Source(Protocol):
    """What preparation needs of a source."""

    files: list[SourceFile]  # in the order of the token stream
    fetch_bytes: int  # most that a fetched file takes on disk

    @property
    def revision(self) -> str | None:
        """The hub's commit; None for files that are not the hub's."""

    def fetch(self, index: int) -> AbstractContextManager[Path]:
        """Have file `index` on disk; what was fetched is removed on leaving."""


class Piece(NamedTuple):
    """A document, or a part of a long one; `text` is None for a null document, `first` marks a document's beginning."""

    text: str | None
    first: bool


def is_text(name: str) -> bool:
    """Whether a file of this name can be read here."""
    return bool(SUFFIX.search(name) or OTHER_SUFFIX.search(name))


def read_pieces(path: Path, column: str = "text") -> Generator[Piece, None, None]:
    """The documents in `column` of a local file (a txt file is one), in order, in pieces.

    Raises UserError naming the file, and the line in a jsonl.
    """
    (kind,) = [match[1] for match in (SUFFIX.search(path.name), OTHER_SUFFIX.search(path.name)) if match]
    if kind == "txt":
        yield from cut(_read_txt(path))
        return
    read = {"parquet": _read_parquet, "jsonl": _read_jsonl}.get(kind, partial(_read_by_datasets, kind=kind))
    for text in read(path, column):
        if text is None or len(text) <= PIECE_CHARS:
            yield Piece(text, True)
        else:
            yield from cut(text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def cut(chunks: Iterable[str], size: int = PIECE_CHARS) -> Iterator[Piece]:
    """Cut one document, given in chunks, into pieces of `size` characters or a little more.

    A cut falls between a non-space and a space or newline. No token of GPT-2 reaches across such a place and its
    pattern looks ahead only out of white space, so the pieces' tokens are the document's.
    """
    buffer, first, at = "", True, size
    for chunk in chunks:
        buffer += chunk
        while match := SAFE_CUT.search(buffer, at - 1):
            yield Piece(buffer[: match.end()], first)
            buffer, first, at = buffer[match.end() :], False, size
        at = max(at, len(buffer))
    yield Piece(buffer, first)


def open_parquet(path: Path, column: str) -> Any:  # -> pyarrow.parquet.ParquetFile
    """Open a parquet file that has a `column` of strings; raises UserError naming the file for any other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # a row group's pages are read one by one
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)})") from None
    _check_column(path, column, file.schema_arrow)
    return file


def _check_column(path: Path, column: str, schema: Any) -> None:  # pyarrow.Schema
    """Raise UserError unless `schema` has one `column` of strings."""
    import pyarrow as pa

    if (count := schema.names.count(column)) != 1:
        here = f"has {count} columns {column!r}" if count else f"has no column {column!r}"
        raise UserError(f"{path}: {here}; its columns are {', '.join(schema.names)}; --column NAME takes another")
    kind = stored = schema.field(column).type
    if pa.types.is_dictionary(kind):
        stored = kind.value_type
    allowed = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_one(stored) for is_one in allowed):
        raise UserError(f"{path}: its column {column!r} holds {kind}, expected string")


def text_bytes(path: Path, column: str = "text") -> int:
    """Bytes of text in a local file, estimated; for parquet from its metadata. Raises UserError if it is unreadable."""
    if path.suffix == ".parquet":
        with open_parquet(path, column) as file:
            return sum(_row_group_bytes(file, column))
    return int(path.stat().st_size * (COMPRESSED_TEXT_RATIO if path.suffix in COMPRESSED else 1))


def _row_group_bytes(file: Any, column: str) -> list[int]:
    """Uncompressed bytes of `column` in each row group."""
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column]


def _read_parquet(path: Path, column: str) -> Iterator[str | None]:
    import pyarrow as pa

    with open_parquet(path, column) as file:
        row_bytes = sum(_row_group_bytes(file, column)) // max(1, file.metadata.num_rows) + 1
        rows = min(BATCH_ROWS, max(1, PARQUET_BATCH_BYTES // row_bytes))
        try:
            for batch in file.iter_batches(batch_size=rows, columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read to its end ({one_line(error)})") from None


def _read_by_datasets(path: Path, column: str, kind: str) -> Iterator[str | None]:
    """Rows of a csv, tsv, json or arrow file; one json array is in memory as a whole."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is said by its error
    as_text = {"features": datasets.Features({column: datasets.Value("string")}), "usecols": [column], "keep_default_na": False}
    name, options = {
        "csv": ("csv", as_text),  # "007" and "NA" stay what they are
        "tsv": ("csv", as_text | {"sep": "\t"}),
        "json": ("json", {"on_mixed_types": None, "parse_agent_traces": False}),  # else a number among texts quotes them all
        "arrow": ("arrow", {}),
    }[kind]
    try:
        with TemporaryDirectory() as cache:
            found = {"data_files": glob.escape(str(path.absolute())), "split": "train"}
            rows = datasets.load_dataset(name, **found, streaming=True, cache_dir=cache, **options)
            for table in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
                _check_column(path, column, table.schema)
                yield from table.column(column).to_pylist()
    except UserError:
        raise
    except Exception as error:  # of pandas, of pyarrow, of datasets
        raise UserError(f"{path}: cannot be read to its end ({one_line(error)})") from None


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a plain, .gz or .zst file."""
    import pyarrow as pa

    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read to its end ({one_line(error)})") from None


def _read_txt(path: Path) -> Iterator[str]:
    with _open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")  # line ends stay as they are
        while chunk := text.read(PIECE_CHARS):
            yield chunk


def _read_jsonl(path: Path, column: str) -> Iterator[str | None]:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({one_line(error)})") from None
            if not isinstance(row, dict) or column not in row:
                raise UserError(f"{path}, line {number}: expected an object with a key {column!r}; --column NAME takes another")
            if not isinstance(row[column], str | None):
                raise UserError(f"{path}, line {number}: {column!r} is {type(row[column]).__name__}, expected a string or null")
            yield row[column]


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
