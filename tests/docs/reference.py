"""Writes docs/cli.md from the commands' own help: `make docs`. A test keeps the page fresh."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from quarkcli.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = """\
# Command line reference

Look up here each command and flag, with the text of `--help`. [Quickstart](quickstart.md) shows the usual order of
the commands. `make docs` generates this page; do not edit it.
"""


def every() -> Iterator[tuple[str, ...]]:
    """Every command in the order of the help; a group stands for its members."""
    yield ()
    top: Any = main._command()
    context = top.make_context("quark", [], resilient_parsing=True)
    for name in top.list_commands(context):
        group = top.get_command(context, name)
        members = group.list_commands(context) if hasattr(group, "list_commands") else None
        yield from ((name, member) for member in members) if members is not None else [(name,)]


def help_of(command: tuple[str, ...]) -> str:
    """`quark COMMAND --help` at a fixed width."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1"), redirect_stdout(out):
        code = main.main([*command, "--help"])
    assert code == 0, command
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def page() -> str:
    sections = [HEAD]
    for command in every():
        sections.append(f"## {' '.join(('quark', *command))}\n\n```\n{help_of(command)}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
