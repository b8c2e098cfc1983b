"""Jobs whose model is on a hub: files that come while the job works, and go after their last use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from quarkcli.cli.planview import header
from quarkcli.disk.hub import TRIES, Patience
from quarkcli.errors import AccessError, ResourceError
from quarkcli.job import download
from tests import runs
from tests.disk.test_hub import in_shards, shards, weight_bytes
from tests.hub import COMMIT, NAME, TOKEN, Answer, Hub, started


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
            with suppress(FileNotFoundError):  # dropped just now, or the folder is
                for path in folder.rglob("*.safetensors*"):
                    sizes.append(path.stat().st_size)
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
    assert len(sizes) == 3 and 0 < peak.bytes <= sum(sizes[:2]) and peak.files <= 2
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


# ---- what else comes in this way


def test_calibrated_jobs(hub, model, tmp_path, monkeypatch):
    """The head is read before the first block, so that its file stays beside two others."""
    folder = taken(hub, model, monkeypatch, tmp_path)
    rows = runs.data(runs.text_file(tmp_path / "rows.txt"), 8)
    job = {"scheme": "nvfp4", "algorithm": "gptq", **rows}
    local = runs.run(model, tmp_path / "local", **job)

    def work() -> runs.Made:
        return runs.run(NAME, tmp_path / "far", resume="auto", **job)

    runs.killed(3, work)
    with watched(folder) as peak:
        far = work()
    assert contents(far.folder) == contents(local.folder) and 0 < peak.files <= 3
    assert far.prepared.download is not None and not far.prepared.download.kept


def test_transforms_take_the_whole_model(hub, model, tmp_path, monkeypatch):
    taken(hub, model, monkeypatch, tmp_path)
    rows = runs.data(runs.text_file(tmp_path / "rows.txt"), 8)
    job = {"scheme": "int8_dynamic", "algorithm": "smoothquant,rtn", **rows}
    far = runs.run(NAME, tmp_path / "far", keep_download=True, **job)
    assert contents(far.folder) == contents(runs.run(model, tmp_path / "local", **job).folder)
    assert {path.name for path in (tmp_path / "hub").rglob("snapshots/*/*.safetensors")} == set(shards(hub))
    assert "kept in the hub's cache: transforms read weights more than once" in "\n".join(header(far.prepared))
    assert any(
        "--keep-download changes nothing: the download is kept anyway, because" in line
        for line in far.prepared.warnings
    )
    whole = sum(len(hub.files[name]) for name in shards(hub))
    assert weight_bytes(hub) < whole * 1.01
    monkeypatch.setattr(download, "free_bytes", lambda path: whole)
    hub.take(monkeypatch, tmp_path / "small")
    with pytest.raises(ResourceError, match="bytes needed for the download"):
        runs.run(NAME, tmp_path / "no room", **job)


def test_a_quantized_model_whose_codes_are_kept(hub, model, tmp_path, monkeypatch):
    """Codes that stay are read once more while a part is worked on, when its file is there still."""
    source = runs.run(model, tmp_path / "source", scheme="int8_dynamic").folder
    taken(hub, source, monkeypatch, tmp_path)
    job = {"scheme": "int4_wo_128", "exclude": ["*self_attn*"]}
    far = runs.run(NAME, tmp_path / "far", **job)
    assert contents(far.folder) == contents(runs.run(source, tmp_path / "local", **job).folder)
    assert len(far.report["source"]["carried"]) == 6 * 4
    assert weight_bytes(hub) < sum(len(hub.files[name]) for name in shards(hub)) * 1.02


def test_a_hub_without_ranges(hub, model, near, tmp_path, monkeypatch):
    """A broken file begins again, for there is no other way."""
    taken(hub, model, monkeypatch, tmp_path)
    hub.ranged = False
    monkeypatch.setattr(Patience, "pause", lambda self, seconds: None)
    left = [2]

    def cut(method: str, path: str, start: int, end: int | None) -> Answer | None:
        if method == "GET" and path.endswith(".safetensors") and len(hub.calls) > 20 and left[0]:
            left[0] -= 1
            return Answer(200, hub.files[path.rpartition("/")[2]], cut=200_000)
        return None

    hub.fault = cut
    assert contents(runs.run(NAME, tmp_path / "far", scheme="mxfp4").folder) == contents(near.folder)


# ---- refused in the middle


def later(hub: Hub, answer: Answer, count: int = 10**6) -> None:
    """From the second weight file on the hub gives this answer, so many times."""
    left = [count]

    def fault(method: str, path: str, start: int, end: int | None) -> Answer | None:
        mine = path.endswith(("2-of-00003.safetensors", "3-of-00003.safetensors")) and end is None and method == "GET"
        left[0] -= mine
        return answer if mine and left[0] >= 0 else None

    hub.fault = fault


REFUSED = {
    "a token that is taken back": (Answer(401), "the hub refused access"),
    "the hub refuses more requests for now": (
        Answer(429, headers={"Retry-After": "7"}),
        "the hub refuses more requests for now",
    ),
    "a limit of requests": (Answer(429, headers={"RateLimit": '"resolvers";r=0;t=7'}), "and asks to wait 7 s"),
    "a hub that is broken": (Answer(500), "^org/name: the download from the hub failed: HfHubHTTPError"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_done_stays_done(hub, model, near, tmp_path, monkeypatch, kind):
    """An error of access, behind which the same command goes on."""
    taken(hub, model, monkeypatch, tmp_path)
    waits: list[float] = []
    monkeypatch.setattr(Patience, "pause", lambda self, seconds: waits.append(seconds))
    answer, words = REFUSED[kind]
    later(hub, answer)
    with pytest.raises(AccessError, match=words) as caught:
        runs.run(NAME, tmp_path / "far", scheme="mxfp4")
    assert "HF_TOKEN" in caught.value.hint or answer.status == 500
    assert waits[:5] == ([] if answer.status == 401 else [7] * 5 if answer.status == 429 else [0.5, 1, 2, 4, 8])
    assert (tmp_path / "far.partial").is_dir() and not (tmp_path / "far").exists()
    later(hub, answer, 0 if answer.status == 401 else TRIES - 2)
    hub.calls.clear()
    far = runs.run(NAME, tmp_path / "far", scheme="mxfp4", resume="auto")
    assert contents(far.folder) == contents(near.folder)
    assert not any("1-of-00003" in call for call in hub.calls)


def test_a_file_that_is_not_the_one_listed(hub, model, near, tmp_path, monkeypatch):
    taken(hub, model, monkeypatch, tmp_path)
    name = shards(hub)[1]
    whole = hub.files[name]
    headers = {"Content-Range": f"bytes 0-{len(whole) - 1}/{len(whole)}"}
    later(hub, Answer(206, whole[:-1] + bytes([whole[-1] ^ 1]), headers), 1)
    with pytest.raises(AccessError, match=rf"{name}: the downloaded file is not the one that the hub lists"):
        runs.run(NAME, tmp_path / "far", scheme="mxfp4")
    far = runs.run(NAME, tmp_path / "far", scheme="mxfp4", resume="auto")
    assert contents(far.folder) == contents(near.folder)


def test_the_token_is_in_no_file(hub, model, tmp_path):
    """The hub asks for it. A wrong one ends with exit code 5, the page with the licence, and the variable."""
    hub.hold(model)
    arguments = ["quantize", "--model", NAME, "--scheme", "mxfp4", "--device", "cpu", "-o", tmp_path / "out"]
    done = hub.quark(*arguments, token="hf_anotheranother", home=tmp_path / "home")
    assert done.returncode == 5 and f"{hub.url}/{NAME}" in done.stderr and "HF_TOKEN" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    later(hub, Answer(403))
    stopped = hub.quark(*arguments, "--debug", token=TOKEN, home=tmp_path / "home")
    assert stopped.returncode == 5 and (tmp_path / "out.partial").is_dir()
    seen = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    hub.fault = None
    whole = hub.quark(*arguments, token=TOKEN, home=tmp_path / "home")
    assert whole.returncode == 0, whole.stderr
    seen += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    seen += [(one.stdout + one.stderr).encode() for one in (done, stopped, whole)]
    assert len(seen) > 30
    assert not any(token.encode() in text for text in seen for token in (TOKEN, "hf_anotheranother"))


def test_a_signal_while_a_download_hangs(hub, model, tmp_path):
    """The user is answered within two seconds, and what is finished stays."""
    hub.hold(model)
    hub.public = True
    hangs, end = threading.Event(), threading.Event()

    def hang(method: str, path: str, start: int, end_of: int | None) -> Answer | None:
        if path.endswith("3-of-00003.safetensors") and end_of is None and method == "GET":
            hangs.set()
            end.wait(60)
        return None

    hub.fault = hang
    arguments = ["quantize", "--model", NAME, "--scheme", "mxfp4", "--device", "cpu", "-o", str(tmp_path / "out")]
    command = [sys.executable, "-c", "from quarkcli.cli.main import run; run()", *arguments]
    environment = hub.surroundings(home=tmp_path / "home")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert hangs.wait(60)
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=10)[1]
    assert time.monotonic() - begun < 3 and process.returncode == 130, error
    end.set()
    assert json.loads((tmp_path / "out.partial" / ".quark-state" / "journal.json").read_text())["parts"]
