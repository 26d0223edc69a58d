"""Files of a dataset on the Hugging Face hub: which they are, and downloads that are checked and tried again.

`datasets` says which files a name, a config and a split stand for, `huggingface_hub` brings them. What comes is compared with
the size and the sha256 that the hub tells.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from tqdm import tqdm

from core.console import no_bar
from core.errors import UserError
from core.files import sha256_file
from text.corpus import COMPRESSED, COMPRESSED_TEXT_RATIO, SUFFIXES, SourceFile, is_text, one_line

T = TypeVar("T")
HUB = re.compile(
    r"(?:hf://datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<folder>.+?))?/*"
)
CONVERTED = "refs/convert/parquet"  # the branch into which the hub converts datasets of other formats
PARQUET_TEXT_RATIO = 1.6  # bytes of text per byte of FineWeb's zstd parquet files, their other columns included
ATTEMPTS = 5  # before a request is given up,
ATTEMPTS_OF_FIVE = 2  # and one within which huggingface_hub itself tries five times
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds before the next: doubled each time, or longer where the hub says so
PATHS_AT_A_TIME = 500  # that are asked for
NO_NAMES = '<>:"|?*\\'  # of files, on Windows, and for huggingface_hub


class BadAnswer(Exception):
    """The hub sent something else than the file that was asked for."""


class Dataset:
    """A dataset repository, or a folder of it; errors call it `where`, as `option` of the command line named it.

    `stopped` ends what other threads ask for.
    """

    def __init__(self, where: str, option: str, name: str, revision: str | None, folder: str | None = None) -> None:
        self.where, self.option, self.name, self.revision, self.folder = where, option, name, revision or "main", folder
        self.stopped = threading.Event()

    @classmethod
    def at(cls, where: str, option: str = "--source", revision: str | None = None) -> "Dataset":
        """[hf://datasets/]OWNER/NAME[@REVISION][/FOLDER]; `revision` goes before its own. Raises UserError."""
        if not (match := HUB.fullmatch(where)):
            raise UserError(f"{option} {where}: expected hf://datasets/OWNER/NAME[@REVISION][/FOLDER] or OWNER/NAME[@REVISION]")
        return cls(where, option, match["name"], revision or match["revision"], match["folder"])

    def ask(self, what: str, request: Callable[[], T], folder: Path | None = None, attempts: int = 0) -> T:
        """What `request` returns; after a failure that may pass it is made again, a little later each time.

        Raises UserError, naming `what`, or the `folder` that is written to where the disk is the fault.
        """
        be_quick_and_quiet()
        attempts = attempts or ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                return request()
            except UserError:
                raise
            except Exception as error:  # offline, a proxy, 401, 404, a broken download: each raises its own kind
                if isinstance(error, OSError) and error.errno:  # not the hub's: the disk is full, HF_HOME unreadable
                    raise UserError(f"{error.filename or folder or what}: {error.strerror}") from None
                reason, wait = failure(error, attempt)
            if wait is None or attempt == attempts:
                tried = f", in {attempts} attempts; start the same command again later to go on" if wait else ""
                raise UserError(
                    f"{self.where}: {what}: {reason}{tried} - for a gated dataset set HF_TOKEN, for a mirror HF_ENDPOINT, to "
                    f"use what HF_HOME has cached HF_HUB_OFFLINE=1; or give {self.option} local files"
                )
            tqdm.write(f"{what}: {reason}; attempt {attempt + 1} of {attempts} in {wait:g} s", file=sys.stderr)
            if self.stopped.wait(wait):
                break
        raise UserError(f"{what}: stopped")


@functools.cache
def be_quick_and_quiet() -> None:
    """Have huggingface_hub give up a silent hub also where it would wait for ever; its bars and warnings are where ours are."""
    from huggingface_hub import constants, get_session, set_client_factory
    from huggingface_hub.utils import disable_progress_bars, httpx, logging

    logging.set_verbosity_error()

    def limit(request: Any) -> None:  # httpx.Request
        if not any(request.extensions.get("timeout", {}).values()):
            request.extensions["timeout"] = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT).as_dict()

    hooks = {"request": [*get_session().event_hooks["request"], limit]}
    set_client_factory(lambda: httpx.Client(event_hooks=hooks, follow_redirects=True))
    if no_bar():
        disable_progress_bars()


