"""A short campaign; `make fuzz SEED=N` is the long one."""

from __future__ import annotations

from random import Random

import pytest

from tests.fuzz import mutate
from tests.fuzz.campaign import campaign
from tests.fuzz.cases import KINDS


@pytest.mark.slow
def test_a_short_campaign() -> None:
    problems, counts = campaign(seed=0, seconds=40)
    assert not problems
    assert counts.total() > 10


@pytest.mark.slow
def test_a_case_is_the_same_again() -> None:
    first, again = (campaign(5, 60, "report", 3, 2)[1] for _ in range(2))
    assert first == again
    assert first.total() == 2


def test_changes_follow_from_the_seed() -> None:
    tree = {"a": [1, {"b": "x"}], "c": None}
    texts = {mutate.json_bytes(tree, Random(number)) for number in range(200)}
    assert texts == {mutate.json_bytes(tree, Random(number)) for number in range(200)}
    assert len({content for content, _ in texts}) > 80
    assert tree == {"a": [1, {"b": "x"}], "c": None}
    assert all(weight > 0 for weight, _ in KINDS.values())
