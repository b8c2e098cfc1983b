"""The commands on the pages for people: README.md and docs/*.md.

A block that begins with ```sh runs as it stands, in one folder for each page, from top to bottom. Other blocks show
commands for models, servers and machines that are not here: every `quark` in them is parsed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from quarkcli.cli import main

ROOT = Path(__file__).resolve().parents[2]
# Generated from --help, or not for users.
LEFT_OUT = {"cli.md", "architecture.md", "benchmarks.md"}
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in LEFT_OUT)]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>[a-z]*)\n(?P<body>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_CALL = re.compile(r"(?:^|[|;&(]|\brun:|\btime|\bsrun\b.*|\btorchrun\b.*-m)\s*quark(?:cli)? (?P<rest>[^|;&)>]*)")

_PROGRAMS = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable]}
_MENTION = re.compile(r"`quark (?P<rest>[^`]+)`")


class Block(NamedTuple):
    """A fenced block: its page, the number of its first line, its language and its text."""

    page: Path
    line: int
    kind: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, found.start("body")) + 1, found["kind"], found["body"])


def mentions(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every `quark ...` in a sentence: its line on the page, and its arguments, which need not be a whole command."""
    text = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))
    for found in _MENTION.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, shlex.split(found["rest"])


def scripts(page: Path) -> list[Block]:
    """The blocks of a page that run."""
    return [block for block in blocks(page) if block.kind in _PROGRAMS]


def calls(block: Block) -> Iterator[tuple[int, list[str]]]:
    """Every call of `quark` in a block: its line on the page, and its arguments."""
    if block.kind in ("python", "json"):
        return
    joined = re.sub(r"\\\n\s*", lambda found: " " + "\0" * found[0].count("\n"), block.text)
    for number, line in enumerate(joined.split("\n")):
        for found in _CALL.finditer(line.replace("\0", "")):
            yield block.line + number, shlex.split(found["rest"], comments=True)


def parse(arguments: list[str]) -> Any:
    """Parses a command line without running it. Raises what the command line would refuse."""
    arguments = [word for given in arguments for word in _filled(given)]
    command: Any = main._command()
    context = command.make_context("quark", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)
    return context


def _filled(word: str) -> list[str]:
    """`...` stands for the model and the scheme."""
    return ["--model", "demo", "--scheme", "mxfp4"] if word == "..." else [word]


def ran(script: str, folder: Path, kind: str = "sh") -> subprocess.CompletedProcess[str]:
    """A script of bash or Python, with the `quark` of this Python, offline.

    In bash it ends at the first command that fails, and at one behind `!` that does not.
    """
    script = re.sub(r"^! (.*)$", r"if \1; then exit 99; fi", script, flags=re.MULTILINE) if kind == "sh" else script
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    home = {"HOME": str(folder / "home"), "QUARK_HOME": str(folder / "home" / "quark"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*_PROGRAMS[kind], "-c", script], cwd=folder, env={**os.environ, **own, **home},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
