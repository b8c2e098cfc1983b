"""docs/algorithms.md names every registered algorithm with its parameters, and no other; its table is the advice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quarkcli import algorithms
from tests.docs.algorithms import PAGE, page
from tests.docs.test_recipes_page import planned

TEXT = PAGE.read_text(encoding="utf-8")
OTHERS = {"Which one", "Adding an algorithm", "Files of other tools", "Measured"}
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def test_every_algorithm_has_a_section() -> None:
    assert SECTIONS.keys() - OTHERS == set(algorithms.names())


@pytest.mark.parametrize("name", algorithms.names())
def test_a_section_says_what_when_cost_servers_and_parameters(name: str) -> None:
    body = SECTIONS[name]
    assert re.findall(r"^\*\*(\w+)\*\*:", body, re.MULTILINE) == ["What", "When", "Cost", "Servers"]
    heads = [line.partition(":")[0] for line in body.splitlines() if line.startswith("- ")]
    said = {word for head in heads for word in re.findall(r"`(\w+)`", head)}
    assert said == set(algorithms.create(name, {}).parameters)


def test_the_advice_is_fresh() -> None:
    assert page(TEXT) == TEXT, "run 'make docs'"


def test_its_recipes_work(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        assert planned(tmp_path, block).algorithms
