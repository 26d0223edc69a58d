"""Files that are there whole or not at all: atomic writes, checksums, and locks that die with their owner."""

import hashlib
import json
import math
import os
import shlex
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from core.console import this_command
from core.errors import UserError

ROOT = Path(__file__).parents[1]  # of this source tree
LOCK = ".lock"
LOCKED_BYTE = 2**30  # on Windows, where what is locked cannot be read: far behind the text


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbor of `path`; on success it is fsynced and renamed to `path`, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk names none
        raise


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` (a rename, a new file) survive a power cut; on Windows that is left to its journal."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def standard_json(value: Any) -> Any:
    """`value` with None for NaN and the infinities, which JSON does not have and only Python reads."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: standard_json(one) for key, one in value.items()}
    return [standard_json(one) for one in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; numbers that JSON does not have become null."""
    with atomic_write(path, "w") as file:
        json.dump(standard_json(value), file, indent=1, allow_nan=False)
        file.write("\n")


@contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Make `folder` and keep other processes out of it; on leaving, folders that were made and stayed empty go away.

    The lock is the kernel's: it ends with its owner, however that ends. The file says who the owner is.
    Raises UserError, naming the owner, where another process holds it for `patience` seconds more, or for a folder that cannot
    be made or written.
    """
    path, deadline = folder / LOCK, time.monotonic() + patience
    while True:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            opened = _open_in(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made or written ({error.strerror}); choose another folder") from None
        if opened is None:
            continue  # the folder went with its owner between our two calls
        with opened as file:
            try:
                _lock(file)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                raise UserError(
                    f"{folder}: {_owner(path)} is at work there; wait for it or stop it, or choose another folder"
                ) from None
            try:
                is_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_there = False
            if not is_there:
                continue  # its owner removed it between our open and our flock
            file.truncate(0)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            json.dump(
                {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(this_command()), "since": since}, file
            )
            file.flush()
            try:
                yield
            finally:
                with suppress(PermissionError):  # on Windows, where what is open stays
                    path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    for path_made in made:
                        path_made.rmdir()
            return


def _open_in(folder: Path) -> IO[str] | None:
    """The lock's file, made where it is not there; None where `folder` itself is not. Raises OSError."""
    try:
        return open(folder / LOCK, "a+")
    except FileNotFoundError:
        if folder.exists():
            raise
        return None


def _lock(file: IO[str]) -> None:
    """Take the file's lock. Raises BlockingIOError where another process has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError(*error.args) from None
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} (`{owner['command']}`, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has just begun
        return "another process"
