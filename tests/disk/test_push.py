"""quark push against a local server that speaks the endpoints of an upload: files, licence, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests import runs

TOKEN = "hf_secretsecretsecret"


@dataclass
class Hub:
    """A hub that keeps one repository in memory. `calls`: method and path of every request."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    private: Any = None
    commits: int = 0

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.calls.append(f"{method} {path}")
        if path.startswith("/objects/"):
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            asked = json.loads(body)  # newer releases of the library say it by a word
            self.private = asked.get("private") is True or asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/org/name", "id": "org/name"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/models/org/name/tree/"):
            return 200, [
                {"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in self.files.items()
            ]
        if "/preupload/" in path:
            rows = json.loads(body)["files"]
            mode = {row["path"]: "lfs" if row["path"].endswith(".safetensors") else "regular" for row in rows}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in mode.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            rows = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [
                {**row, "actions": {"upload": {"href": f"{self.url}/objects/{row['oid']}"}}} for row in rows
            ]}  # fmt: skip
        if "/commit/" in path:
            return 200, self.commit([json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no such endpoint: {path}"}

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
        return {"commitUrl": f"{self.url}/org/name/commit/abc", "commitOid": "abc", "success": True}


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = found.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint of a model whose card names a licence."""
    source = runs.build("llama", tmp_path_factory.mktemp("push") / "source")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own\ntags: [x]\n---\n# it\n")
    return runs.run(source, source.parent / "out", scheme="mxfp4").folder


def push(hub: Hub, *arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    unset = {"HF_HUB_OFFLINE", "HF_TOKEN"}
    surroundings = {key: value for key, value in os.environ.items() if key not in unset}
    surroundings |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    start = "from quarkcli.cli.main import run; run()"
    command = [sys.executable, "-c", start, "push", *map(str, arguments)]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60)


def test_what_is_uploaded_is_the_checkpoint(hub, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "out")
    (folder / "notes.tmp").write_text("mine")
    hub.files[".gitattributes"] = b"x"
    done = push(hub, folder, "org/name", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == "abc" and hub.private is True and hub.commits == 1
    assert "not uploaded, for the manifest does not list them: notes.tmp" in done.stderr
    manifest = json.loads((folder / "quark" / "manifest.json").read_text())
    assert set(hub.files) == {*manifest["files"], "quark/manifest.json", ".gitattributes"}
    assert all(hashlib.sha256(hub.files[name]).hexdigest() == digest for name, digest in manifest["files"].items())
    card = hub.files["README.md"].decode()
    assert "license: other\nlicense_name: own\n" in card and "base_model: source" in card
    assert TOKEN not in done.stdout + done.stderr + "".join(map(str, hub.files.values()))


def test_a_repository_that_holds_something(hub, made):
    hub.files |= {"model-block-00009.safetensors": b"old", "README.md": b"old"}
    done = push(hub, made, "org/name")
    assert done.returncode == 2 and "holds 1 files already" in done.stderr and hub.commits == 0
    done = push(hub, made, "org/name", "--overwrite")
    assert done.returncode == 0 and "1 files of before" in done.stdout
    assert "model-block-00009.safetensors" not in hub.files and hub.commits == 1 and hub.private is False


def test_what_fails_verification_is_not_sent(hub, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "out")
    shard = folder / "model-block-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7e")
    assert push(hub, folder, "org/name").returncode == 8
    assert hub.calls == []


def test_a_token_that_may_not(hub, made):
    done = push(hub, made, "org/name", token="hf_anotheranother")
    assert done.returncode == 5 and "a token was seen; set HF_TOKEN" in done.stderr
    assert "hf_anotheranother" not in done.stderr and hub.files == {}