def failure(error: BaseException, attempt: int) -> tuple[str, float | None]:
    """Why a request failed, and in how many seconds another may do better; None where none will: 401, 404, offline."""
    from huggingface_hub.utils import HfHubHTTPError, httpx, parse_ratelimit_headers

    wait = FIRST_WAIT * 2 ** (attempt - 1)
    passing = (
        BadAnswer,
        httpx.TimeoutException,
        httpx.NetworkError,
        httpx.RemoteProtocolError,
        RuntimeError,
    )  # the last: Xet's
    cause: BaseException | None = error  # `datasets` and huggingface_hub raise their own from it
    while cause is not None:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status, headers = cause.response.status_code, cause.response.headers
            if status not in (408, 429) and status < 500:
                return one_line(cause), None
            limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
            asked = int(after) if after.isdigit() else limit.reset_in_seconds + 1 if limit and not limit.remaining else 0
            return f"HTTP {status} {cause.response.reason_phrase}", min(max(wait, asked), LONGEST_WAIT)
        if isinstance(cause, json.JSONDecodeError):
            return "the answer is not JSON", wait
        if isinstance(cause, passing):
            return one_line(cause), wait
        cause = cause.__cause__
    return one_line(error), wait if type(error) is OSError else None  # huggingface_hub: another length than was promised


