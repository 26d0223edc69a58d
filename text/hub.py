"""A folder of a dataset on the Hugging Face hub: what is in it, and downloads that are checked, retried and continued."""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from tqdm import tqdm

from core.console import no_bar
from core.errors import UserError
from core.files import sha256_file
from text.corpus import one_line
from text.sources import SourceFile

T = TypeVar("T")
HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+?))?/*")
HUB_TEXT_RATIO = 1.6  # bytes of text per byte of FineWeb's zstd parquet files, their other columns included
ATTEMPTS = 5  # that may fail in a row before a request to the hub is given up
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0  # seconds before the next: doubled each time, or longer where the hub says so
PROGRESS_BYTES = 1 << 20  # a download that broke after so many new bytes starts the count of attempts anew


class BadAnswer(Exception):
    """The hub sent something else than the file that was asked for."""


class HubFiles:
    """Files of `suffixes` in a folder of a dataset repository on the hub: hf://datasets/OWNER/NAME[@REVISION][/FOLDER].

    A file of the name `beside` is among them where there is one. What is in the user's cache (HF_HOME) is read there and stays
    there; any other is downloaded into `scratch`. `option` is the flag of the command line that errors name. Several threads
    may download; `stopped` ends them soon.
    """

    def __init__(
        self,
        url: str,
        scratch: Path,
        revision: str | None = None,
        suffixes: tuple[str, ...] = (".parquet",),
        option: str = "--source",
        beside: str | None = None,
    ) -> None:
        match = HUB.fullmatch(url)
        if not match:
            raise UserError(f"{option} {url}: expected hf://datasets/OWNER/NAME[@REVISION][/FOLDER]")
        self.url, self.scratch, self.suffixes, self.option = url, scratch, suffixes, option
        self.stopped, self._wanted = threading.Event(), (*suffixes, *([f"/{beside}"] if beside else []))
        self.repo, self.folder = match["repo"], match["folder"]
        self.revision, found = self._list(revision or match["revision"] or "main")
        if not any(name.endswith(suffixes) for name, _, _ in found):
            raise UserError(f"{option} {url}: no {' or '.join(suffixes).replace('.parquet', 'parquet')} files there")
        self.files = [SourceFile(name, size, int(HUB_TEXT_RATIO * size), sha256) for name, size, sha256 in sorted(found)]
        to_come = [f.size - _size(self._part(i)) for i, f in enumerate(self.files) if not self.cached(f)]
        self.fetch_bytes = max(to_come, default=0)

    def _list(self, revision: str) -> tuple[str, list[tuple[str, int, str | None]]]:
        """The commit `revision` stands for and its files of the suffixes: name, size, sha256; offline, those of the cache."""
        from huggingface_hub import HfApi, constants, snapshot_download

        what, wanted, wait = f"revision {revision}", f"{self.folder}/*" if self.folder else "*", constants.HF_HUB_ETAG_TIMEOUT
        if constants.HF_HUB_OFFLINE:
            cached = partial(snapshot_download, self.repo, repo_type="dataset", revision=revision, allow_patterns=wanted)
            root = Path(self._retried(what, cached))
            paths = [path for path in (root / (self.folder or "")).rglob("*") if self._is_wanted(path.as_posix())]
            return root.name, [(path.relative_to(root).as_posix(), path.stat().st_size, None) for path in paths]
        info = self._retried(what, lambda: HfApi().repo_info(self.repo, repo_type="dataset", revision=revision, timeout=wait))
        commit = info.sha or revision
        tree = self._retried(f"the files of {what}", lambda: self._tree(commit))
        found = [entry for entry in tree if entry["type"] == "file" and self._is_wanted(entry["path"])]
        return commit, [(entry["path"], entry["size"], _sha256((entry.get("lfs") or {}).get("oid"))) for entry in found]

    def _is_wanted(self, path: str) -> bool:
        return f"/{path}".endswith(self._wanted)

    def _tree(self, commit: str) -> list[dict[str, Any]]:
        """What lies in the folder, as the hub tells it; HfApi.list_repo_tree would wait for a silent hub forever."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        entries: list[dict[str, Any]] = []
        folder = f"/{quote(self.folder, safe='')}" if self.folder else ""
        page: str | None = f"{constants.ENDPOINT}/api/datasets/{self.repo}/tree/{commit}{folder}?recursive=true"
        while page:
            response = get_session().get(page, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
            hf_raise_for_status(response)
            entries += response.json()
            page = response.links.get("next", {}).get("url")
        return entries

    def cached(self, file: SourceFile) -> Path | None:
        """Where the file lies in the user's cache, of the right size; its sha256 is not looked at."""
        from huggingface_hub import try_to_load_from_cache

        for revision in (self.revision, "main"):  # data files seldom change between commits
            path = try_to_load_from_cache(self.repo, file.name, repo_type="dataset", revision=revision)
            if isinstance(path, str) and os.path.getsize(path) == file.size:
                return Path(path)
        return None

    @contextmanager
    def fetch(self, index: int) -> Iterator[Path]:
        """The file in the user's cache, or a download that is removed afterwards."""
        file = self.files[index]
        if cached := self.cached(file):
            yield cached
            return
        path = self.download(index)
        try:
            yield path
        finally:  # a later file stays: it had begun to come before a kill that sent us back to this one
            shutil.rmtree(path.parent, ignore_errors=True)

    def download(self, index: int) -> Path:
        """The whole file in `scratch`, its size and the hub's sha256 checked; a broken download is continued.

        Raises UserError, leaving what has come for a later start, where the hub keeps failing or the disk is full.
        """
        file, part = self.files[index], self._part(index)
        path = part.with_suffix("")
        if difference(path, file):
            self._retried(file.name, lambda: self._download(file, part), lambda: _size(part))
            os.replace(part, path)
        return path

    def missing_bytes(self, index: int) -> int:
        """What is still to be downloaded of a file."""
        part = self._part(index)
        return self.files[index].size - max(_size(part), _size(part.with_suffix("")))

    def _part(self, index: int) -> Path:
        """Where a download comes in; its folder is named after the content, for another revision may have other files."""
        file = self.files[index]
        return self.scratch / (file.sha256 or f"{self.revision}-{index}") / (Path(file.name).name + ".part")

    def _download(self, file: SourceFile, part: Path) -> None:
        """Bring `part`, which may hold the file's beginning, to its end. Raises BadAnswer, without `part`, if it is wrong.

        hf_hub_download would begin anew after a kill and take any bytes of the right number.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        have = _size(part) if file.sha256 else 0  # without a checksum nothing vouches for the beginning
        if have < file.size or not have:
            url = hf_hub_url(self.repo, file.name, repo_type="dataset", revision=self.revision)
            headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            bar = tqdm(total=file.size, initial=have, desc=file.name, unit="B", unit_scale=True, disable=no_bar(), leave=False)
            with bar, get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
                hf_raise_for_status(response)
                continued = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                part.parent.mkdir(parents=True, exist_ok=True)
                with open(part, "ab" if continued else "wb") as out:
                    for chunk in response.iter_bytes():
                        bar.update(out.write(chunk))
                        if self.stopped.is_set():
                            raise UserError(f"{file.name}: stopped")
        if wrong := difference(part, file):
            part.unlink(missing_ok=True)
            raise BadAnswer(wrong)

    def _retried(self, what: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """What `attempt` returns; after a failure that may pass it is made again, a little later each time.

        `progress` counts the bytes that attempts have brought. Raises UserError.
        """
        failures, most = 0, progress()
        while True:
            try:
                return attempt()
            except UserError:
                raise
            except Exception as error:  # offline, a proxy, 401, 404, a broken download: each raises its own kind
                if isinstance(error, OSError) and error.errno:  # not the hub's: the disk is full, HF_HOME unreadable
                    raise UserError(f"{error.filename or self.scratch}: {error.strerror}") from None
                failures = 1 if progress() >= most + PROGRESS_BYTES else failures + 1
                most = max(most, progress())
                reason, wait = _failure(error, failures)
                if wait is None or failures == ATTEMPTS:
                    tried = f", in {ATTEMPTS} attempts; start the same command again later to go on" if wait else ""
                    raise UserError(
                        f"{self.url}: {what}: {reason}{tried} - for a gated dataset set HF_TOKEN, for a mirror HF_ENDPOINT, to "
                        f"use what HF_HOME has cached HF_HUB_OFFLINE=1; or give {self.option} local files"
                    ) from None
            tqdm.write(f"{what}: {reason}; attempt {failures + 1} of {ATTEMPTS} in {wait:g} s", file=sys.stderr)
            if self.stopped.wait(wait):
                raise UserError(f"{what}: stopped")


def _sha256(text: str | None) -> str | None:
    """`text` where it is a sha256, else None: the hub's word becomes the name of a folder."""
    return text if text and re.fullmatch(r"[0-9a-f]{64}", text) else None


def _size(path: Path) -> int:
    """Bytes in a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def difference(path: Path, file: SourceFile) -> str | None:
    """What tells `path` from the hub's file, None if nothing does."""
    if _size(path) != file.size or not path.exists():
        return f"{_size(path):,} bytes came instead of {file.size:,}"
    if file.sha256 and sha256_file(path) != file.sha256:
        return "the bytes that came do not have the hub's sha256"
    return None


def _failure(error: Exception, failures: int) -> tuple[str, float | None]:
    """Why a request failed, and in how many seconds another may do better; None where none will: 401, 404, offline."""
    import httpx2  # what huggingface_hub speaks HTTP with
    from huggingface_hub.utils import HfHubHTTPError, parse_ratelimit_headers

    wait = FIRST_WAIT * 2 ** (failures - 1)
    if isinstance(error, HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
        if status not in (408, 429) and status < 500:
            return one_line(error), None
        limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
        asked = int(after) if after.isdigit() else limit.reset_in_seconds + 1 if limit and not limit.remaining else 0
        return f"HTTP {status} {error.response.reason_phrase}", min(max(wait, asked), LONGEST_WAIT)
    if isinstance(error, json.JSONDecodeError):
        return "the answer is not JSON", wait
    passing = (BadAnswer, httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    return one_line(error), wait if isinstance(error, passing) else None
