"""A dataset repository on loopback that speaks as the hub does, and on demand breaks as it may; and what its shards must be."""

import hashlib
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ends_with_the_test, run_command

from text.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "c" * 40  # the commit of the branch into which the hub converts other formats
REPO, FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"

# ---- the command and its result


def reference_shards(documents, encode, eot, val_tokens, shard_tokens, limit=None):
    """What build-nanogpt's and llm.c's scripts write, said in as few words as possible."""
    stream = []
    for text in documents:
        stream += [eot, *encode(text)] if text else []
    stream = stream[:limit]
    shards = [stream[:val_tokens]]
    for i in range(val_tokens, len(stream), shard_tokens):
        shards.append(stream[i : i + shard_tokens])
    return shards


def gpt2_reference(documents, *sizes, limit=None):
    return reference_shards(documents, load_tokenizer("gpt2")._tiktoken.encode_ordinary, 50256, *sizes, limit=limit)


def bytes_reference(documents, *sizes, limit=None):
    return reference_shards(documents, str.encode, 256, *sizes, limit=limit)


def read_shards(folder):
    """The folder's shards in the order of their numbers, read with struct alone."""
    shards = []
    for path in sorted(folder.glob("*.bin"), key=lambda p: p.stem.split("_")[1]):
        raw = path.read_bytes()
        magic, version, n = struct.unpack("<3i", raw[:12])
        assert (magic, version) == (20240520, 1)
        assert raw[12:1024] == bytes(1012)
        shards.append(list(struct.unpack(f"<{n}H", raw[1024:])))
    return shards


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_parquet(path, documents, **options):
    pq.write_table(pa.table({"id": list(range(len(documents))), "text": pa.array(documents, pa.string())}), path, **options)
    return path


