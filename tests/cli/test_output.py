"""Tables, colour, sizes."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest

from quarkcli.cli import github, output
from quarkcli.errors import UsageError
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
    assert json.loads(out) == {
        "schema": "s",
        "ok": True,
        "kl": None,
        "ppl": None,
        "sites": ["a", "b"],
        "path": "p",
        "n": [1],
    }
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


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"log_level": "debug"}, ["debug: detail", "note", "warning: careful"]),
        ({}, ["note", "warning: careful"]),
        ({"log_level": "warning"}, ["warning: careful"]),
        ({"quiet": True}, ["warning: careful"]),
        ({"quiet": True, "log_level": "debug"}, ["warning: careful"]),
        ({"quiet": True, "log_level": "error"}, []),
    ],
)
def test_levels(capsys, settings, shown):
    output.start(**settings)
    output.say("detail", "debug")
    output.note("note")
    output.warning("careful")
    output.data("data")
    output.error(UsageError("wrong", hint="right"))
    output.traceback("where")
    out, err = capsys.readouterr()
    assert out == "data\n"
    assert err.splitlines() == [*shown, "error: wrong", "hint: right", "where"]


def test_json_holds_every_line_of_stderr(capsys):
    output.start(json=True, log_level="debug")
    output.say("detail", "debug")
    output.note("note")
    output.warning("careful")
    output.event("plan", {"size": math.inf})
    output.error(UsageError("wrong\nalso: this", where="here", hint="right"))
    output.traceback("two\nlines")
    rows = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [row["event"] for row in rows] == ["message", "message", "message", "plan", "error", "traceback"]
    assert [row.get("level") for row in rows] == ["debug", "info", "warning", None, None, None]
    assert rows[4] | {"schema": "quark/error/1", "code": 2, "what": "wrong\nalso: this", "where": "here"} == rows[4]


def test_github_annotations(capsys):
    output.start(log_format="github")
    output.note("note")
    output.warning("100% sure")
    output.error(UsageError("wrong", where="a:b", hint="right"))
    assert capsys.readouterr().err.splitlines() == ["note", "::warning::100%25 sure", "::error::a:b: wrong%0Aright"]


@pytest.mark.parametrize(
    ("words", "variable", "form"),
    [
        ([], "", "text"),
        (["--json"], "", "json"),
        (["--log-format", "json"], "", "json"),
        (["--log-format=github", "--json"], "", "github"),
        (["--json"], "github", "json"),
        ([], "github", "github"),
        (["--log-format", "nonsense"], "", "text"),
    ],
)
def test_a_wrong_command_line_is_answered_in_the_format_that_it_asks_for(monkeypatch, words, variable, form):
    monkeypatch.setenv(output.FORMAT_VARIABLE, variable)
    output.reset(words)
    assert output.session.format == form


def test_the_summary_of_a_step_is_appended(monkeypatch, tmp_path, capsys):
    place = tmp_path / "summary.md"
    monkeypatch.setenv(github.SUMMARY, str(place))
    output.summarize(github.section("one", github.table([("a", "x|y"), ("", "z")])))
    output.summarize("two")
    assert place.read_text() == "### one\n\n| | |\n|---|---|\n| a | x\\|y |\n| a | z |\n\ntwo\n\n"
    monkeypatch.setenv(github.SUMMARY, str(tmp_path / "no" / "summary.md"))
    output.summarize("three")
    assert "No such file" in capsys.readouterr().err
