"""One change at random in a tree of plain data, a text or a run of bytes; each says what it did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any

ESCAPE = "\x1b]0;title\x07"
DIGITS = "9" * 5000
# Stands for a number that no program can make; put into the text in its place.
_HUGE = "@huge@"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0",
    "re:(a+)+(?!x)b", "../../x", "\ud800", "\0", ESCAPE, "ß" * 9, "long" * 5000, [], [[]], ["a"], [None], [[["a"]]],
    [-1], {}, {"a": 1}, {"a": {"b": []}}, _HUGE,
)  # fmt: skip
_PIECES = (
    b"\xff",
    b"\0",
    b"\n",
    b"{",
    b"]",
    b'"',
    b":",
    b"-",
    b"9" * 30,
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"&a",
    b"*a",
    b"!!x ",
)

Place = tuple[str | int, ...]


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Paths to every value inside; of long lists the first three."""
    keys = tree if isinstance(tree, dict) else range(min(len(tree), 3)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(tree[key], (*at, key))


def value(tree: Any, random: Random) -> tuple[Any, str]:
    """The tree with one value replaced, removed, doubled or added."""
    changed = deepcopy(tree)
    at = random.choice(list(places(tree)) or [()])
    if not at:
        return random.choice(VALUES), "the whole"
    parent = changed
    for key in at[:-1]:
        parent = parent[key]
    key, where, kind = at[-1], ".".join(map(str, at)), random.random()
    if kind < 0.1:
        del parent[key]
        return changed, f"{where} removed"
    new = random.choice(VALUES)
    if kind < 0.15 and isinstance(parent, dict):
        parent[random.choice(["x", ESCAPE, "\ud800", "\u00e9"])] = new
        return changed, f"{'.'.join(map(str, at[:-1])) or 'top'} has one more: {new!r:.40}"
    if kind < 0.2 and isinstance(parent, list):
        parent.insert(key, deepcopy(parent[key]))
        return changed, f"{where} doubled"
    if kind < 0.3 and isinstance(parent[key], int | float):
        new = parent[key] * random.choice([-1, 2, 1000, 0.5]) + random.choice([0, 1])
    parent[key] = new
    return changed, f"{where} = {new!r:.40}"


def dump(tree: Any) -> bytes:
    """JSON, with the number that is none."""
    return json.dumps(tree, indent=1).replace(f'"{_HUGE}"', DIGITS).encode()


def json_bytes(tree: Any, random: Random) -> tuple[bytes, str]:
    """A JSON text with one value changed, at times nested too deep or damaged as a text."""
    kind = random.random()
    if kind < 0.05:
        return b"[" * 100_000, "nested too deep"
    if kind < 0.15:
        return data(dump(tree), random)
    changed, what = value(tree, random)
    return dump(changed), what


def data(given: bytes, random: Random) -> tuple[bytes, str]:
    """Bytes with one piece removed, doubled, replaced or put in."""
    start = random.randrange(len(given) + 1)
    length = random.choice([1, 1, 2, 8, 40])
    match random.randrange(5):
        case 0:
            return given[:start] + given[start + length :], f"{length} bytes removed at {start}"
        case 1:
            return given[:start], f"cut at {start}"
        case 2:
            return given[:start] + given[start : start + length] * 2 + given[start + length :], f"doubled at {start}"
        case 3:
            piece = random.randbytes(length)
            return given[:start] + piece + given[start + length :], f"{piece!r} at {start}"
    piece = random.choice(_PIECES)
    return given[:start] + piece + given[start:], f"{piece!r} put in at {start}"


def lines(given: str, random: Random) -> tuple[str, str]:
    """A text with one line removed, doubled, indented or exchanged with another."""
    rows = given.splitlines()
    one, other = random.randrange(len(rows)), random.randrange(len(rows))
    match random.randrange(4):
        case 0:
            del rows[one]
        case 1:
            rows.insert(other, rows[one])
        case 2:
            rows[one] = "  " + rows[one]
        case _:
            rows[one], rows[other] = rows[other], rows[one]
    return "\n".join(rows) + "\n", f"lines {one + 1} and {other + 1}"
