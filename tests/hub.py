"""A hub in a thread: one repository, read file by file or by range and written in commits, with faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import constants

TOKEN = "hf_secretsecretsecret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/name"


@dataclass
class Answer:
    """An answer. `cut`: after so many bytes of the content the connection breaks."""

    status: int
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


# Sees method, path and the range asked for (its end None: to the end of the file). Its answer, where it gives one, goes
# out instead of the hub's own.
Fault = Callable[[str, str, int, int | None], Answer | None]


@dataclass
class Hub:
    """A hub that keeps one repository in memory.

    public   models are read without a token
    gated    a licence has to be accepted, which nobody did
    calls    method and path of every request
    sent     path -> bytes of content that went out
    ranges   path -> the first bytes of the ranges asked for
    """

    url: str = ""
    public: bool = False
    gated: bool = False
    ranged: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, list[int]] = field(default_factory=dict)
    fault: Fault | None = None
    private: Any = None
    commits: int = 0

    def hold(self, folder: Path) -> None:
        """Holds the files of a folder."""
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Answer:
        path = path.partition("?")[0]
        self.calls.append(f"{method} {path}")
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
        start, end = (int(found[1]), int(found[2] or 2**60) + 1) if found and self.ranged else (0, 2**60)
        if (fault := self.fault and self.fault(method, path, start, None if end > 2**59 else end)) is not None:
            return fault
        if path.startswith("/objects/"):
            self.objects[path.removeprefix("/objects/")] = body
            return _json(200, {})
        reads = path.startswith((f"/api/models/{NAME}", f"/{NAME}/resolve/"))
        if headers.get("Authorization", "") != f"Bearer {TOKEN}":
            known = {"X-Error-Message": "Invalid credentials in Authorization header"}
            said = known if headers.get("Authorization") else {"X-Error-Code": "RepoNotFound"}
            if headers.get("Authorization") or not (self.public and reads and method in ("GET", "HEAD")):
                return _json(401, {"error": "Invalid credentials"}, said)
        if match := re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path):
            return self.file(method, path, match[1], match[2], start, end, bool(found) and self.ranged)
        return self.written(path, body) or _json(404, {"error": f"no such endpoint: {path}"})

    def file(self, method: str, path: str, revision: str, name: str, start: int, end: int, ranged: bool) -> Answer:
        if self.gated:
            return _json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT):
            return _json(404, {"error": "revision"}, {"X-Error-Code": "RevisionNotFound"})
        if name not in self.files:
            return _json(404, {"error": "entry"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        whole = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        part = whole[start:end] if method == "GET" else whole
        if method == "GET" and ranged:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
            self.ranges.setdefault(path, []).append(start)
        return Answer(206 if ranged and method == "GET" else 200, part, headers)

    def written(self, path: str, body: bytes) -> Answer | None:
        """Answers what is not a file: the model's facts, and the requests of an upload."""
        if path in (
            f"/api/models/{NAME}",
            f"/api/models/{NAME}/revision/main",
            f"/api/models/{NAME}/revision/{COMMIT}",
        ):
            rows = [
                {"rfilename": name, "size": len(data), "blobId": "0", **_lfs(name, data)}
                for name, data in self.files.items()
            ]
            return _json(200, {"id": NAME, "sha": COMMIT, "siblings": rows})
        if path.startswith(f"/api/models/{NAME}/revision/"):
            return _json(404, {"error": "revision"}, {"X-Error-Code": "RevisionNotFound"})
        if path == "/api/repos/create":
            asked = json.loads(body)  # newer releases of the library say it by a word
            self.private = asked.get("private") is True or asked.get("visibility") == "private"
            return _json(200, {"url": f"{self.url}/{NAME}", "id": NAME})
        if path == "/api/validate-yaml":
            return _json(200, {"errors": [], "warnings": []})
        if path.startswith(f"/api/models/{NAME}/tree/"):
            rows = [{"type": "file", "path": n, "size": len(data), "oid": "0"} for n, data in self.files.items()]
            return _json(200, rows)
        if "/preupload/" in path:
            rows = json.loads(body)["files"]
            mode = {row["path"]: "lfs" if row["path"].endswith(".safetensors") else "regular" for row in rows}
            return _json(200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in mode.items()]})
        if path.endswith("/info/lfs/objects/batch"):
            return _json(200, {"transfer": "basic", "objects": [
                {**row, "actions": {"upload": {"href": f"{self.url}/objects/{row['oid']}"}}}
                for row in json.loads(body)["objects"]
            ]})  # fmt: skip
        if "/commit/" in path:
            return _json(200, self.commit([json.loads(line) for line in body.splitlines()]))
        return None

    def commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        self.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        return {"commitUrl": f"{self.url}/{NAME}/commit/abc", "commitOid": "abc", "success": True}

    def surroundings(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """Returns the environment of a process that uses this hub."""
        unset = {"HF_HUB_OFFLINE", "HF_TOKEN"}
        found = {key: value for key, value in os.environ.items() if key not in unset}
        found |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}
        found |= {"HF_TOKEN": token} if token else {}
        return found | ({"HF_HOME": str(home)} if home is not None else {})

    def take(self, monkeypatch: Any, home: Path, token: str | None = None) -> None:
        """Makes this process use the hub, with an empty cache of its own."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)

    def quark(
        self, *arguments: object, token: str | None = None, home: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command line in a process of its own."""
        command = [sys.executable, "-c", "from quarkcli.cli.main import run; run()", *map(str, arguments)]
        return subprocess.run(command, env=self.surroundings(token, home), capture_output=True, text=True, timeout=120)


def _lfs(name: str, data: bytes) -> dict[str, Any]:
    if not name.endswith(".safetensors"):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}}


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@contextmanager
def started() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = found.answer(self.command, self.path, self.headers, body)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            content = answer.content[: answer.cut] if self.command != "HEAD" else b""
            for start in range(0, len(content), 65536):
                # Counted first: whoever asked may look at the count as soon as the bytes are there.
                found.sent[self.path.partition("?")[0]] += len(content[start : start + 65536])
                self.wfile.write(content[start : start + 65536])
            if answer.cut is not None:
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *given: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # who was asked for a range and got a whole file hangs up

    server = Server(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
