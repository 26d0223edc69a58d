"""What a source of documents is, and documents out of its files, in bounded memory but for a json array.

`datasets` could read these formats, too, but it guesses types: in a csv whose rows are wider than its header it takes the wrong
column, and it rewrites a text that looks like a date. A long document comes in pieces that encode to the same tokens as the
whole, so that neither memory nor the number of workers is bound to the size of a document.
"""

import csv
import io
import json
import lzma
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from core.errors import UserError

PIECE_CHARS = 1 << 18  # longer documents are cut
PARQUET_BATCH_BYTES = 4 << 20  # text decoded at a time, where documents are of one length,
BATCH_ROWS = 32  # and documents, for where a few are a thousand times as long as the others
COMPRESSED_TEXT_RATIO = 3.0  # bytes of text per byte of English in gzip or zstd
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIX = re.compile(r"\.(?:(parquet|arrow)|(jsonl|json|csv|tsv|txt)(?:\.gz|\.bz2|\.xz|\.zst)?)$")
IN_FOLDERS = re.compile(r"\.(?:parquet|(?:jsonl|txt)(?:\.gz|\.zst)?)$")  # json and csv are often about the texts
SUFFIXES = ".parquet, .arrow, or .jsonl, .json, .csv, .tsv, .txt[.gz|.bz2|.xz|.zst]"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of arrow's streaming format
csv.field_size_limit(2**31 - 1)  # the most on any system
SAFE_CUT = re.compile(r"\S(?=[ \n])")


class SourceFile(NamedTuple):
    """One file of a source: its name, its size on disk and the text in it (an estimate), both in bytes."""

    name: str
    size: int
    text_bytes: int
    sha256: str | None = None  # in hex, where the hub tells it,
    git_sha1: str | None = None  # or this


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
    return bool(SUFFIX.search(name))


def read_pieces(path: Path, column: str = "text") -> Generator[Piece, None, None]:
    """The documents in `column` of a local file (a txt file is one), in order, in pieces.

    Raises UserError naming the file, and the line where it has lines.
    """
    match = SUFFIX.search(path.name)
    assert match
    kind = match[1] or match[2]
    if kind == "txt":
        yield from cut(_read_txt(path))
        return
    read = {"parquet": _read_parquet, "arrow": _read_arrow, "json": _read_json, "jsonl": _read_jsonl}.get(kind, _read_csv)
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

    _check_names(path, column, schema.names)
    kind = stored = schema.field(column).type
    if pa.types.is_dictionary(kind):
        stored = kind.value_type
    allowed = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_one(stored) for is_one in allowed):
        raise UserError(f"{path}: its column {column!r} holds {kind}, expected string")


def _check_names(path: Path, column: str, names: list[str]) -> None:
    """Raise UserError unless `column` is once among the names of a file's columns."""
    if (count := names.count(column)) != 1:
        here = f"has {count} columns {column!r}" if count else f"has no column {column!r}"
        raise UserError(f"{path}: {here}; its columns are {', '.join(names)}; --column NAME takes another")


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
                yield from batch.column(column).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read to its end ({one_line(error)})") from None


def _read_arrow(path: Path, column: str) -> Iterator[str | None]:
    """Rows of arrow's file format, or of its streaming format, in which `datasets` saves."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            opened = pa.ipc.open_stream if is_stream else pa.ipc.open_file
            file.seek(0)
            schema = opened(file).schema
            _check_column(path, column, schema)
            file.seek(0)
            reader = opened(file, options=pa.ipc.IpcReadOptions(included_fields=[schema.names.index(column)]))
            batches = iter(reader) if is_stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
            for batch in batches:
                batch.validate(full=True)
                yield from batch.column(0).to_pylist()
            end = file.tell()
            file.seek(max(0, file.size() - len(END_OF_STREAM)))
            if is_stream and (end != file.size() or file.read() != END_OF_STREAM):
                raise UserError(f"{path}: does not end where its data ends; it was cut, or more was added")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read to its end ({one_line(error)})") from None


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed by its suffix."""
    import pyarrow as pa

    try:
        with lzma.open(path) if path.suffix == ".xz" else pa.input_stream(str(path), compression="detect") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    except (pa.ArrowException, OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read to its end ({one_line(error)})") from None


def _read_txt(path: Path) -> Iterator[str]:
    with _open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")  # line ends stay as they are
        while chunk := text.read(PIECE_CHARS):
            yield chunk


def _read_jsonl(path: Path, column: str) -> Iterator[str | None]:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                row = _parsed(line, path, "line", number)
                is_text_there = type(row) is dict and type(row.get(column)) is str  # as nearly always, and quickly seen
                yield row[column] if is_text_there else _text_of(row, column, path, "line", number)


def _read_json(path: Path, column: str) -> Iterator[str | None]:
    """Rows of one array, which is in memory as a whole; what does not begin like one is read as lines."""
    with _open_bytes(path) as file:
        is_array = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        rows = _parsed(file.read(), path) if is_array else []
    if not is_array:
        yield from _read_jsonl(path, column)
    for number, row in enumerate(rows, 1):
        yield _text_of(row, column, path, "row", number)


def _parsed(raw: bytes, *place: object) -> Any:
    """The JSON in `raw`. Raises UserError, naming the `place`: a path, and "line" or "row" with its number."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{_name(*place)}: not JSON ({one_line(error)})") from None


def _text_of(row: Any, column: str, *place: object) -> str | None:
    """The text of one row. Raises UserError, naming the `place` as `_parsed` does."""
    if not isinstance(row, dict) or column not in row:
        raise UserError(f"{_name(*place)}: expected an object with a key {column!r}; --column NAME takes another")
    if not isinstance(row[column], str | None):
        raise UserError(f"{_name(*place)}: {column!r} is {type(row[column]).__name__}, expected a string or null")
    return row[column]


def _name(path: object, *number: object) -> str:
    return ", ".join([str(path), *([" ".join(map(str, number))] if number else [])])


def _read_csv(path: Path, column: str) -> Iterator[str | None]:
    """Fields of a csv or tsv under its header; a row of another width is refused, as where a comma is not quoted."""
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else ","
    with _open_bytes(path) as file:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            _check_names(path, column, names)
            at = names.index(column)
            for row in rows:
                if row and len(row) != len(names):
                    raise UserError(f"{path}, line {rows.line_num}: has {len(row)} fields, its header has {len(names)}")
                if row:
                    yield row[at]
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: not to be read as csv ({error})") from None


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
