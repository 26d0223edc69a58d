"""Token shards as they are made: each is in its place whole or not at all. Their format is text/shards.py's."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import fsync_folder, sha256_file
from text.shards import HEADER_BYTES, HEADER_INTS, MAGIC, VERSION


def shard_header(n_tokens: int) -> bytes:
    """The 1024 bytes before the tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()


class ShardWriter:
    """Writes a shard of at most `capacity` tokens as they come; `close` makes it appear at `path`, whole.

    Memory is that of one `write`, whatever the shard's size. Raises UserError, naming the file, when the disk is full.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.path, self.capacity, self.n_tokens = Path(path), capacity, 0
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or abort()
        header = shard_header(capacity)
        self._digest = hashlib.sha256(header)
        with self._named_errors():
            self._file.write(header)

    @property
    def full(self) -> bool:
        """Whether `capacity` is reached."""
        return self.n_tokens == self.capacity

    def write(self, tokens: np.ndarray) -> int:
        """Append as many of `tokens` (n,) uint16 as there is room for; returns how many."""
        body = np.ascontiguousarray(tokens[: self.capacity - self.n_tokens], dtype="<u2")
        with self._named_errors():
            self._file.write(body.data)
        self._digest.update(body.data)
        self.n_tokens += len(body)
        return len(body)

    def close(self) -> str:
        """Put the shard in its place, safe from a power cut; returns the file's sha256."""
        with self._named_errors():
            if not self.full:
                self._file.seek(0)
                self._file.write(shard_header(self.n_tokens))
            self._file.close()
            digest = self._digest.hexdigest() if self.full else sha256_file(self._temporary)
            put_in_place(self._temporary, self.path)
        return digest

    def abort(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # closing flushes, which a full disk refuses again
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            takes, free = HEADER_BYTES + 2 * self.capacity, shutil.disk_usage(self.path.parent).free
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}); it takes {takes:,} bytes, {free:,} are free; "
                "finished shards are whole, the same command goes on after them"
            ) from None


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write uint16 `tokens` (n,) as one shard, whole or not at all; returns the file's sha256."""
    shard = ShardWriter(path, len(tokens))
    try:
        shard.write(tokens)
        return shard.close()
    except BaseException:
        shard.abort()
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to `path`, safe from a power cut."""
    with open(temporary, "rb+") as file:  # Windows syncs what is open for writing only
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


@contextmanager
def scratch_in(out: Path) -> Iterator[Path]:
    """A hidden folder in a data folder that is being made, which goes on leaving; a kill leaves it to the next start."""
    scratch = out / ".download"
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
