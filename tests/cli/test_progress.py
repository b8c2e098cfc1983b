"""What listeners print, in every mode."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence

import pytest

from quarkcli.cli import output
from quarkcli.cli import progress as progress_module
from quarkcli.cli.progress import Progress
from quarkcli.events import Event, Message, PartDone, Phase, Working

PART = PartDone(2, 6, "model.layers.0", "mxfp4", 1.25, 0.11, 300_000_000, 0, 75.0)
EVENTS = [Phase("check"), Message("fine"), Message("detail", "debug"), Message("careful", "warning"), PART]


@pytest.fixture(autouse=True)
def fresh():
    output.reset([])


def heard(capsys: pytest.CaptureFixture[str], mode: str = "auto", events: Sequence[Event] = EVENTS) -> list[str]:
    with Progress(mode) as progress:  # type: ignore[arg-type]
        for event in events:
            progress(event)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_lines(capsys):
    line = "[2/6] model.layers.0 mxfp4 1.2s output-error=1.1e-01 rss=0.3G eta=1m"
    assert heard(capsys) == ["phase: check", "fine", "warning: careful", line]


def test_none_keeps_messages(capsys):
    assert heard(capsys, mode="none") == ["fine", "warning: careful"]


@pytest.mark.parametrize(("level", "count"), [("debug", 6), ("info", 4), ("warning", 1), ("error", 0)])
def test_levels(capsys, level, count):
    output.start(log_level=level)
    lines = heard(capsys, events=[*EVENTS, Working("reading model.layers.3")])
    assert len(lines) == count
    assert ("debug: reading model.layers.3" in lines) == (level == "debug")


@pytest.mark.parametrize("mode", ["auto", "bar", "none"])
def test_quiet_keeps_warnings(capsys, mode):
    output.start(quiet=True)
    assert heard(capsys, mode=mode) == ["warning: careful"]


def test_where_files_are_is_said_whatever_the_level(capsys):
    output.start(log_level="error")
    told = heard(capsys, events=[Message("left behind", "warning", always=True), Message("careful", "warning")])
    assert told == ["warning: left behind"]


def few(layer: int) -> Message:
    text = f"model.layers.{layer}.mlp: {layer + 1} of 8 experts saw no calibration token (1, 2); the layer's stand in"
    return Message(text, "warning", many=True)


def test_warnings_of_many_layers_are_one_with_a_count(capsys):
    other = Message("model.layers.0.mlp: out of device memory", "warning", many=True)
    lines = heard(capsys, events=[few(0), few(1), other, few(2), Message("careful", "warning")])
    first = f"warning: {few(0).text}"
    assert lines == [first, f"warning: {other.text}", "warning: careful", f"{first} (and 2 more like this)"]


def test_debug_shows_each_of_many(capsys):
    output.start(log_level="debug")
    assert f"debug: {few(1).text}" in heard(capsys, events=[few(0), few(1)])


def test_phases_are_groups_on_github(capsys):
    output.start(log_format="github")
    lines = heard(capsys, events=[Phase("check"), Message("careful", "warning"), Phase("quantize"), Message("fine")])
    assert lines == [
        "::group::check", "::warning::careful", "::endgroup::", "::group::quantize", "fine", "::endgroup::",
    ]  # fmt: skip


def test_json_lines(capsys):
    output.start(json=True)
    rows = [json.loads(line) for line in heard(capsys)]
    assert [row["event"] for row in rows] == ["phase", "message", "message", "part"]
    assert rows[0]["name"] == "check"
    assert rows[2]["level"] == "warning"
    assert {key: rows[3][key] for key in ("index", "total", "seconds", "error")} == {
        "index": 2,
        "total": 6,
        "seconds": 1.25,
        "error": 0.11,
    }


def test_bar_shows_parts_and_messages(capsys):
    text = "\n".join(heard(capsys, mode="bar"))
    assert "2/6" in text
    assert "model.layers.0 mxfp4" in text
    assert "warning: careful" in text


def test_auto_is_a_bar_on_a_terminal_outside_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(output, "is_terminal", lambda name: True)
    assert Progress().mode == "bar"
    monkeypatch.setenv("CI", "true")
    assert Progress().mode == "lines"


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(progress_module, "SILENCE", 0.2)


def test_silence_is_broken(capsys, hasty):
    """The main thread may be in one long call: what it told last is said again, with how long it has been at it."""
    started = time.monotonic()
    with Progress("lines") as progress:
        progress(Phase("quantize"))
        progress(Working("running block 3, batch 1 of 2"))
        time.sleep(0.75)
    lasted = time.monotonic() - started  # longer than asked for on a busy machine
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "phase: quantize"
    assert 2 <= len(lines[1:]) <= lasted / 0.2
    said = {f"still running block 3, batch 1 of 2 ({seconds}s)" for seconds in range(round(lasted) + 1)}
    assert set(lines[1:]) <= said


def test_work_that_is_told_often_is_not_shown_often(capsys, hasty):
    with Progress("lines") as progress:
        for batch in range(60):
            progress(Working(f"batch {batch}"))
            time.sleep(0.01)
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 4


def test_silence_in_json_quiet_and_bars(capsys, hasty):
    output.start(json=True)
    with Progress("lines") as progress:
        progress(Working("at it"))
        time.sleep(0.3)
    row = json.loads(capsys.readouterr().err.splitlines()[0])
    assert (row["event"], row["what"]) == ("working", "at it (0s)")
    output.reset([])
    output.start(quiet=True)
    with Progress("lines"):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
    output.reset([])
    with Progress("bar") as progress:
        progress(Working("at it"))
        time.sleep(0.3)
    assert "at it" in capsys.readouterr().err


def test_nobody_is_left_behind(capsys):
    before = threading.active_count()
    with Progress("lines"):
        pass
    time.sleep(0.1)
    assert threading.active_count() <= before  # those of earlier tests may just end
