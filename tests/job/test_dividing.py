"""What each rank gets: parts by bytes, problems by cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from quarkcli.forward.group import dealt
from quarkcli.job.dividing import divided
from quarkcli.job.problems import in_order, owners
from quarkcli.plan.model import Part
from tests import runs

SIZES = [90, 10, 10, 10, 40, 40, 1, 9]


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_parts_are_divided_by_bytes(ranks: int) -> None:
    parts = [Part(index, f"part{index}", "block", (), index) for index in range(len(SIZES))]
    sizes = {part.name: size for part, size in zip(parts, SIZES, strict=True)}
    found = divided(parts, sizes, ranks)
    assert len(found) == ranks
    assert sorted(part.index for own in found for part in own) == list(range(len(SIZES)))
    assert all([part.index for part in own] == sorted(part.index for part in own) for own in found)
    load = [sum(sizes[part.name] for part in own) for own in found]
    assert max(load) <= max(90, sum(SIZES) / ranks + 10)


def test_of_equal_loads_the_first_gets_more() -> None:
    assert dealt([1, 5, 5, 3, 3, 2], 3) == [1, 0, 1, 2, 2, 0]
    assert dealt([2**60 + 1, 2**60, 1, 1], 2) == [0, 1, 1, 0]  # exact where sizes are whole numbers
    assert dealt([], 2) == []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_problems_are_shared_out_whole(ranks: int, tmp_path: Path) -> None:
    """Weights that read one activation of one expert have one rank, and every rank has about as much to do."""
    plan = runs.prepare(runs.build("mixtral", tmp_path / "m"), scheme="int4_wo_128").plan
    targets = list(plan.quantized(1))
    found = owners(targets, ranks)
    assert found.keys() == {target.name for target in targets}
    together: dict[object, set[int]] = {}
    cost = [0] * ranks
    for key, target in in_order(targets):
        together.setdefault(key, set()).add(found[target.name])
        cost[found[target.name]] += target.shape[1] ** 2 * target.shape[0]
    assert all(len(own) == 1 for own in together.values())
    assert min(cost) > 0.5 * max(cost)
    assert {target.name for _, target in in_order(targets)} == found.keys()
