"""Models on a hub: what is read of one, how patient quark is, and what it says when it is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from socket import socket

import pytest
from safetensors.torch import load_file, save_file

import quarkcli
from quarkcli.disk import hub as hubs
from quarkcli.disk.headers import INDEX, SINGLE
from quarkcli.disk.source import Source
from quarkcli.errors import AccessError, ModelError
from quarkcli.events import Event, Message
from quarkcli.forward import data
from quarkcli.job import run as job
from quarkcli.job.options import Options
from tests import runs
from tests.disk.test_pickles import pickled
from tests.hub import COMMIT, NAME, TOKEN, Answer, Hub, started


@pytest.fixture
def hub() -> Iterator[Hub]:
    with started() as found:
        yield found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A model in three files, in the model's order, and one in a pickle beside them."""
    return in_shards(runs.build("llama", tmp_path_factory.mktemp("hub") / "source", num_hidden_layers=4))


def in_shards(folder: Path, count: int = 3) -> Path:
    """Splits a model's one file into `count`, in the order of its layers."""
    tensors = load_file(folder / SINGLE)
    order = sorted(tensors, key=lambda name: (name.startswith(("model.norm", "lm_head")), "layers" in name, name))
    names = [order[len(order) * k // count : len(order) * (k + 1) // count] for k in range(count)]
    files = {f"model-{k + 1:05d}-of-{count:05d}.safetensors": own for k, own in enumerate(names)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    return folder


def shards(hub: Hub) -> list[str]:
    return sorted(name for name in hub.files if name.endswith(".safetensors"))


def weight_bytes(hub: Hub) -> int:
    """Bytes of weight files that went out."""
    return sum(count for path, count in hub.sent.items() if path.endswith(".safetensors"))


# ---- config and headers alone


@pytest.mark.parametrize("ranged", [True, False])
def test_a_source_from_headers_alone(hub, sharded, tmp_path, monkeypatch, ranged):
    """A hub that knows no ranges sends whole files, which are left off where the headers end."""
    hub.hold(sharded)
    hub.public, hub.ranged = True, ranged
    hub.take(monkeypatch, tmp_path)
    source, local = Source.open(NAME, bare=True), Source.open(str(sharded))
    assert (source.name, source.hub_id, source.commit) == ("name", NAME, COMMIT)
    assert source.headers == local.headers and source.files == local.files and source.config == local.config
    assert source.header_digest() == local.header_digest()
    assert not list(source.folder.glob("*.safetensors")) and not (source.folder / "tokenizer.json").exists()
    if ranged:
        headers = sum(int.from_bytes(hub.files[name][:8], "little") + 8 for name in shards(hub))
        assert weight_bytes(hub) == headers


def test_plan_and_inspect_take_less_than_a_hundredth(hub, sharded, tmp_path):
    hub.hold(sharded)
    hub.public = True
    done = hub.quark("inspect", NAME, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["path"], told["commit"], told["files"]) == (NAME, COMMIT, 3)
    done = hub.quark("plan", "--model", NAME, "--scheme", "mxfp4", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = sum(len(hub.files[name]) for name in shards(hub))
    assert sum(hub.sent.values()) < whole / 100, hub.sent
    assert not any("tokenizer" in call or "pytorch_model" in call for call in hub.calls)


def test_plans_of_an_id_and_of_the_folder_are_one(hub, sharded, tmp_path, monkeypatch):
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    far, near = (job.prepare(Options(model, scheme="mxfp4")) for model in (NAME, str(sharded)))
    assert far.forecast.output_bytes == near.forecast.output_bytes and far.plan.parts == near.plan.parts
    assert far.download is not None and near.download is None
    assert far.forecast.disk_bytes == near.forecast.disk_bytes + far.download.at_once
    assert [str(t) for t in far.plan.quantized()] == [str(t) for t in near.plan.quantized()]


def test_what_the_cache_holds_is_not_asked_for(hub, sharded, tmp_path, monkeypatch):
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    Source.open(NAME)  # the whole snapshot
    hub.sent.clear()
    source = Source.open(NAME, bare=True)
    assert weight_bytes(hub) == 0 and sum(hub.sent.values()) < 5000
    assert source.read("model.norm.weight").shape == (128,)
    assert Source.open(NAME, bare=True, offline=True).headers == source.headers
    monkeypatch.setattr(hubs, "TRIES", 1)
    hub.fault = lambda method, path, start, end: Answer(503)
    assert Source.open(NAME, bare=True).headers == source.headers


def test_a_tensor_that_is_not_here_is_fetched(hub, sharded, tmp_path, monkeypatch):
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    source, local = Source.open(NAME, bare=True), Source.open(str(sharded))
    assert source.read("model.norm.weight").equal(local.read("model.norm.weight"))
    assert [path.name for path in source.folder.glob("*.safetensors")] == [local.headers["model.norm.weight"].file]
    folder = source.whole_folder()
    assert {"tokenizer.json", "README.md", "notes"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "pytorch_model.bin").exists()


def test_a_cache_that_lacks_weights(hub, sharded, tmp_path, monkeypatch):
    """After a plan there are config, index and perhaps a file in it: offline that is too little, and no damage."""
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    Source.open(NAME, bare=True)
    for bare in (True, False):
        with pytest.raises(AccessError, match=r"not reached: model-00001-of-00003\.safetensors, model") as caught:
            Source.open(NAME, bare=bare, offline=True)
        assert caught.value.where == NAME and "go online" in caught.value.hint
    hub.take(monkeypatch, tmp_path / "single")
    hub.files = {"config.json": hub.files["config.json"], SINGLE: hub.files["model-00001-of-00003.safetensors"]}
    assert list(Source.open(NAME, bare=True).files) == [SINGLE]
    with pytest.raises(AccessError, match=r"(?m)and the hub was not reached$"):
        Source.open(NAME, bare=True, offline=True)


# ---- out of reach


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub that gives no answer: nothing listens. Its port stays taken, or a hub of another test may get it."""
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = Hub(url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        found.take(monkeypatch, tmp_path)
        yield found


@pytest.mark.parametrize("bare", [True, False])
def test_a_hub_that_cannot_be_reached_is_said_soon(nowhere, bare):
    begun = time.monotonic()
    with pytest.raises(AccessError, match="there is no such directory, and the hub cannot be reached"):
        Source.open(NAME, bare=bare)
    assert time.monotonic() - begun < 5  # the hub's own client tries for half a minute


def test_a_data_set_of_a_hub_that_cannot_be_reached_is_said_soon(nowhere):
    begun = time.monotonic()
    with pytest.raises(AccessError, match="the hub cannot be reached"):
        list(data._from_hub(NAME, 0, offline=False))
    assert time.monotonic() - begun < 5


def test_a_path_is_not_asked_of_the_hub(hub, tmp_path, monkeypatch):
    """What begins with a directory that is here, or cannot be a name on the hub, is a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    hub.take(monkeypatch, tmp_path)
    for name in ("out/demo", "./demo", "../demo", "a/b/c", "/demo", "out/no/"):
        with pytest.raises(AccessError) as caught:
            Source.open(name, bare=True)
        assert caught.value.what == "there is no such directory"
        assert "org/name" in caught.value.hint and "demo" in caught.value.hint
    assert hub.calls == []


# ---- refused


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("kind", ["wrong token", "no token", "gated"])
def test_access_that_is_refused(hub, sharded, tmp_path, command, kind):
    hub.hold(sharded)
    hub.gated = kind == "gated"
    token = {"wrong token": "hf_anotheranother", "no token": None, "gated": TOKEN}[kind]
    more = ["inspect", NAME] if command == "inspect" else ["plan", "--model", NAME, "--scheme", "mxfp4"]
    done = hub.quark(*more, token=token, home=tmp_path)
    assert done.returncode == 5, done.stderr
    assert f"{hub.url}/{NAME}" in done.stderr and "HF_TOKEN" in done.stderr
    assert ("a token was found" if token else "no token was found") in done.stderr
    assert "hf_another" not in done.stderr and TOKEN not in done.stderr


def test_what_is_not_there(hub, sharded, tmp_path, monkeypatch):
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    with pytest.raises(AccessError, match="no revision other"):
        Source.open(NAME, revision="other", bare=True)
    with pytest.raises(AccessError, match="no such model on the hub"):
        Source.open("org/none", bare=True)
    del hub.files["model-00002-of-00003.safetensors"]
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors: is in the index but not on the hub"):
        Source.open(NAME, bare=True)
    hub.take(monkeypatch, tmp_path / "pickles")
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(ModelError, match=r"only pickle files.*pytorch_model\.bin"):
        Source.open(NAME, bare=True, revision=COMMIT)
    hub.take(monkeypatch, tmp_path / "nothing")
    hub.files = {"README.md": b"x"}
    with pytest.raises(ModelError, match=r"no config\.json"):
        Source.open(NAME, bare=True)


def test_a_checkpoint_is_held_against_the_commit_that_it_was_made_from(hub, sharded, tmp_path, monkeypatch):
    """Whatever main is by now: it may be another model."""
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path / "first")
    out = tmp_path / "out"
    quarkcli.quantize(NAME, "mxfp4", output=out, offline=False)
    asked = {
        "verify": lambda: quarkcli.verify(out, source=NAME, listener=heard.append),
        "eval": lambda: quarkcli.evaluate(out, baseline=NAME, window=16, tokens=64, listener=heard.append),
        "compare": lambda: quarkcli.compare(NAME, out, listener=heard.append),
    }
    for name, ask in asked.items():
        heard: list[Event] = []
        hub.take(monkeypatch, tmp_path / name)  # an empty cache
        hub.calls.clear()
        ask()
        assert any(COMMIT in call for call in hub.calls) and not any("main" in call for call in hub.calls), hub.calls
        said = f"{NAME}: taking commit {COMMIT[:12]}, from which {out} was made"
        assert said in [event.text for event in heard if isinstance(event, Message)]
    hub.take(monkeypatch, tmp_path / "offline")
    hub.calls.clear()
    asked_of_the_cache = (
        lambda: quarkcli.verify(out, source=NAME, offline=True),
        lambda: quarkcli.evaluate(out, baseline=NAME, offline=True),
    )
    for ask in asked_of_the_cache:
        with pytest.raises(AccessError, match="not completely in the hub cache"):
            ask()
    assert not hub.calls
    (out / "quark" / "manifest.json").write_text("[]")
    quarkcli.compare(NAME, out)
    assert any("main" in call for call in hub.calls)


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_come_whole_where_they_are_allowed(hub, tmp_path, monkeypatch, shards):
    source = runs.build("llama", tmp_path / "plain")
    hub.hold(pickled(source, tmp_path / "pickled", shards))
    hub.files["training_args.bin"] = b"not asked for"
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    with pytest.raises(ModelError) as caught:
        Source.open(NAME, bare=True)
    assert caught.value.hint.startswith("use --allow-pickle")
    found = Source.open(NAME, bare=True, allow_pickle=True)
    tensors = runs.read_all(source)
    assert found.pickled and found.headers.keys() == tensors.keys()
    assert all(runs.same_bytes(found.read(name), tensor) for name, tensor in tensors.items())
    assert not (found.folder / "training_args.bin").exists()


# ---- patience


def test_too_many_requests(hub, sharded, tmp_path, monkeypatch):
    """The hub says how long to wait. It is asked again, but not for ever."""
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    left = {"count": 2}

    def busy(method: str, path: str, start: int, end: int | None) -> Answer | None:
        if path.endswith(".safetensors") and left["count"]:
            left["count"] -= 1
            return Answer(429, headers={"Retry-After": "0"})
        return None

    hub.fault, said = busy, []
    source = Source.open(NAME, bare=True, tell=lambda event: said.append(str(event)))
    assert len(source.files) == 3 and len(said) == 2 and all("429" in line for line in said)
    for wait, tries in (("0", hubs.TRIES), ("4000", 1)):
        left["count"] = 10**6
        with pytest.raises(AccessError, match=rf"for now \(429\), and asks to wait {wait} s") as caught:
            Source.open(NAME, bare=True)
        assert "HF_TOKEN" in caught.value.hint
        assert 10**6 - left["count"] <= 3 * tries
        hub.fault = lambda method, path, start, end: (
            Answer(429, headers={"Retry-After": "4000"}) if path.endswith(".safetensors") else None
        )
        left["count"] = 0


def test_a_hub_that_breaks_connections(hub, sharded, tmp_path, monkeypatch):
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    monkeypatch.setattr(hubs.Patience, "pause", lambda self, seconds: None)
    broken = set()

    def cut(method: str, path: str, start: int, end: int | None) -> Answer | None:
        name = path.rpartition("/")[2]
        if start == 8 and name not in broken:
            broken.add(name)
            return Answer(206, hub.files[name][8:200], {"Content-Range": "bytes 8-199/1000"}, cut=50)
        return None

    hub.fault = cut
    assert Source.open(NAME, bare=True).headers == Source.open(str(sharded)).headers
    assert len(broken) == 3


def test_a_file_that_an_earlier_run_has_begun(hub, sharded, tmp_path, monkeypatch):
    """It is gone on with. What turns out not to be the file is removed, and comes whole the next time."""
    hub.hold(sharded)
    hub.public = True
    hub.take(monkeypatch, tmp_path)
    remote = Source.open(NAME, bare=True).remote
    assert remote is not None
    name = shards(hub)[0]
    whole, folder, ranges = hub.files[name], tmp_path / "place", hub.ranges[f"/{NAME}/resolve/{COMMIT}/{name}"]
    folder.mkdir()
    for start in (whole[:5000], whole):
        (folder / f"{name}.part").write_bytes(start)
        asked = len(ranges)
        assert remote.bring(name, folder, threading.Event()).read_bytes() == whole
        assert ranges[asked:] == ([5000] if len(start) < len(whole) else [])
        (folder / name).unlink()
    (folder / f"{name}.part").write_bytes(b"x" * 5000)
    with pytest.raises(AccessError, match="not the one that the hub lists"):
        remote.bring(name, folder, threading.Event())
    assert not list(folder.iterdir())
    assert remote.bring(name, folder, threading.Event()).read_bytes() == whole
