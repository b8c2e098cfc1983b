"""docs/serving.md has the matrix that writers and recorded runs give; the pages of consumers have the runs."""

from __future__ import annotations

import re

import pytest

from quarkcli import dialects, servers
from quarkcli.cli import listings
from quarkcli.recipe import catalog
from tests.consumers import record
from tests.consumers.pairs import DEMO
from tests.docs.serving import FOLDER, PAGE, SHORT, cells, page, pages


def test_the_tables_are_fresh() -> None:
    for path, lines in pages().items():
        text = path.read_text(encoding="utf-8")
        assert page(text, lines) == text, f"run 'make docs' ({path.name})"


def test_every_dialect_stands_in_it() -> None:
    head = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| scheme |"))
    assert head.count("`") == 2 * len(dialects.writers())


def test_every_run_stands_in_it() -> None:
    """So that what was loaded is what the writers say today."""
    found = cells()
    for run in record.read():
        if run.model == DEMO and not run.cache:
            assert f"{SHORT[run.consumer]}<sup>" in found[run.scheme, run.dialect]


def test_every_server_has_a_page() -> None:
    index = PAGE.read_text(encoding="utf-8")
    assert {path.stem for path in FOLDER.glob("*.md")} == {*servers.names()}
    for path in FOLDER.glob("*.md"):
        assert f"(serving/{path.name})" in index


# First words of a row of the tables of README and choosing.md -> generations.
GPUS = {
    "NVIDIA Blackwell": ["blackwell"],
    "NVIDIA Hopper": ["hopper"],
    "NVIDIA Hopper, Ada": ["ada", "hopper"],
    "NVIDIA Ada": ["ada"],
    "NVIDIA Ampere": ["ampere"],
    "AMD MI350": ["cdna4"],
    "AMD MI350, MI355": ["cdna4"],
    "AMD MI300": ["cdna3"],
    "AMD MI300, MI325": ["cdna3"],
}
FAST, ANY = ("fast",), ("fast", "weight-only")


def _runs(scheme: str, server: str, generation: str) -> str | None:
    facts = (listings.of_file("schemes", catalog.files("schemes")[scheme]) or {})["servers"].get(server)
    return facts["gpus"].get(generation) if facts else None


def _rows(name: str, first: int) -> list[tuple[list[str], list[list[str]], str]]:
    """Generations, the schemes of three columns, and the last cell, of each row about GPUs."""
    lines = (PAGE.parents[1] / name).read_text(encoding="utf-8").splitlines()
    cells = [
        [part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith(("| NV", "| AMD"))
    ]
    return [
        (GPUS[row[0].partition(" (")[0]], [re.findall("`(.*?)`", cell) for cell in row[first : first + 3]], row[-1])
        for row in cells
    ]


@pytest.mark.parametrize(("name", "first"), [("README.md", 1), ("docs/choosing.md", 2)])
def test_what_the_pages_choose_is_run_by_vllm(name: str, first: int) -> None:
    rows = _rows(name, first)
    assert len(rows) >= 5
    for generations, columns, _ in rows:
        for schemes, ways in zip(columns, (FAST, ANY, FAST), strict=True):
            assert schemes
            found = {(scheme, one): _runs(scheme, "vllm", one) for scheme in schemes for one in generations}
            assert all(way in ways for way in found.values()), found


def test_readme_says_what_sglang_does_not_run() -> None:
    for generations, columns, said in _rows("README.md", 1):
        chosen = dict.fromkeys(scheme for schemes in columns for scheme in schemes)
        lost = [one for one in chosen if not all(_runs(one, "sglang", where) for where in generations)]
        assert said == (f"not {', '.join(f'`{one}`' for one in lost)}" if lost else "all of them"), generations
