"""Writes the outputs in README.md anew: `make docs`. A test holds the page against what the commands say.

An output stands in a block behind `<!-- output: COMMAND -->`. Lines before a plan's first fact are left out where the
command is no plan, so that the same picture does not stand twice.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.docs import commands

PAGE = commands.ROOT / "README.md"
_SLOT = re.compile(r"<!-- output: (?P<command>[^\n]*) -->\n```text\n(?P<text>.*?)```\n", re.DOTALL)
_NUMBER = re.compile(r"[0-9][0-9.,e+-]*[smhGM]?\b|[▁▂▃▄▅▆▇█]+")


def outputs(page: str) -> dict[str, str]:
    """The outputs that the page shows, by command."""
    return {found["command"]: found["text"] for found in _SLOT.finditer(page)}


def made(names: list[str]) -> dict[str, str]:
    """The outputs of commands, run one after the other in one folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "home").mkdir()
        return {name: _shown(name, commands.ran(f"{name} 2>&1", Path(folder)).stdout) for name in names}


def _shown(name: str, text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith(("still ", "phase: "))]
    if not name.startswith("quark plan"):
        first = next((n for n, line in enumerate(lines) if line.startswith("[1/")), 0)
        lines = lines[first:]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def masked(text: str) -> list[str]:
    """The words of an output without its numbers, which differ by machine and load, and without its alignment."""
    return _NUMBER.sub("#", text).split()


def page(text: str) -> str:
    found = made(list(outputs(text)))
    return _SLOT.sub(lambda slot: f"<!-- output: {slot['command']} -->\n```text\n{found[slot['command']]}```\n", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