def start(*args, env=None, constants=None, **options):
    """prepare_fineweb.py as a process, where asked with other `constants` of text/hub.py, to wait less."""
    script = str(ROOT / "prepare_fineweb.py")
    changed = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import text.hub; vars(text.hub).update({constants}); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    command = [sys.executable, *(["-c", changed] if constants else [script]), *map(str, args)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return ends_with_the_test(subprocess.Popen(command, env={**os.environ, **(env or {})}, **pipes, **options))


def run(*args, constants=None, **options):
    """The same to its end: exit code, stdout, stderr."""
    if not constants:
        done = run_command(ROOT / "prepare_fineweb.py", *args, **options)
        return done.returncode, done.stdout, done.stderr
    process = start(*args, constants=constants, **options)
    out, err = process.communicate()
    return process.returncode, out, err


# ---- the hub


class Fault(NamedTuple):
    """What goes wrong with a request; what is not said goes well."""

    status: int = 0  # answered instead of the file
    headers: dict[str, str] = {}  # noqa: RUF012
    cut: int | None = None  # the connection ends after so many bytes of the body,
    reset: bool = False  # by a reset
    hang: bool = False  # or not at all, but nothing more comes
    slow: bool = False  # or the rest comes at twenty bytes a second, for as long as a test may take
    length: int | None = None  # only so many bytes are sent, and Content-Length says the same
    corrupt: bool = False  # one bit of what is sent is wrong
    ignore_range: bool = False  # the whole body, whatever was asked for


class Request(NamedTuple):
    """A request for (a part of) a file or a listing: when it came, for what, from which byte on, with which token."""

    at: float
    path: str
    start: int
    token: str | None


class Hub(http.server.ThreadingHTTPServer):
    """A dataset repository as huggingface_hub's client sees it, and a record of what was asked.

    By the end of a path, `faults` has what goes wrong with the next requests for it, `always` what goes wrong with all.
    """

    daemon_threads = True

    def __init__(self, files, watched, repo=REPO):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.watched, self.downloads, self.on_disk, self.status = files, watched, [], [], None
        self.repo, self.converted = repo, {}  # files of the conversion
        self.tokens, self.head = set(), COMMIT
        self.checksums, self.cdn = True, None  # whether the listing has them; the host that files are redirected to
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.requests: list[Request] = []

    @property
    def env(self):
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def parquets(self):
        return sorted(name for name in self.files if name.endswith("parquet"))

    def asked(self, end: str) -> list[Request]:
        """The requests for what ends in `end`, in order."""
        return [request for request in self.requests if request.path.endswith(end)]

    def handle_error(self, *_: Any) -> None:
        """A client that has gone, killed or tired of waiting, is no error here."""


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        self.sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(body=True)

    def answer(self, body):
        hub, (path, _, query) = self.server, self.path.partition("?")
        hub.tokens.add(self.headers.get("Authorization"))
        start = int((re.match(r"bytes=(\d+)-$", self.headers.get("Range", "")) or [0, 0])[1])
        fault = self.fault(Request(time.monotonic(), path, start, self.headers.get("Authorization"))) if body else Fault()
        if hub.status:
            return self.reply(hub.status, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if fault.status:
            return self.reply(fault.status, b"{}", fault.headers, body)
        commits = {"main": hub.head, "refs/convert/parquet": CONVERTED, COMMIT: COMMIT, CONVERTED: CONVERTED}
        api = re.fullmatch(f"/api/datasets/{hub.repo}/(revision|tree|paths-info)/([^/]+)/?(.*)", path)
        if api and (commit := commits.get(unquote(api[2]))):
            files = {COMMIT: hub.files, CONVERTED: hub.converted}.get(commit, {})
            if api[1] == "revision":
                answer = {"id": hub.repo, "sha": commit, "siblings": []}
            elif api[1] == "paths-info":
                asked = parse_qs(self.sent)["paths"]
                answer = [entry(name, files[name], hub.checksums) for name in asked if name in files]
            elif api[3] and not any(name.startswith(f"{unquote(api[3])}/") for name in files):
                return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
            else:
                answer = listing(files, unquote(api[3]), "recursive=true" in query.lower(), hub.checksums)
            return self.reply(200, json.dumps(answer).encode(), {}, body, fault)
        commit, name = COMMIT, path.removeprefix("/cdn/")
        if match := re.fullmatch(f"/datasets/{hub.repo}/resolve/([^/]+)/(.+)", path):
            commit, name = commits.get(unquote(match[1])), unquote(match[2])
        files = {COMMIT: hub.files, CONVERTED: hub.converted}.get(commit, {})
        if name not in files:
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
        data, start = files[name], 0 if fault.ignore_range else start
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if hub.cdn and not path.startswith("/cdn/"):
            to = {"Location": f"http://{hub.cdn}:{hub.server_port}/cdn/{name}?signature=x", "X-Linked-Size": str(len(data))}
            return self.reply(302, b"", headers | to, body)
        if body:
            hub.downloads.append(name)
            hub.on_disk.append(sorted(p.name for p in hub.watched.rglob("*.parquet")))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(206 if start else 200, data[start:], headers, body, fault)

    def fault(self, request: Request) -> Fault:
        """Note the request, and find what is to go wrong with it."""
        hub, path = self.server, request.path
        hub.requests.append(request)
        for end, faults in hub.faults.items():
            if path.endswith(end) and faults:
                return faults.pop(0)
        return next((fault for end, fault in hub.always.items() if path.endswith(end)), Fault())

    def reply(self, status, data, headers, body, fault=Fault()):  # noqa: B008
        data = data[: fault.length]
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if fault.corrupt:
            data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        if body:
            self.wfile.write(data[: fault.cut])
        for byte in data[fault.cut :] if fault.slow else ():
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)
        if fault.hang:
            self.rfile.read(1)  # until the client leaves
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


def entry(path, data, checksums=True):
    """A file in the hub's listing; all but text lies in its large file storage."""
    blob = {
        "type": "file",
        "path": path,
        "size": len(data),
        "oid": hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest(),
    }
    large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return blob | ({"lfs": large} if checksums and not path.endswith((".md", ".json", ".txt")) else {})


def listing(files, folder, recursive, checksums):
    """What lies in a folder; the folders in it, too."""
    below = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
    skip = len(folder) + 1 if folder else 0
    folders = {name[:i] for name in below for i, letter in enumerate(name) if letter == "/" and i > skip}
    found = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
    found += [entry(name, data, checksums) for name, data in below.items()]
    return [one for one in found if recursive or "/" not in one["path"][skip:]]


@contextmanager
def serving(folder: Path, *documents: list[str]) -> Iterator[Hub]:
    """A hub with one parquet file per list of documents and a README; its listing is not in the order of the names."""
    files = {}
    for i in (2, 0, 1):
        files[f"{FOLDER}/00{i}_00000.parquet"] = write_parquet(folder / "upload.parquet", documents[i]).read_bytes()
    files[f"{FOLDER}/README.md"] = b"no documents"
    with serving_files(files, folder / "data") as server:
        yield server


@contextmanager
def serving_files(files: dict[str, bytes], watched: Path, repo: str = REPO) -> Iterator[Hub]:
    """A hub with these files in the dataset `repo`."""
    with Hub(files, watched, repo) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def hub_reference(hub, *sizes):
    tables = [pq.read_table(pa.BufferReader(hub.files[name])) for name in hub.parquets]
    return bytes_reference([text for table in tables for text in table["text"].to_pylist()], *sizes)
