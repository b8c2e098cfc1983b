"""No byte of what is written without data changes unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quarkcli import dialects
from tests.golden import compare, sources, table

REWRITE = "python -m tests.golden.table rewrites the table; the commit says which rows changed, and why"
GOLDEN = table.read()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("golden")
    made = {name: str(sources.build(name, root / name)) for name in sources.SOURCES}
    return {"demo": "demo", **made}


@pytest.mark.parametrize("scheme", table.schemes())
def test_hashes(scheme: str, built: dict[str, str]) -> None:
    now: table.Rows = {}
    for model in table.MODELS:
        now |= table.rows(model, built[model], scheme)
    golden = {name: row for name, row in GOLDEN.items() if name.split()[1] == scheme}
    assert not list(table.changes(golden, now)), REWRITE


def test_the_table_has_no_row_of_what_is_gone() -> None:
    names = [name.split() for name in GOLDEN]
    assert {model for model, _, _ in names} == set(table.MODELS)
    assert {scheme for _, scheme, _ in names} <= set(table.schemes())
    assert {dialect for _, _, dialect in names} == {writer.name for writer in dialects.writers()}
    assert sum(row != table.REFUSED for row in GOLDEN.values()) > 90


def test_a_changed_bit_changes_the_row() -> None:
    tensors = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.ones(2, 2, dtype=torch.uint8)}
    first = table.hash_tensors(tensors)
    assert table.hash_tensors(dict(reversed(tensors.items()))) == first
    tensors["a"][2] = -0.0
    assert table.hash_tensors(tensors) != first
    assert list(table.changes({"m s d": ["x", "y"]}, {"m s d": ["x", "z"], "n": "refused"})) == [
        "m s d: other quantization_config", "n: new -> refused",
    ]  # fmt: skip


@pytest.mark.slow
def test_calibrated_runs_of_this_tree_are_those_of_this_tree(tmp_path: Path) -> None:
    """The comparison of two trees, on one of them twice: equal; and a run with another seed differs."""
    models = compare.build_models(tmp_path)
    runs = compare.runs(models)[:2]
    one = compare.hashes(compare.ROOT, runs, tmp_path / "one")
    two = compare.hashes(compare.ROOT, runs, tmp_path / "two")
    assert list(compare.differences(one, two)) == []
    other = [(name, [*arguments, "--seed", "7"]) for name, arguments in runs]
    assert list(compare.differences(one, compare.hashes(compare.ROOT, other, tmp_path / "three")))
