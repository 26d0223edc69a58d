"""A Weights & Biases server on loopback, as much of it as the real client asks for, and a record of what it was sent."""

import base64
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "someone"


@dataclass
class Stored:
    """A run as the server has it; its history is a list of rows, each at the place that the client gave it."""

    project: str
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None  # None while it runs

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of the table that the summary has under `key`."""
        found = json.loads(self.files[self.summary[key]["path"]])
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


@dataclass
class Artifact:
    """What is kept beside the runs; wandb makes one of every table."""

    run: str
    kind: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class Server(http.server.ThreadingHTTPServer):
    """The server: its runs by id, the operations that were asked for, and those of them that it does not know."""

    daemon_threads = True

    def __init__(self, key: str = KEY) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = key  # any other is answered with 401
        self.runs: dict[str, Stored] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.connections: list[socket.socket] = []
        self.asked: list[str] = []
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        """Take a connection, and keep it in mind."""
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def die(self) -> None:
        """Go away in the middle of everything: the client's connections end and no new ones are taken."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):  # ended before
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no error here."""


class Handler(http.server.BaseHTTPRequestHandler):
    """GraphQL, the stream of a run's history and summary, and files that are put where they were told to."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if said != f"api:{self.server.key}":
            return self.reply(401, {"errors": [{"message": "user is not logged in"}]})
        if self.path == "/graphql":
            asked = json.loads(body)
            return self.reply(200, self.graphql(asked["query"], asked.get("variables") or {}))
        if stream := re.fullmatch(rf"/files/{ENTITY}/[^/]+/([^/]+)/file_stream", self.path):
            self.stream(self.server.runs[stream[1]], json.loads(body))
            return self.reply(200, {})
        self.server.unknown.append(self.path)
        self.reply(404, {})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, kind, of, name = self.path.split("/", 3)
        getattr(self.server, kind)[of].files[name] = body
        self.reply(200, {})

    def place(self, kind: str, of: str, name: str) -> str:
        """Where a file of a run or an artifact is to be put."""
        return f"{self.server.url}/{kind}/{of}/{name}"

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", query])[1]
        self.server.asked.append(name)
        answer = getattr(self, f"on_{name}", None)
        if answer is None:
            self.server.unknown.append(query)
            return {"data": {}, "errors": [{"message": f"{name} is unknown"}]}
        return {"data": answer(given)}

    def on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams: dict[str, list[Any]] = {"edges": []}
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}}

    def on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.get(given["name"])
        entity = {"id": "2", "name": ENTITY}
        bucket = run and {
            **self.bucket(given["name"], run), "summaryMetrics": json.dumps(run.summary), "logLineCount": 0,
            "eventsLineCount": 0, "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]",
            "tags": [], "notes": None, "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"model": {"id": "3", "name": given["project"], "entity": entity, "bucket": bucket}}

    def on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        inserted = given["name"] not in self.server.runs
        run = self.server.runs.setdefault(given["name"], Stored(given["project"]))
        run.name = given.get("displayName") or run.name
        run.config |= json.loads(given.get("config") or "{}")
        run.summary |= json.loads(given.get("summaryMetrics") or "{}")
        run.exit_code = None
        return {"upsertBucket": {"bucket": self.bucket(given["name"], run), "inserted": inserted}}

    def bucket(self, run_id: str, run: Stored) -> dict[str, Any]:
        project = {"id": "3", "name": run.project, "entity": {"id": "2", "name": ENTITY}}
        return {
            "id": run_id, "name": run_id, "displayName": run.name, "description": None, "config": json.dumps(run.config),
            "sweepName": None, "project": project, "historyLineCount": len(run.history),
        }  # fmt: skip

    def stream(self, run: Stored, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            rows = [json.loads(row) for row in part["content"]] if name.startswith("wandb-") else []
            if name == "wandb-history.jsonl":
                run.history[part["offset"] : part["offset"] + len(rows)] = rows
            elif name == "wandb-summary.json":
                run.summary = rows[-1]
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": [
            {"name": name, "uploadUrl": self.place("runs", given["run"], name)} for name in given["files"]
        ]}}  # fmt: skip

    def on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # of that name there is none yet

    def on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        new, name = given["input"], f"artifact{len(self.server.artifacts)}"
        self.server.artifacts[name] = Artifact(new["runName"], new["artifactTypeName"])
        return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}}}

    def on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": file["name"], "uploadUrl": self.place("artifacts", file["artifactID"], file["name"]),
                "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            }
            for file in given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = self.place("artifacts", given["artifactID"], given["name"])
        file = {"id": "manifest", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    def on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.server.artifacts[given["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """A server at work."""
    with Server(**options) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def client_env(url: str, folder: Path, key: str = KEY) -> dict[str, str]:
    """The environment in which the real client knows this server and no other, and leaves its own things in `folder`.

    One thread is enough for what the tests train, and quicker where the machine has others to serve.
    """
    places = {name: str(folder / "client") for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    return places | {
        "WANDB_BASE_URL": url, "WANDB_API_KEY": key, "WANDB_ERROR_REPORTING": "false", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
