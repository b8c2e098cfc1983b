"""The blocks of docs/api.md run, one after the other, and the page names all of the API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import quarkcli
from tests.docs.reference import PAGE

TEXT = (PAGE.parent / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == TEXT.count("```python") == 7
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"docs/api.md, block {number}", "exec"), names)


def test_every_name_stands_on_the_page() -> None:
    unsaid = {name for name in quarkcli.__all__ if not re.search(rf"\b{name}\b", TEXT)}
    assert unsaid == {"__version__"}
