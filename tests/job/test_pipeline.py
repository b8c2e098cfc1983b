"""Reading ahead and writing behind: order, what is durable when, and what happens when either fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quarkcli.disk.contents import slug
from quarkcli.disk.journal import Journal
from quarkcli.disk.writer import write_part
from quarkcli.errors import AccessError, ResourceError, Stopped
from quarkcli.job.pipeline import Pipeline
from quarkcli.job.result import PartResult
from quarkcli.plan.model import Part

PARTS = [Part(index, f"layers.{index}", "block", index, (f"layers.{index}.weight",)) for index in range(5)]


class Files:
    """Stands for a Source: notes in which order and thread tensors are read."""

    def __init__(self) -> None:
        self.read: list[tuple[str, bool]] = []
        self.fail: Exception | None = None
        self.by_offset = True

    def read_many(self, names: Any) -> dict[str, torch.Tensor]:
        names = list(names)
        self.read.append((names[0], threading.current_thread() is threading.main_thread()))
        if self.fail is not None:
            raise self.fail
        return {name: torch.full((4,), float(name.split(".")[1])) for name in names}


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def result(tensors: dict[str, torch.Tensor]) -> PartResult:
    return PartResult(dict(tensors), 0.5, {"w": 0.25}, {}, ["careful"], 1.0)


def worker(walk: Any = None, last: int = 10) -> Any:
    return SimpleNamespace(walk=walk, last=last)


def walk(value: float, batch: int = 4) -> Any:
    states = [torch.full((2, 3), value), torch.full((1, 3), -value)]
    return SimpleNamespace(served=states, hidden={"served": states}, batch=batch, recordings={})


def work(pipeline: Pipeline, parts: list[Part], made: Callable[[Part], Any] = lambda part: worker()) -> None:
    for position, part in enumerate(parts):
        tensors = pipeline.read(part, parts[position + 1] if position + 1 < len(parts) else None)
        pipeline.write(part, result(tensors), made(part))


def start(tmp_path: Path, files: Files, journal: Journal, device: str) -> Pipeline:
    return Pipeline(files, tmp_path / "out.partial", journal, device)  # type: ignore[arg-type]


@pytest.mark.usefixtures("synchronized")
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_every_part_is_written_and_noted_in_order(tmp_path, device):
    files = Files()
    with Journal.open(tmp_path / "out.partial", {}) as journal, start(tmp_path, files, journal, device) as pipeline:
        work(pipeline, PARTS)
        pipeline.drain()
        assert list(journal.finished) == [part.name for part in PARTS]
        record = journal.finished["layers.2"]
        assert {k: record[k] for k in ("output_error", "weight_errors", "warnings", "seconds")} == {
            "output_error": 0.5, "weight_errors": {"w": 0.25}, "warnings": ["careful"], "seconds": 1.0,
        }  # fmt: skip
        assert [file["file"] for file in record["files"]] == ["model-block-00002.safetensors"]
        assert journal.verify() == []
    assert [name for name, _ in files.read] == [part.tensors[0] for part in PARTS]
    assert not any(main for _, main in files.read)


@pytest.mark.parametrize("by_offset", [True, False])
def test_no_more_is_read_ahead_than_there_is_room_for(tmp_path, by_offset):
    """Tensors of the next part come as those of this one are let go; what is waited for comes in any case."""
    parts = [Part(n, f"layers.{n}", "block", n, tuple(f"layers.{n}.{leaf}" for leaf in "abcd")) for n in range(3)]
    files, size = Files(), 16
    files.by_offset = by_offset

    def read() -> list[str]:
        time.sleep(0.05)
        return [name for name, _ in files.read]

    with (
        Journal.open(tmp_path / "out.partial", {}) as journal,
        Pipeline(files, tmp_path / "out.partial", journal, "cpu", room=4 * size) as pipeline,  # type: ignore[arg-type]
    ):
        tensors = pipeline.read(parts[0], parts[1])
        assert read() == (["layers.0.a", "layers.0.b", "layers.0.c", "layers.0.d"] if by_offset else ["layers.0.a"])
        del tensors["layers.0.b"]
        assert read()[-1] == "layers.1.a"
        if by_offset:
            del tensors["layers.0.d"]
            assert read()[-1] == "layers.1.b"
        again = pipeline.read(parts[1], parts[2])  # while two of the first part are still held
        assert list(again) == list(parts[1].tensors)
        assert read()[-1] == ("layers.1.d" if by_offset else "layers.1.a")
        del tensors, again
        assert read()[-1] == ("layers.2.d" if by_offset else "layers.2.a")


def test_a_pipeline_ends_while_there_is_no_room(tmp_path):
    files = Files()
    with Journal.open(tmp_path / "out.partial", {}) as journal:
        with (
            pytest.raises(RuntimeError, match="in a part"),
            Pipeline(files, tmp_path / "out.partial", journal, "cpu", room=1) as pipeline,  # type: ignore[arg-type]
        ):
            held = pipeline.read(PARTS[0], PARTS[1])
            raise RuntimeError("in a part")
        assert held
    assert [name for name, _ in files.read] == ["layers.0.weight"]


@pytest.mark.usefixtures("synchronized")
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_each_dialect_has_a_folder(tmp_path, device):
    """Both are in one entry of the journal, by names in the output; what both hold is taken off the device once."""
    partial = tmp_path / "out.partial"
    kept = torch.arange(3.0)
    with Journal.open(partial, {}) as journal:
        for name in ("a", "b"):
            (partial / name).mkdir()
        with Pipeline(Files(), partial, journal, device, ["a", "b"]) as pipeline:  # type: ignore[arg-type]
            for part in PARTS:
                made = result({"kept": kept, "w": torch.zeros(2)})
                made.others = [{"kept": kept, "w.codes": torch.ones(4)}]
                pipeline.write(part, made, worker())
                assert not made.tensors and not made.others[0]
        for part in PARTS:
            names = [file["file"] for file in journal.finished[part.name]["files"]]
            assert names == [f"{folder}/model-{slug(part)}.safetensors" for folder in ("a", "b")]
            first, second = (load_file(partial / name) for name in names)
            assert torch.equal(first["kept"], kept) and torch.equal(second["kept"], kept)
            assert set(first) == {"kept", "w"} and set(second) == {"kept", "w.codes"}
        assert journal.verify() == []
        (partial / names[1]).write_bytes(b"damaged")
        assert journal.verify() == [PARTS[-1].name]


@pytest.mark.usefixtures("synchronized")
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_hidden_states_are_those_behind_the_part(tmp_path, device):
    """With its batch; also when the walk has moved on before the background got to write."""
    partial = tmp_path / "out.partial"
    with Journal.open(partial, {}) as journal, start(tmp_path, Files(), journal, device) as pipeline:
        for part in PARTS[:4]:
            tensors = pipeline.read(part, None)
            behind = walk(float(part.index), 4 if part.index < 2 else 2)
            pipeline.write(part, result(tensors), worker(behind, last=3))
            if part.index == 2:
                pipeline.drain()
                assert journal.notes == {"batch": 2}
                hidden = journal.hidden()
                assert hidden is not None
                assert list(hidden) == ["served/000000", "served/000001"]
                assert torch.equal(hidden["served/000001"], torch.full((1, 3), -2.0))
        pipeline.drain()
        assert journal.hidden() is None  # nothing reads what the last part with statistics hands on


@pytest.mark.usefixtures("synchronized")
def test_at_most_one_part_is_being_written(tmp_path, monkeypatch):
    running, most = 0, 0

    def slowly(*arguments: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return write_part(*arguments)

    monkeypatch.setattr("quarkcli.job.pipeline.write_part", slowly)
    with Journal.open(tmp_path / "out.partial", {}) as journal, start(tmp_path, Files(), journal, "cpu:0") as pipeline:
        work(pipeline, PARTS, lambda part: worker(walk(part.index, batch=part.index)))
        pipeline.drain()
        assert list(journal.finished) == [part.name for part in PARTS]
    assert most == 1


@pytest.mark.usefixtures("synchronized")
def test_noting_the_batch_never_loses_a_part_being_written(tmp_path, monkeypatch):
    """The journal has one writer at a time: a note that overtakes a part would write the journal without it."""
    real, threads = Journal._store, set()

    def store(self: Journal, *arguments: Any) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        real(self, *arguments)

    monkeypatch.setattr(Journal, "_store", store)
    with Journal.open(tmp_path / "out.partial", {}) as journal, start(tmp_path, Files(), journal, "cpu:0") as pipeline:
        work(pipeline, PARTS, lambda part: worker(walk(part.index, batch=8 - part.index)))
        pipeline.drain()
        assert list(journal.finished) == [part.name for part in PARTS]
        assert journal.notes == {"batch": 4}
    assert threading.main_thread().name not in threads


@pytest.mark.usefixtures("synchronized")
def test_what_is_handed_over_is_durable_when_stopping_on_purpose(tmp_path, monkeypatch):
    def slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return write_part(*arguments)

    monkeypatch.setattr("quarkcli.job.pipeline.write_part", slowly)
    with Journal.open(tmp_path / "out.partial", {}) as journal:
        with pytest.raises(Stopped), start(tmp_path, Files(), journal, "cpu:0") as pipeline:
            work(pipeline, PARTS[:2])
            raise Stopped("enough")
        assert list(journal.finished) == ["layers.0", "layers.1"]


@pytest.mark.usefixtures("synchronized")
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_failed_write_ends_the_job(tmp_path, monkeypatch, device):
    """At the latest with the next part; and what comes behind it is not noted as finished."""
    count = iter(range(10))

    def fail(*arguments: Any) -> Any:
        if next(count) == 1:
            raise ResourceError("the disk is full")
        return write_part(*arguments)

    monkeypatch.setattr("quarkcli.job.pipeline.write_part", fail)
    with Journal.open(tmp_path / "out.partial", {}) as journal:
        with (
            pytest.raises(ResourceError, match="the disk is full"),
            start(tmp_path, Files(), journal, device) as pipeline,
        ):
            work(pipeline, PARTS)
        assert list(journal.finished) == ["layers.0"]


@pytest.mark.usefixtures("synchronized")
def test_a_write_that_fails_last_is_not_overlooked(tmp_path, monkeypatch):
    def fail(*_: Any) -> Any:
        raise ResourceError("the disk is full")

    monkeypatch.setattr("quarkcli.job.pipeline.write_part", fail)
    with (
        Journal.open(tmp_path / "out.partial", {}) as journal,
        pytest.raises(ResourceError),
        start(tmp_path, Files(), journal, "cpu:0") as pipeline,
    ):
        work(pipeline, PARTS[:1])


@pytest.mark.usefixtures("synchronized")
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_failed_read_ends_the_job_with_its_own_error(tmp_path, device):
    files = Files()
    with Journal.open(tmp_path / "out.partial", {}) as journal:
        with pytest.raises(AccessError, match="gone"), start(tmp_path, files, journal, device) as pipeline:
            tensors = pipeline.read(PARTS[0], None)
            files.fail = AccessError("gone")
            pipeline.write(PARTS[0], result(tensors), worker())
            work(pipeline, PARTS[1:])
        assert list(journal.finished) == ["layers.0"]


@pytest.mark.usefixtures("synchronized")
def test_an_error_in_a_part_waits_for_the_write_under_way(tmp_path, monkeypatch):
    """No thread goes on in a directory that the journal has let go."""
    ended = []

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        written = write_part(*arguments)
        ended.append(True)
        return written

    monkeypatch.setattr("quarkcli.job.pipeline.write_part", slowly)
    with Journal.open(tmp_path / "out.partial", {}) as journal:
        with pytest.raises(RuntimeError), start(tmp_path, Files(), journal, "cpu:0") as pipeline:
            work(pipeline, PARTS[:1])
            raise RuntimeError("in a part")
        assert ended == [True]
        assert list(journal.finished) == ["layers.0"]


def test_a_part_that_waits_to_be_written_is_not_lost(tmp_path):
    """Reading the next part may fail before the writer has begun."""
    with Journal.open(tmp_path / "out.partial", {}) as journal:
        with pytest.raises(AccessError), start(tmp_path, Files(), journal, "cpu") as pipeline:
            pipeline.writer.submit(time.sleep, 0.3)
            work(pipeline, PARTS[:1])
            raise AccessError("the hub refused access")
        assert list(journal.finished) == ["layers.0"]


def test_reading_ahead_of_another_part_is_not_mistaken_for_this_one(tmp_path):
    with Journal.open(tmp_path / "out.partial", {}) as journal, start(tmp_path, Files(), journal, "cpu:0") as pipeline:
        other: Future[dict[str, torch.Tensor]] = Future()
        pipeline._reading = ("layers.4", other)
        assert list(pipeline.read(PARTS[1], None)) == ["layers.1.weight"]
