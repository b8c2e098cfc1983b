"""For programs: with --json every line of stderr is a JSON object, whatever a command, a library or a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import typer

from quarkcli.cli import main

# A command line in a process of its own, with chatter of Python, of a library's logger and of descriptor 2.
CHATTER = """
import logging, os, sys, warnings
from quarkcli.api import checkpoints
from quarkcli.cli import main
from quarkcli.errors import CheckError

def verify(*given, **more):
    print("a library prints", file=sys.stderr)
    logging.getLogger("some.library").warning("a library logs")
    warnings.showwarning = lambda *given, **more: print("a warning", file=sys.stderr)
    warnings.warn("careful", UserWarning)
    os.write(2, b"a library in C prints, \\xff")
    raise CheckError("wrong")

checkpoints.verify = verify
main.run()
"""


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def called(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHATTER, *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_lines_of_libraries_are_kept_out() -> None:
    done = called("verify", "out", "--json")
    assert done.returncode == 8
    assert [row["event"] for row in rows(done.stderr)] == ["error"]


def test_lines_of_libraries_are_events_for_debug() -> None:
    done = called("verify", "out", "--json", "--log-level", "debug")
    found = rows(done.stderr)
    texts = [row["text"] for row in found if row["event"] == "library"]
    assert "a library prints" in texts and "a library logs" in texts and texts[-1].startswith("a library in C prints")
    assert "error" in {row["event"] for row in found}


def test_an_interrupted_command_answers_in_json() -> None:
    waiting = "import os, sys, time; from quarkcli.cli import main; from quarkcli.api import checkpoints\n"
    waiting += "def verify(*given, **more):\n    print('ready', flush=True)\n    time.sleep(30)\n"
    waiting += "checkpoints.verify = verify\nmain.run()"
    command = [sys.executable, "-c", waiting, "verify", "x", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=10) == 130
    assert [(row["event"], row["code"], row["what"]) for row in rows(errors)] == [("error", 130, "interrupted")]


def commands(command: object, name: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [name]
    return [path for key, one in inner.items() for path in commands(one, (*name, key))]


@pytest.mark.parametrize("path", commands(typer.main.get_command(main.app)), ids=" ".join)
def test_a_wrong_command_line_of_every_command(quark, path):
    """Also where the command itself has no --json."""
    code, out, err = quark(*path, "--no-such-flag", "--json")
    assert (code, out) == (2, "")
    (row,) = rows(err)
    assert (row["event"], row["code"]) == ("error", 2)


@pytest.mark.parametrize("words", [(), ("recipes",), ("nonsense",), ("recipes", "nonsense")])
def test_no_command(quark, words):
    code, _, err = quark(*words, "--json")
    assert code == 2
    assert all(row["event"] == "error" for row in rows(err))
