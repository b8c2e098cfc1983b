"""What listeners print, in every mode."""

from __future__ import annotations

import json

import pytest

from quarkcli.cli import output
from quarkcli.cli.progress import Progress
from quarkcli.events import Message, PartDone, Phase

PART = PartDone(2, 6, "model.layers.0", "mxfp4", 1.25, 0.11, 300_000_000, 0, 75.0)
EVENTS = [Phase("check"), Message("fine"), Message("detail", "debug"), Message("careful", "warning"), PART]


@pytest.fixture(autouse=True)
def fresh():
    output.reset([])


def heard(capsys: pytest.CaptureFixture[str], **settings: object) -> list[str]:
    with Progress(**settings) as progress:  # type: ignore[arg-type]
        for event in EVENTS:
            progress(event)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_lines(capsys):
    line = "[2/6] model.layers.0 mxfp4 1.2s err=1.1e-01 rss=0.3G eta=1m"
    assert heard(capsys) == ["phase: check", "fine", "warning: careful", line]


def test_none_keeps_messages(capsys):
    assert heard(capsys, mode="none") == ["fine", "warning: careful"]


@pytest.mark.parametrize(("level", "count"), [("debug", 5), ("info", 4), ("warning", 3)])
def test_levels(capsys, level, count):
    assert len(heard(capsys, level=level)) == count


def test_quiet(capsys):
    output.start(quiet=True)
    assert heard(capsys) == []
    assert heard(capsys, mode="bar") == []


def test_json_lines(capsys):
    rows = [json.loads(line) for line in heard(capsys, json=True)]
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
