"""The exact choice under a budget, against every choice there is."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarkcli.search.allocate import allocate

OPTION = st.tuples(st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=8)


def every(groups, budget):
    """(loss, cost) of every choice within the budget."""
    for choice in product(*groups):
        cost = sum(option[0] for option in choice)
        if cost <= budget:
            yield sum(option[1] for option in choice), cost


@given(GROUPS, st.integers(1, 72))
def test_nothing_loses_less(groups, budget):
    best = min(every(groups, budget), default=None)
    found = allocate(groups, budget)
    if best is None:
        assert found is None
        return
    picked = [group[index] for group, index in zip(groups, found, strict=True)]
    assert sum(option[0] for option in picked) <= budget
    assert sum(option[1] for option in picked) == pytest.approx(best[0], abs=1e-9)


def layers(count):
    """Groups of three sizes whose losses fall with their bits."""
    sizes = [(40 + 13 * (i * i % 7), (i * 37 % 11 + 1) / 100) for i in range(count)]
    return [[(size * bits, loss * 4.0 ** (4 - bits)) for bits in (4, 6, 8)] for size, loss in sizes]


@pytest.mark.parametrize("count", [7, 40])
def test_ends_are_all_low_and_all_high(count):
    groups = layers(count)
    least, most = (sum(group[at][0] for group in groups) for at in (0, -1))
    assert allocate(groups, least) == [0] * count
    assert allocate(groups, most) == [2] * count
    assert allocate(groups, 10 * most) == [2] * count
    assert allocate(groups, least - 1) is None


def test_more_budget_never_loses_more():
    groups = layers(40)
    least, most = (sum(group[at][0] for group in groups) for at in (0, -1))
    lost = []
    for budget in range(least, most + 1, (most - least) // 25):
        found = allocate(groups, budget)
        assert found is not None
        assert sum(group[i][0] for group, i in zip(groups, found, strict=True)) <= budget
        lost.append(sum(group[i][1] for group, i in zip(groups, found, strict=True)))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(lost))


def test_of_equal_losses_the_cheapest_is_taken():
    assert allocate([[(9, 0.5), (3, 0.5), (4, 0.5)]], 100) == [1]
    assert allocate([[(2, 0.5), (5, 0.7)]], 100) == [0]  # a larger option that loses more is none
