"""Tables, colour, sizes."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest

from quarkcli.cli import output
from tests.cli.conftest import HUSHED


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    output.reset([])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3676496, "3.68 MB"), (14.2e9, "14.2 GB"), (2e12, "2 TB")],
)
def test_size(count, text):
    assert output.size(count) == text


def test_plain_tables_are_aligned_and_never_cut(capsys):
    long = "model.layers.*." + "x" * 300
    output.table(("NAME", "COUNT"), [(long, 4), ("[awq]", 12)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{long}  4"
    assert lines[2] == f"{'[awq]'.ljust(len(long))}  12"
    assert lines[0] == f"{'NAME'.ljust(len(long))}  COUNT"


def test_tables_on_a_terminal_keep_brackets(capsys, monkeypatch):
    monkeypatch.setattr(output, "is_terminal", lambda name: True)
    monkeypatch.setenv("NO_COLOR", "1")
    output.table(("NAME",), [("quark[awq]",)])
    assert "quark[awq]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "terminal", "coloured"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"GITHUB_ACTIONS": "true"}, False, False),
    ],
)
def test_colour(monkeypatch, environment, terminal, coloured):
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", stream)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert output.has_colour("stdout") == coloured
    assert output.paint("x", "bold", "stdout") == ("\x1b[1mx\x1b[0m" if coloured else "x")


def test_json_is_valid_for_any_number(capsys):
    output.json_data(
        {"schema": "s", "kl": math.nan, "ppl": math.inf, "sites": {"b", "a"}, "path": Path("p"), "n": (1,)}
    )
    out = capsys.readouterr().out
    assert json.loads(out) == {"schema": "s", "kl": None, "ppl": None, "sites": ["a", "b"], "path": "p", "n": [1]}
    assert "NaN" not in out


def test_libraries_are_hushed_off_a_terminal_and_a_choice_stays(monkeypatch):
    for name in HUSHED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.setattr(output, "is_terminal", lambda name: True)
    output.start()
    assert "TQDM_DISABLE" not in os.environ
    monkeypatch.setattr(output, "is_terminal", lambda name: False)
    output.start()
    assert os.environ["TQDM_DISABLE"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_quiet_drops_notes_only(capsys):
    output.start(quiet=True)
    output.note("note")
    output.data("data")
    output.raw("raw")
    out, err = capsys.readouterr()
    assert (out, err) == ("data\n", "raw\n")