def files_in_folder(dataset: Dataset, wanted: Callable[[str], bool]) -> tuple[str, list[SourceFile]]:
    """The commit of a dataset's revision, and the files in its folder whose names are `wanted`, sorted by name.

    Offline they are those of the cache. Raises UserError.
    """
    from huggingface_hub import HfApi, RepoFile, constants, snapshot_download

    what, kind = f"revision {dataset.revision}", {"repo_type": "dataset"}
    if constants.HF_HUB_OFFLINE:
        below = f"{dataset.folder}/*" if dataset.folder else "*"
        cached = partial(snapshot_download, dataset.name, revision=dataset.revision, allow_patterns=below, **kind)
        root = Path(dataset.ask(what, cached))
        paths = [path for path in (root / (dataset.folder or "")).rglob("*") if wanted(path.name)]
        return root.name, sorted(source_file(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths)
    commit = dataset.ask(what, partial(HfApi().repo_info, dataset.name, revision=dataset.revision, **kind)).sha
    ask_tree = partial(HfApi().list_repo_tree, dataset.name, dataset.folder, recursive=True, revision=commit, **kind)
    tree = dataset.ask(f"the files of {what}", lambda: list(ask_tree()), attempts=ATTEMPTS_OF_FIVE)
    return commit, sorted(file_of(entry) for entry in tree if isinstance(entry, RepoFile) and wanted(Path(entry.path).name))


def files_named(dataset: Dataset, commit: str, names: list[str]) -> list[SourceFile]:
    """The files of these names, in this order, as they are at `commit`. Raises UserError where one is not there."""
    from huggingface_hub import HfApi, RepoFile

    found: dict[str, SourceFile] = {}
    for i in range(0, len(names), PATHS_AT_A_TIME):
        paths = names[i : i + PATHS_AT_A_TIME]
        ask_paths = partial(HfApi().get_paths_info, dataset.name, paths, revision=commit, repo_type="dataset")
        entries = dataset.ask(f"the sizes of {len(names)} files", ask_paths)
        found |= {entry.path: file_of(entry) for entry in entries if isinstance(entry, RepoFile)}
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{dataset.where}: {missing[0]}: is not there at {commit}")
    return [found[name] for name in names]


def files_of_split(dataset: Dataset, config: str | None, split: str) -> tuple[str, list[SourceFile]]:
    """The commit and the files that `datasets` takes for a split of a dataset, in its order. Raises UserError.

    Where a script of the dataset says which they are, those into which the hub has converted it.
    """
    what = "no file or folder here has this name, and as a dataset on the hub"
    files = dataset.ask(what, partial(_data_files, dataset, config), attempts=ATTEMPTS_OF_FIVE)
    if files is None:
        return converted_files(dataset, config, split)
    if split not in files:
        raise UserError(f"{dataset.option} {dataset.where}: has no split {split!r}; --split takes one of {', '.join(files)}")
    commits, names = set(), []
    for url in files[split]:
        if not (match := re.fullmatch(rf"hf://datasets/{dataset.name}@([0-9a-f]{{40}})/(.+)", url)):
            raise UserError(f"{dataset.where}: its file {url} lies elsewhere; fetch it and give {dataset.option} local files")
        if not is_text(match[2]):
            raise UserError(f"{dataset.where}: {match[2]}: its name does not end in {SUFFIXES}")
        commits.add(match[1])
        names.append(match[2])
    (commit,) = commits
    return commit, files_named(dataset, commit, names)


def _data_files(dataset: Dataset, config: str | None) -> dict[str, list[str]] | None:
    """Addresses of the files of each split; None where a script would say it.

    Raises UserError for an unknown config, or one with options of a reader (a csv without a header, say), which are not ours.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    revision = None if dataset.revision == "main" else dataset.revision
    with TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(f"hf://datasets/{dataset.name}", config, revision=revision, cache_dir=cache)
        except (ValueError, RuntimeError) as error:
            if "scripts are no longer supported" in str(error):
                return None
            if not re.match("BuilderConfig|Config name", str(error)):
                raise
            said = one_line(error).partition(" Example of usage")[0]
            raise UserError(f"{dataset.option} {dataset.where}: {said}; --config takes one") from None
    of_all = {field.name for field in dataclasses.fields(datasets.BuilderConfig)} | {"features", "columns", "batch_size"}
    usual = type(builder.config)()
    options = {name: value for name, value in vars(builder.config).items() if name not in of_all and value != vars(usual)[name]}
    files = {str(split): [str(file) for file in some] for split, some in (builder.config.data_files or {}).items()}
    if options == {"sep": "\t"} and all(".tsv" in Path(file).suffixes[-2:] for some in files.values() for file in some):
        options = {}
    if options:
        said = ", ".join(f"{name} = {value!r}" for name, value in options.items())
        raise UserError(
            f"{dataset.where}: its files are to be read with {said}, which is not possible here; fetch and convert them"
        )
    return files


def converted_files(dataset: Dataset, config: str | None, split: str) -> tuple[str, list[SourceFile]]:
    """The commit and the parquet files into which the hub has converted a split: CONFIG/SPLIT/*.parquet. Raises UserError."""
    if dataset.revision != "main":
        raise UserError(
            f"{dataset.where}: a script says which files it has, and the hub has converted its newest revision only; leave out "
            f"@{dataset.revision}, or give {dataset.option} local files"
        )
    branch = Dataset(dataset.where, dataset.option, dataset.name, CONVERTED)
    commit, files = files_in_folder(branch, lambda name: name.endswith(".parquet"))
    splits: dict[tuple[str, str], list[SourceFile]] = {}
    for file in files:
        folder, _, rest = file.name.partition("/")
        splits.setdefault((folder, rest.rpartition("/")[0]), []).append(file)
    configs = sorted({folder for folder, _ in splits})
    chosen = config or (configs[0] if len(configs) == 1 else "")
    if (chosen, split) in splits:
        return commit, splits[chosen, split]
    part = f"hf://datasets/{dataset.name}@{CONVERTED}/{chosen}/partial-{split}"
    if (chosen, f"partial-{split}") in splits:
        raise UserError(f"{dataset.where}: the hub has converted only the beginning of it; {dataset.option} {part} takes that")
    if not splits:
        raise UserError(f"{dataset.where}: a script says which files it has, and the hub has not converted them")
    have = ", ".join(" ".join(key) for key in sorted(splits))
    raise UserError(f"{dataset.where}: no such config and split; --config and --split take one of {have}")


def file_of(entry: Any) -> SourceFile:  # huggingface_hub.RepoFile
    """A file as the hub tells it."""
    return source_file(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, None if entry.lfs else entry.blob_id)


def source_file(name: str, size: int, sha256: str | None = None, git_sha1: str | None = None) -> SourceFile:
    """A file of this name and size. Raises UserError for a name that would lead out of a folder, or is none everywhere."""
    if ".." in Path(name).parts or not name.isprintable() or set(name) & set(NO_NAMES):
        raise UserError(f"{name!r}: a file of this name cannot be fetched; rename it, or give local files")
    suffix = Path(name).suffix
    ratio = PARQUET_TEXT_RATIO if suffix == ".parquet" else COMPRESSED_TEXT_RATIO if suffix in COMPRESSED else 1
    return SourceFile(name, size, int(ratio * size), sha256, git_sha1)


class HubFiles:
    """Files of a dataset at a commit, in the order of the token stream.

    What is in the user's cache (HF_HOME) is read there and stays there; any other is downloaded into `scratch`.
    """

    def __init__(self, dataset: Dataset, commit: str, files: list[SourceFile], scratch: Path) -> None:
        self.dataset, self.revision, self.files, self.scratch = dataset, commit, files, scratch
        self.fetch_bytes = max((file.size for file in files if not self.cached(file)), default=0)

    def cached(self, file: SourceFile) -> Path | None:
        """Where the file lies in the user's cache, of the right size; its sha256 is not computed.

        That of another commit is taken where the cache names its content by the same sha256: data files seldom change.
        """
        from huggingface_hub import constants

        for commit in Path(constants.HF_HUB_CACHE, f"datasets--{self.dataset.name.replace('/', '--')}", "snapshots").glob("*"):
            found = commit / file.name
            same = found.is_file() and found.stat().st_size == file.size
            if same and (commit.name == self.revision or found.resolve().name == file.sha256):
                return found
        return None

    @contextmanager
    def fetch(self, index: int) -> Iterator[Path]:
        """The file in the user's cache, or a download that is removed afterwards."""
        if cached := self.cached(self.files[index]):
            yield cached
            return
        path = self.download(index)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def download(self, index: int) -> Path:
        """The whole file in `scratch`, of the size and the sha256 that the hub tells. Raises UserError."""
        return self.dataset.ask(self.files[index].name, partial(self._download, self.files[index]), self.scratch)

    def _download(self, file: SourceFile) -> Path:
        from huggingface_hub import hf_hub_download

        at = {"local_dir": self.scratch, "cache_dir": self.scratch / "none"}  # what a kill left whole is taken from scratch
        path = Path(hf_hub_download(self.dataset.name, file.name, repo_type="dataset", revision=self.revision, **at))
        if wrong := difference(path, file):
            path.unlink()
            raise BadAnswer(wrong)
        return path


def difference(path: Path, file: SourceFile) -> str | None:
    """What tells `path` from the hub's file, None if nothing does."""
    if (size := path.stat().st_size) != file.size:
        return f"{size:,} bytes came instead of {file.size:,}"
    if file.sha256 and sha256_file(path) != file.sha256:
        return "the bytes that came do not have the hub's sha256"
    if file.git_sha1:  # of a small file
        raw = path.read_bytes()
        if hashlib.sha1(b"blob %d\0%b" % (len(raw), raw), usedforsecurity=False).hexdigest() != file.git_sha1:
            return "the bytes that came do not have the hub's sha1"
    return None
