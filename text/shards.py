"""Token shards on disk: their format, their manifest, and the checks a reader makes. text/shard_writer.py writes them.

A shard is llm.c's: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then uint16
tokens. build-nanogpt's `.npy` shards are read too. A folder of shards holds `*val*` and `*train*` files, taken in
the order of their names, and usually a `manifest.json`.
"""

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from core.errors import UserError

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MANIFEST = "manifest.json"
SHARD_SUFFIXES = (".bin", ".npy")


def _plain(name: str) -> str:
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, pydantic.AfterValidator(_plain)]  # cannot lead out of its folder


class ShardEntry(BaseModel):
    """A shard as manifest.json lists it."""

    model_config = ConfigDict(extra="allow", strict=True)

    file: FileName
    split: Literal["train", "val"]
    tokens: PositiveInt
    documents: NonNegativeInt = 0
    sha256: str


class Manifest(BaseModel):
    """What readers need of manifest.json; prepare_fineweb.py writes more into it."""

    model_config = ConfigDict(extra="allow", strict=True)

    tokenizer: str
    n_vocab: PositiveInt
    tokens: NonNegativeInt = 0
    documents: NonNegativeInt = 0
    shards: list[ShardEntry]


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens, (n,) uint16, without reading them.

    Raises UserError, naming the file, for a wrong magic, version, type or size, or no tokens.
    """
    path = Path(path)
    try:
        return _open_npy(path) if path.suffix == ".npy" else _open_bin(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def is_headerless(path: Path) -> bool:
    """Whether the file is nanoGPT's train.bin or val.bin by its name, and holds uint16 ids from its first byte on."""
    if path.name not in ("train.bin", "val.bin") or not path.is_file():
        return False
    size, first = path.stat().st_size, np.fromfile(path, dtype="<i4", count=1)
    return size > 0 and size % 2 == 0 and not (first.size and first[0] == MAGIC)


def _open_bin(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if is_headerless(path):
        raise UserError(
            f"{path}: token ids without a header, as nanoGPT writes them; `python prepare_fineweb.py --pretokenized "
            f"{path.parent} --out FOLDER` makes shards of them"
        )
    if size < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes, shorter than a shard's {HEADER_BYTES}-byte header; prepare the data again")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, n_tokens = (int(x) for x in header[:3])
    if magic != MAGIC:
        raise UserError(f"{path}: not a token shard (magic {magic}, expected {MAGIC})")
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, this code reads version {VERSION}")
    if size != HEADER_BYTES + 2 * n_tokens:
        raise UserError(
            f"{path}: {size} bytes, but its header promises {n_tokens} tokens = {HEADER_BYTES + 2 * n_tokens} bytes; "
            "the file is truncated or damaged, prepare the data again"
        )
    if n_tokens == 0:
        raise UserError(f"{path}: holds no tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))


def _open_npy(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd headers, refused below
            tokens: Any = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it reads no pickles and no archives
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python: SyntaxError, TokenError, OverflowError, …
        raise UserError(f"{path}: not a readable .npy shard ({error})") from None
    if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.size == 0:
        raise UserError(f"{path}: expected a one-dimensional uint16 array, found {tokens.dtype} of shape {tokens.shape}")
    size, promised = path.stat().st_size, tokens.offset + tokens.nbytes
    if size != promised:
        raise UserError(f"{path}: {size} bytes, but its header promises {promised}; it is damaged, prepare the data again")
    return tokens


def is_of(split: str, name: str) -> bool:
    """Whether a shard of this name is one of the split's."""
    return split in name


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of `split` ("train" or "val") in `folder`, in the order of their names.

    Raises UserError if the folder or the split is missing, or a name cannot be printed.
    """
    folder = Path(folder)
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no such data folder; {_how_to_make(folder)} makes it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    found = [path for path in paths if path.suffix in SHARD_SUFFIXES and is_of(split, path.name) and path.name[0] != "."]
    if odd := [path.name for path in found if not path.name.isprintable()]:  # no message nor state.json could name it
        raise UserError(f"{folder}: {odd[0]!r} is no name for a shard; rename it")
    if not found:
        raise UserError(f"{folder}: no *{split}*.bin or *{split}*.npy shard; {_how_to_make(folder)} makes them")
    return found


def _how_to_make(folder: Path) -> str:
    """The command; what is named after the demo is the demo's, and not the ten billion tokens of FineWeb-Edu."""
    source = "--source demo " if folder.name == "demo" else ""
    return f"`python prepare_fineweb.py {source}--out {folder}`"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`manifest.json` of a finished data folder as a dict, or None where there is none.

    Raises UserError, naming what is wrong with it.
    """
    path = Path(folder) / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes()).model_dump()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: unreadable manifest ({error.strerror}); prepare the data again") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: unreadable manifest ({first_error(error)}); prepare the data again") from None


def first_error(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong, on one line: where, and what."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg'].removeprefix('Value error, ')}"
