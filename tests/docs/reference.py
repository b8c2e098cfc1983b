"""Writes docs/cli.md from the commands' own help: `make docs`. A test keeps the page fresh."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from quarkcli.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = """\
# Command line reference

Look up here each command and flag, with the text of `--help`. [Quickstart](quickstart.md) shows the usual order of
the commands. `make docs` generates this page; do not edit it.
"""
COMMANDS = [
    (), ("init",), ("quantize",), ("plan",), ("eval",), ("verify",), ("compare",), ("convert",), ("push",),
    ("inspect",), ("report",),
    ("recipes", "list"), ("recipes", "show"), ("recipes", "normalize"), ("recipes", "convert"), ("recipes", "schema"),
    ("recipes", "validate"), ("recipes", "copy"),
    ("schemes", "list"), ("schemes", "show"), ("algorithms", "list"), ("algorithms", "show"),
    ("models", "list"), ("models", "show"), ("models", "infer"),
    ("data", "list"), ("data", "preview"), ("env",), ("explain",),
]  # fmt: skip


def help_of(command: tuple[str, ...]) -> str:
    """`quark COMMAND --help` at a fixed width."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1"), redirect_stdout(out):
        code = main.main([*command, "--help"])
    assert code == 0, command
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def page() -> str:
    sections = [HEAD]
    for command in COMMANDS:
        sections.append(f"## {' '.join(('quark', *command))}\n\n```\n{help_of(command)}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
