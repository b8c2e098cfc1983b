"""The frame: help, version, start-up, errors, signals, closed pipes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from quarkcli import __version__
from quarkcli.cli import main
from quarkcli.cli.completion import names
from quarkcli.errors import ConfigError, ExitCode, Stopped
from quarkcli.job import run as job

HEAVY = ("torch", "transformers", "triton", "datasets", "rich", "numpy")
WITHOUT_PYDANTIC = ("--help", "--version", "quantize --help", "recipes list", "schemes list", "models list")


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command and group."""
    command = command or get_command(main.app)
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


ALL = dict(commands())
LEAVES = [path for path, command in ALL.items() if not hasattr(command, "commands")]


def test_every_promised_command_exists():
    listed = {" ".join(path) for path in LEAVES}
    assert listed == {
        "init", "quantize", "plan", "search", "eval", "verify", "compare", "convert", "push", "inspect", "report",
        "env", "explain",
        "recipes list", "recipes show", "recipes normalize", "recipes convert", "recipes schema", "recipes explain",
        "recipes validate", "recipes copy", "schemes list", "schemes show", "models list", "models show",
        "models infer", "algorithms list", "algorithms show", "data list", "data preview",
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_ends_with_two_examples_that_parse(path):
    answer = CliRunner().invoke(main.app, [*path, "--help"])
    assert answer.exit_code == 0
    assert answer.stderr == ""
    joined = answer.stdout.partition("Examples:")[2].replace("\\\n", " ")
    examples = [line.strip() for line in joined.splitlines() if line.strip()]
    assert len(examples) == 2
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "quark"
        name: tuple[str, ...] = ()
        while (*name, words[0]) in ALL and hasattr(ALL[name], "commands"):
            name = (*name, words.pop(0))
            if not hasattr(ALL[name], "commands"):
                break
        assert name[: len(path)] == path
        ALL[name].make_context(" ".join(name), words)


@pytest.mark.parametrize(
    "path", [path for path in ALL if path not in LEAVES], ids=lambda path: " ".join(path) or "quark"
)
def test_a_group_alone_prints_its_help_and_exits_2(quark, path):
    code, out, err = quark(*path)
    assert code == 2
    assert out.startswith("Usage: quark")
    assert err == ""


def test_version(quark):
    assert quark("--version") == (0, f"quark {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        *WITHOUT_PYDANTIC,
        "algorithms list",
        "recipes list --help",
        "recipes validate nvfp4",
        "plan --model demo --scheme mxfp4",
        "plan --model demo --scheme fp8 --algorithm gptq --calib-data builtin",
    ],
)
def test_light_commands_import_nothing_heavy(command):
    heavy = (*HEAVY, "pydantic") if command in WITHOUT_PYDANTIC else HEAVY
    script = (
        "import sys; from quarkcli.cli.main import main; code = main(sys.argv[1:]); "
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command.split()], capture_output=True, text=True)
    assert done.stderr == "[]\n"
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no such command 'nonsense'"),
        (["quantize"], "missing option '--model'"),
        (["quantize", "--model", "demo", "--schem", "x"], "no such option: --schem"),
        (["quantize", "--model", "demo", "--resume", "maybe"], "invalid value for '--resume'"),
        (["quantize", "--model", "demo", "--calib-samples", "0"], "invalid value for '--calib-samples'"),
        (["quantize", "--model", "demo", "--time-budget", "soon"], "'soon' is not a duration"),
        (["eval", "x", "--max-ppl-increase", "3"], "'3' is not a percentage; write 3%"),
    ],
)
def test_wrong_command_lines_exit_2_in_plain_words(quark, arguments, message):
    code, out, err = quark(*arguments)
    assert code == 2
    assert out == ""
    first, hint = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert hint.startswith("hint: run 'quark")


