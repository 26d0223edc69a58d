"""The Hugging Face hub: what is asked of it is asked again where that may help, and what comes is checked.

`huggingface_hub` speaks with it and brings the files; they are compared with the size and the sha256 that the hub tells.
"""

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
from typing import Any, TypeVar

from tqdm import tqdm

from core.console import no_bar
from core.errors import UserError
from core.files import sha256_file
from text.corpus import SourceFile, one_line

T = TypeVar("T")
HUB = re.compile(
    r"(?:hf://datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<folder>.+?))?/*"
)
ATTEMPTS = 5  # before a request is given up,
FEW_ATTEMPTS = 2  # and one that huggingface_hub itself repeats five times
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds before the next: doubled each time, or longer where the hub says so


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
        configure_client()
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
def configure_client() -> None:
    """Have huggingface_hub give up on a silent hub where it would wait forever, log errors only, and show bars where we do."""
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
    of_xet = RuntimeError
    passing = (BadAnswer, httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, of_xet)
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

    def stop(self) -> None:
        """Have no thread ask the hub again."""
        self.dataset.stopped.set()

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
