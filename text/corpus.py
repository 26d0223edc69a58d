"""Documents out of parquet, jsonl and txt files with bounded memory, and the embedded corpus of the demo.

A long document comes in pieces that encode to the same tokens as the whole, so that neither memory nor the number of
workers is bound to the size of a document.
"""

import ast
import hashlib
import io
import json
import os
import re
import sysconfig
import tokenize
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import UserError

PIECE_CHARS = 1 << 18  # longer documents are cut
PARQUET_BATCH_BYTES = 4 << 20  # text decoded at a time, where documents are of one length,
PARQUET_BATCH_ROWS = 32  # and documents, for where a few are a thousand times as long as the others
COMPRESSED_TEXT_RATIO = 3.0  # bytes of text per byte of English in gzip or zstd
SUFFIX = re.compile(r"\.(parquet|jsonl|txt)((?<!parquet)(?:\.gz|\.zst))?$")
SAFE_CUT = re.compile(r"\S(?=[ \n])")


class Piece(NamedTuple):
    """A document, or a part of a long one; `text` is None for a null document, `first` marks a document's beginning."""

    text: str | None
    first: bool


def read_pieces(path: Path) -> Generator[Piece, None, None]:
    """The documents of a local file, in order, in pieces. Raises UserError naming the file, and the line in a jsonl."""
    kind = SUFFIX.search(path.name)
    if kind and kind[1] == "txt":
        yield from cut(_read_txt(path))
        return
    for text in _read_parquet(path) if kind and kind[1] == "parquet" else _read_jsonl(path):
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


def open_parquet(path: Path) -> Any:  # -> pyarrow.parquet.ParquetFile
    """Open a parquet file that has a column `text` of strings; raises UserError naming the file for any other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # a row group's pages are read one by one
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)})") from None
    schema = file.schema_arrow
    if (count := schema.names.count("text")) != 1:
        names = ", ".join(schema.names)
        raise UserError(f"{path}: has {f'{count} columns' if count else 'no column'} 'text'; its columns are {names}")
    kind = stored = schema.field("text").type
    if pa.types.is_dictionary(kind):
        stored = kind.value_type
    if not (pa.types.is_string(stored) or pa.types.is_large_string(stored) or pa.types.is_string_view(stored)):
        raise UserError(f"{path}: its column 'text' holds {kind}, expected string")
    return file


def text_bytes(path: Path) -> int:
    """Bytes of text in a local file, estimated; for parquet from its metadata. Raises UserError if it is unreadable."""
    if path.suffix == ".parquet":
        with open_parquet(path) as file:
            return sum(_row_group_bytes(file))
    return int(path.stat().st_size * (COMPRESSED_TEXT_RATIO if path.suffix in (".gz", ".zst") else 1))


def _row_group_bytes(file: Any) -> list[int]:
    """Uncompressed bytes of the column `text` in each row group."""
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return [column.total_uncompressed_size for column in columns if column.path_in_schema == "text"]


def _read_parquet(path: Path) -> Iterator[str | None]:
    import pyarrow as pa

    with open_parquet(path) as file:
        row_bytes = sum(_row_group_bytes(file)) // max(1, file.metadata.num_rows) + 1
        rows = min(PARQUET_BATCH_ROWS, max(1, PARQUET_BATCH_BYTES // row_bytes))
        try:
            for batch in file.iter_batches(batch_size=rows, columns=["text"], use_threads=False):
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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


def _read_jsonl(path: Path) -> Iterator[str | None]:
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({one_line(error)})") from None
            if not isinstance(row, dict) or "text" not in row:
                raise UserError(f"{path}, line {number}: expected an object with a key 'text'")
            if not isinstance(row["text"], str | None):
                raise UserError(f"{path}, line {number}: 'text' is {type(row['text']).__name__}, expected a string or null")
            yield row["text"]


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def demo_documents() -> list[str]:
    """pydoc's topics and the standard library's docstrings, one document per topic and per module.

    They are in the order of their hashes, so that validation and training are alike.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = list(topics.values())
    for path in stdlib_files():
        fresh = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen and len(text) >= 40]
        seen.update(fresh)
        documents.append("\n\n".join(fresh))
    return sorted((d for d in documents if len(d) >= 200), key=lambda d: hashlib.sha256(d.encode()).digest())


def stdlib_files() -> list[Path]:
    """The standard library's modules without its tests, code tables and what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skip
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings in a module's source, which is parsed and never imported."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):  # the standard library has a few templates that are no Python
        return
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        for field in node._fields:  # those that are no lists hold expressions
            if isinstance(children := getattr(node, field), list):
                todo.extend(child for child in children if isinstance(child, ast.stmt | ast.ExceptHandler))
