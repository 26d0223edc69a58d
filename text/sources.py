"""Where documents come from: a dataset on the Hugging Face hub, local files, or the English inside Python itself.

A source is a list of named files; `fetch(i)` has the i-th on disk for as long as it is needed.
"""

import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

from core.console import given_path
from core.errors import UserError
from text.corpus import SUFFIX, demo_documents, stdlib_files, text_bytes

DEMO_TEXT_BYTES = 2_100_000
TRASH = {"$RECYCLE.BIN", "lost+found", "__MACOSX", "@eaDir"}  # those of Unix begin with a dot


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


def open_source(words: list[str], scratch: Path, revision: str | None = None) -> Source:
    """The source that --source's `words` name; fetched files lie in `scratch`, hub files are those of `revision`.

    Raises UserError for a missing, empty or unreadable source; nothing is written yet.
    """
    if words == ["demo"]:
        return DemoCorpus(scratch)
    if is_hub(words):
        from text.hub import HubFiles

        return HubFiles(words[0], scratch, revision)
    return LocalFiles(words)


def is_hub(words: list[str]) -> bool:
    """Whether --source's `words` name a dataset on the hub."""
    return len(words) == 1 and words[0].startswith("hf://")


class LocalFiles:
    """Parquet, jsonl and txt files; a folder stands for all of them in it and in what it links to, sorted by name."""

    revision, fetch_bytes = None, 0

    def __init__(self, words: list[str]) -> None:
        self.paths = [path for word in words for path in self._find(word)]
        self.files = [SourceFile(str(path), path.stat().st_size, text_bytes(path)) for path in self.paths]

    def fetch(self, index: int) -> AbstractContextManager[Path]:
        """The file as it lies."""
        return nullcontext(self.paths[index])

    @staticmethod
    def _find(word: str) -> list[Path]:
        path = Path(word)
        if path.is_dir():
            found = sorted(texts_below(path, {}))
        elif os.path.lexists(path):
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(word, recursive=True)) if not p.is_dir())
        if not found:
            raise UserError(
                f"--source {word}: no such file, and no folder or pattern with .parquet, .jsonl[.gz|.zst] or .txt[.gz|.zst] "
                "files in it; a dataset on the hub is hf://datasets/OWNER/NAME/FOLDER"
            )
        for path in found:
            given_path(str(path))
            if not path.is_file():
                what = "not a file" if path.exists() else "a link to what is not there"
                raise UserError(f"{path}: {what}; mend it or take it away")
            if not SUFFIX.search(path.name):
                raise UserError(f"{path}: its name must end in .parquet, .jsonl[.gz|.zst] or .txt[.gz|.zst]")
        return found


def texts_below(folder: Path, above: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """What is named as text in a folder and, links followed, in those below it; what is hidden, or thrown away, is passed over.

    `above` are the folders on the way here. Raises UserError for a link back to one of them, and for what cannot be read.
    """
    try:
        here, entries = folder.stat(), list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    key = (here.st_dev, here.st_ino)
    if key in above:
        raise UserError(f"{folder}: a link back to {above[key]}, which would be read for ever; take it away")
    for entry in entries:
        if entry.name[0] == "." or entry.name in TRASH:
            continue
        if entry.is_dir():
            yield from texts_below(folder / entry.name, above | {key: folder})
        elif SUFFIX.search(entry.name) or not (folder / entry.name).exists():  # what a link leads to may have been text
            yield folder / entry.name


class DemoCorpus:
    """The English that ships with every Python, as one jsonl file: see `demo_documents`."""

    revision = None

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        size = sum(path.stat().st_size for path in stdlib_files())
        self.fetch_bytes = DEMO_TEXT_BYTES
        self.files = [SourceFile(f"python-{platform.python_version()}.jsonl", size, DEMO_TEXT_BYTES)]

    @contextmanager
    def fetch(self, index: int) -> Iterator[Path]:
        """The corpus gathered into a temporary file."""
        path = self.scratch / self.files[index].name
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo_documents()))
            yield path
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
