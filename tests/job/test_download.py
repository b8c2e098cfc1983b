"""Jobs whose model is on a hub: files that come while the job works, and go after their last use."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from quarkcli.disk.hub import Patience
from quarkcli.job import download
from tests import runs
from tests.disk.test_hub import in_shards, shards, weight_bytes
from tests.hub import COMMIT, NAME, Answer, Hub, started


@pytest.fixture
def hub() -> Iterator[Hub]:
    with started() as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return in_shards(runs.build("llama", tmp_path_factory.mktemp("hub") / "name", num_hidden_layers=6))


@pytest.fixture(scope="module")
def near(model) -> runs.Made:
    """What a run on the folder makes."""
    return runs.run(model, model.parent / "near", scheme="mxfp4")


@dataclass
class Peak:
    bytes: int = 0
    files: int = 0


@contextmanager
def watched(folder: Path) -> Iterator[Peak]:
    """The most that a folder holds while something runs."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            sizes = []
            for path in list(folder.rglob("*.safetensors*")):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:  # dropped just now
                    continue
            peak.bytes, peak.files = max(peak.bytes, sum(sizes)), max(peak.files, len(sizes))
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def taken(hub: Hub, model: Path, monkeypatch, tmp_path: Path) -> Path:
    """Makes the hub hold the model. Returns the folder of downloads of a run with the output `far`."""
    hub.hold(model)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    return tmp_path / "far.partial" / ".quark-state" / download.FOLDER


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_two_files_at_a_time(hub, model, near, tmp_path, monkeypatch):
    """Parts of this model lie in two files, and what is beside its weights comes as well."""
    folder = taken(hub, model, monkeypatch, tmp_path)
    with watched(folder) as peak:
        far = runs.run(NAME, tmp_path / "far", scheme="mxfp4")
    sizes = sorted((len(hub.files[name]) for name in shards(hub)), reverse=True)
    assert len(sizes) == 3 and 0 < peak.bytes <= sum(sizes[:2]) and peak.files == 2
    assert far.prepared.download is not None
    assert (far.prepared.download.files, far.prepared.download.at_once) == (3, sum(sizes[:2]))
    assert contents(far.folder) == contents(near.folder)
    names = {path.relative_to(near.folder) for path in near.folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(far.folder) for path in far.folder.rglob("*") if path.is_file()}
    assert weight_bytes(hub) < sum(sizes) * 1.01  # each once
    assert not list(tmp_path.glob("far.partial*")) and not list((tmp_path / "hub").rglob("*.safetensors"))


def test_a_download_that_is_kept(hub, model, near, tmp_path, monkeypatch):
    taken(hub, model, monkeypatch, tmp_path)
    far = runs.run(NAME, tmp_path / "far", scheme="mxfp4", keep_download=True)
    assert contents(far.folder) == contents(near.folder)
    kept = {path.name for path in (tmp_path / "hub").rglob("snapshots/*/*.safetensors")}
    assert kept == set(shards(hub))
    sent = weight_bytes(hub)
    again = runs.run(NAME, tmp_path / "again", scheme="mxfp4", keep_download=True)
    assert weight_bytes(hub) == sent and again.prepared.download is None
    assert any("--keep-download is not used: the hub's cache" in line for line in again.prepared.warnings)
    runs.run(NAME, tmp_path / "offline", scheme="mxfp4", offline=True)
    local = runs.run(model, tmp_path / "local", scheme="mxfp4", keep_download=True)
    assert any("--keep-download is not used: the model is a directory" in line for line in local.prepared.warnings)


def test_a_connection_that_breaks_inside_a_file(hub, model, near, tmp_path, monkeypatch):
    """It goes on where it was; each byte is sent once, but for those that were on their way."""
    taken(hub, model, monkeypatch, tmp_path)
    monkeypatch.setattr(Patience, "pause", lambda self, seconds: None)
    cuts = dict.fromkeys(shards(hub), 2)

    def cut(method: str, path: str, start: int, end: int | None) -> Answer | None:
        name = path.rpartition("/")[2]
        if method != "GET" or cuts.get(name, 0) == 0 or end is not None:
            return None
        cuts[name] -= 1
        whole = hub.files[name]
        headers = {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"}
        hub.ranges.setdefault(path, []).append(start)
        return Answer(206, whole[start:], headers, cut=200_000)

    hub.fault = cut
    far = runs.run(NAME, tmp_path / "far", scheme="mxfp4")
    assert contents(far.folder) == contents(near.folder) and set(cuts.values()) == {0}
    for name in shards(hub):
        starts = hub.ranges[f"/{NAME}/resolve/{COMMIT}/{name}"]
        assert starts == [0, 8, 0, 200_000, 400_000]
    assert weight_bytes(hub) < sum(len(hub.files[name]) for name in shards(hub)) * 1.01


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_a_run_that_goes_on(hub, model, near, tmp_path, monkeypatch, parts):
    """Killed in the middle of the model: the same bytes, and no file that is done is asked for, not even its header."""
    taken(hub, model, monkeypatch, tmp_path)

    def work() -> runs.Made:
        return runs.run(NAME, tmp_path / "far", scheme="mxfp4", resume="auto")

    runs.killed(parts, work)
    first, state = hub.sent.copy(), tmp_path / "far.partial" / ".quark-state"
    assert set(json.loads((state / "headers.json").read_text())["files"]) == set(shards(hub))
    here = {path.name for path in (state / download.FOLDER).iterdir()}
    hub.calls.clear()
    hub.sent.clear()
    far = work()
    assert contents(far.folder) == contents(near.folder)
    asked = {call.rpartition("/")[2] for call in hub.calls if call.endswith(".safetensors")}
    left = {tensor for part in far.prepared.plan.parts[parts:] for tensor in part.tensors}
    needed = {far.prepared.source.headers[name].file for name in left}
    assert asked <= needed - here, (asked, needed, here)
    if parts == 7:
        assert len(asked) < 2 and sum(first.values()) > 0
