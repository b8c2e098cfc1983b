"""Products of families: each member once in the normal run, every combination in `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import product
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]


def each_once(*axes: Axis) -> list[Any]:
    """Every combination of the axes as parameters, slow but for a diagonal on which every value of every axis occurs.

    axes  values, or values by the names that tests are called by
    """
    named = [list(_named(axis)) for axis in axes]
    kept = {tuple(axis[step % len(axis)][0] for axis in named) for step in range(max(map(len, named)))}
    return [_parameter(case, kept) for case in product(*named)]


def slow_unless(often: Collection[str], cases: Iterable[str]) -> list[Any]:
    """Cases of one argument, slow but for those in `often`."""
    return [pytest.param(case, marks=() if case in often else pytest.mark.slow) for case in cases]


def _named(axis: Axis) -> Iterable[tuple[str, Any]]:
    return axis.items() if isinstance(axis, Mapping) else ((str(value), value) for value in axis)


def _parameter(case: tuple[tuple[str, Any], ...], kept: Collection[tuple[str, ...]]) -> Any:
    names = tuple(name for name, _ in case)
    marks = () if names in kept else pytest.mark.slow
    return pytest.param(*(value for _, value in case), id="-".join(names), marks=marks)
