"""Where documents come from: a dataset on the Hugging Face hub, local files, or the English inside Python itself.

A source is a list of named files; `fetch(i)` has the i-th on disk for as long as it is needed.
"""

import errno
import glob
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

from corpus import SUFFIX, demo_documents, one_line, stdlib_files, text_bytes
from errors import UserError

HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+?))?/*")
HUB_TEXT_RATIO = 1.6  # bytes of text per byte of FineWeb's zstd parquet files, their other columns included
DEMO_TEXT_BYTES = 2_100_000


class SourceFile(NamedTuple):
    """One file of a source: its name, its size on disk and the text in it (an estimate), both in bytes."""

    name: str
    size: int
    text_bytes: int


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
        return HubFiles(words[0], scratch, revision)
    return LocalFiles(words)


def is_hub(words: list[str]) -> bool:
    """Whether --source's `words` name a dataset on the hub."""
    return len(words) == 1 and words[0].startswith("hf://")


class LocalFiles:
    """Parquet, jsonl and txt files; a folder stands for all of them in it, sorted by name."""

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
            found = sorted(p for p in path.rglob("*") if p.is_file() and SUFFIX.search(p.name) and p.name[0] != ".")
        else:
            found = [path] if path.is_file() else sorted(p for p in map(Path, glob.glob(word, recursive=True)) if p.is_file())
        if not found:
            raise UserError(
                f"--source {word}: no such file, and no folder or pattern with .parquet, .jsonl[.gz|.zst] or .txt[.gz|.zst] "
                "files in it; a dataset on the hub is hf://datasets/OWNER/NAME/FOLDER"
            )
        for path in found:
            if not SUFFIX.search(path.name):
                raise UserError(f"{path}: its name must end in .parquet, .jsonl[.gz|.zst] or .txt[.gz|.zst]")
        return found


class HubFiles:
    """Parquet files in a folder of a dataset repository on the hub: hf://datasets/OWNER/NAME[@REVISION][/FOLDER].

    A file in the user's cache (HF_HOME) is read there and stays there; any other is downloaded, one at a time.
    """

    def __init__(self, url: str, scratch: Path, revision: str | None = None) -> None:
        match = HUB.fullmatch(url)
        if not match:
            raise UserError(f"--source {url}: expected hf://datasets/OWNER/NAME[@REVISION][/FOLDER]")
        # One plain stream to disk: the xet client would buffer gigabytes in memory and keep a second copy in HF_HOME.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        self.url, self.scratch = url, scratch
        self.repo, self.folder = match["repo"], match["folder"]
        with self._explained():
            self.revision, sizes = self._list(revision or match["revision"] or "main")
        if not sizes:
            raise UserError(f"--source {url}: no parquet files there")
        self.files = [SourceFile(name, size, int(HUB_TEXT_RATIO * size)) for name, size in sorted(sizes.items())]
        self.fetch_bytes = max((f.size for f in self.files if not self._cached(f)), default=0)

    def _list(self, revision: str) -> tuple[str | None, dict[str, int]]:
        """The commit `revision` stands for and its parquet files' sizes; offline, those of the cache."""
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.hf_api import RepoFile

        if constants.HF_HUB_OFFLINE:
            wanted = f"{self.folder}/*" if self.folder else "*"
            root = Path(snapshot_download(self.repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
            found = (root / (self.folder or "")).rglob("*.parquet")
            return root.name, {p.relative_to(root).as_posix(): p.stat().st_size for p in found}
        api = HfApi()
        commit = api.repo_info(self.repo, repo_type="dataset", revision=revision).sha
        tree = api.list_repo_tree(self.repo, self.folder, recursive=True, revision=commit, repo_type="dataset")
        return commit, {f.path: f.size for f in tree if isinstance(f, RepoFile) and f.path.endswith(".parquet")}

    def _cached(self, file: SourceFile) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        for revision in (self.revision, "main"):  # data files seldom change between commits
            path = try_to_load_from_cache(self.repo, file.name, repo_type="dataset", revision=revision)
            if isinstance(path, str) and os.path.getsize(path) == file.size:
                return Path(path)
        return None

    @contextmanager
    def fetch(self, index: int) -> Iterator[Path]:
        """The file in the user's cache, or a download that is removed afterwards; a broken download is continued."""
        from huggingface_hub import hf_hub_download

        file = self.files[index]
        if cached := self._cached(file):
            yield cached
            return
        with self._explained():
            path = hf_hub_download(self.repo, file.name, repo_type="dataset", revision=self.revision, local_dir=self.scratch)
        try:
            yield Path(path)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # offline, a proxy, 401, 404, a broken download: each raises its own kind
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise UserError(f"{self.scratch}: {os.strerror(error.errno)}") from None
            raise UserError(
                f"{self.url}: {one_line(error)} - for a gated dataset set HF_TOKEN, for a mirror HF_ENDPOINT, to use what "
                "HF_HOME has cached HF_HUB_OFFLINE=1; or give --source local files"
            ) from None


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
