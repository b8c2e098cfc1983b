"""Turns numpy's numbers and texts into Python's own, which checks of types and YAML know."""

from __future__ import annotations

import sys
from operator import is_
from typing import Any

DEPTH = 8  # levels that a recipe's data has


def native(value: Any, depth: int = DEPTH) -> Any:
    """Returns a value with Python's own numbers and texts, also inside lists and mappings, to a depth.

    What holds nothing of numpy is returned itself, not a copy.
    """
    numpy = sys.modules.get("numpy")  # nobody has such a number before it is imported
    return value if numpy is None else _native(value, depth, numpy.generic)


def _native(value: Any, depth: int, foreign: type) -> Any:
    if isinstance(value, foreign):
        return value.item()  # type: ignore[attr-defined]
    if depth and type(value) in (list, tuple):
        return _same_or(value, type(value)(_native(one, depth - 1, foreign) for one in value))
    if depth and type(value) is dict:
        flat = [each for pair in value.items() for each in pair]
        made = [_native(each, depth - 1, foreign) for each in flat]
        return value if all(map(is_, flat, made)) else dict(zip(made[::2], made[1::2], strict=True))
    return value


def _same_or(value: Any, made: Any) -> Any:
    return value if all(map(is_, value, made)) else made
