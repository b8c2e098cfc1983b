"""quark push against a local server that speaks the endpoints of an upload: files, licence, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from quarkcli.disk import push as pushing
from quarkcli.errors import HubError, UsageError
from tests import runs
from tests.hub import TOKEN, Hub, started


@pytest.fixture
def hub() -> Iterator[Hub]:
    with started() as found:
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint of a model whose card names a licence."""
    source = runs.build("llama", tmp_path_factory.mktemp("push") / "source")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own\ntags: [x]\n---\n# it\n")
    return runs.run(source, source.parent / "out", scheme="mxfp4").folder


def push(hub: Hub, *arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    return hub.quark("push", *arguments, token=token)


def test_what_is_uploaded_is_the_checkpoint(hub, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "out")
    (folder / "notes.tmp").write_text("mine")
    hub.files[".gitattributes"] = b"x"
    done = push(hub, folder, "org/name", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == "abc" and hub.private is True and hub.commits == 1
    assert "not in the manifest and were not uploaded: notes.tmp" in done.stderr
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


def test_a_name_or_a_network_that_cannot_be_is_said_before_any_work(tmp_path, monkeypatch):
    for name in ("name", "org/team/name", "org/a b", "/name", "org/", ""):
        with pytest.raises(UsageError, match="is not the name of a repository") as caught:
            pushing.push(tmp_path, name)
        assert caught.value.hint.startswith("write ORG/NAME")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="an upload needs the network, and quark is offline"):
        pushing.push(tmp_path, "org/name")


def test_a_token_that_may_not(hub, made):
    done = push(hub, made, "org/name", token="hf_anotheranother")
    assert done.returncode == 5 and "set HF_TOKEN" in done.stderr and "a token was found" in done.stderr
    assert "hf_anotheranother" not in done.stderr and hub.files == {}