def test_wrong_command_line_in_json(quark):
    code, out, err = quark("quantize", "--json")
    assert code == 2
    assert out == ""
    assert json.loads(err) == {
        "schema": "quark/error/1",
        "event": "error",
        "code": 2,
        "id": "E-COMMAND-LINE",
        "what": "missing option '--model'",
        "where": "",
        "hint": "run 'quark quantize --help' to see what it takes",
    }


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def prepare(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(job, "prepare", prepare)


def test_error_and_hint_on_lines_of_their_own(quark, monkeypatch):
    fail_with(monkeypatch, ConfigError("wrong", where="recipe.yaml:3", hint="do this"))
    code, out, err = quark("plan", "--model", "demo", "--scheme", "mxfp4")
    assert code == ExitCode.CONFIG
    assert out == ""
    assert err == "error: recipe.yaml:3: wrong\nhint: do this\n"


def test_a_line_break_in_a_name_breaks_no_line(quark, monkeypatch):
    fail_with(monkeypatch, ConfigError("wrong", where="a\nb\rc.yaml:3", kind="E-ENTRY"))
    assert quark("plan", "--model", "demo", "--scheme", "mxfp4").err == "error: a\\nb\\rc.yaml:3: wrong [E-ENTRY]\n"


def test_errors_as_json(quark, monkeypatch):
    fail_with(monkeypatch, ConfigError("wrong", where="recipe.yaml:3", hint="do this"))
    code, out, err = quark("plan", "--model", "demo", "--scheme", "mxfp4", "--json")
    assert code == 3
    assert out == ""
    expected = {"code": 3, "what": "wrong", "where": "recipe.yaml:3", "hint": "do this"}
    assert json.loads(err) == {"schema": "quark/error/1", "event": "error", "id": None, **expected}


def test_stopping_on_purpose_is_no_error(quark, monkeypatch):
    fail_with(monkeypatch, Stopped("the time budget is used up", hint="run the same command again"))
    code, _, err = quark("quantize", "--model", "demo", "--scheme", "mxfp4")
    assert code == 75
    assert err == "stopped: the time budget is used up\nhint: run the same command again\n"


def test_internal_error_names_the_kind_but_no_locals(quark, monkeypatch):
    def prepare(*_: object) -> None:
        token = "hf_secret"
        raise KeyError("slot" if token else "")

    monkeypatch.setattr(job, "prepare", prepare)
    code, out, err = quark("plan", "--model", "demo", "--scheme", "mxfp4")
    assert code == 1
    assert out == ""
    assert "internal error" in err
    assert "KeyError: 'slot'" in err
    assert "QUARK_DEBUG=1" in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    assert "hf_secret" not in err


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_debug_shows_the_traceback(quark, monkeypatch, way):
    fail_with(monkeypatch, KeyError("slot"))
    if way == "environment":
        monkeypatch.setenv("QUARK_DEBUG", "1")
    code, _, err = quark("plan", "--model", "demo", "--scheme", "mxfp4", *(["--debug"] if way == "flag" else []))
    assert code == 1
    assert "Traceback (most recent call last)" in err


def test_out_of_memory_is_a_resource_error(quark, monkeypatch):
    fail_with(monkeypatch, MemoryError())
    code, _, err = quark("plan", "--model", "demo", "--scheme", "mxfp4")
    assert code == 6
    assert err.startswith("error: there is not enough memory [E-MEMORY]\nhint: ")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("begun", [True, False])
def test_signals(quark, monkeypatch, tmp_path, interruptible, number, code, word, begun):
    def run(options, tell, planned, judge) -> None:
        planned(job.prepare(options))
        if begun:
            (tmp_path / "out.partial").mkdir()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(job, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    answer = quark("quantize", "--model", "demo", "--scheme", "mxfp4", "-o", "out", "-q")
    assert answer.code == code
    assert answer.out == ""
    assert answer.err.startswith(f"stopped: {word}\n")
    assert ("run the same command again to continue; finished work is kept in" in answer.err) == begun
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_of_other_commands_promise_nothing(quark, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert quark("plan", "--model", "demo", "--scheme", "mxfp4") == (130, "", "stopped: interrupted\n")


@pytest.mark.parametrize(
    ("stream", "command", "code"), [("stdout", "recipes list", 0), ("stderr", "recipes show nope", 3)]
)
def test_a_closed_pipe_changes_nothing(stream, command, code):
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    script = "from quarkcli.cli.main import run; run()"
    done = subprocess.run([sys.executable, "-c", script, *command.split()], **streams)
    os.close(writer)
    assert done.returncode == code
    assert not done.stdout
    assert not done.stderr


def test_the_installed_command(tmp_path):
    quark = Path(sys.executable).with_name("quark")
    done = subprocess.run([quark, "schemes", "show", "nope"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown scheme 'nope' [E-SCHEME-UNKNOWN]\nhint: see 'quark schemes list'\n"


def test_completion_reads_file_names_only():
    assert {"nvfp4", "mxfp4"} <= set(names("schemes")())
