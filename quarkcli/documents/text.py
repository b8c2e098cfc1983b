"""Parses JSON from bytes. Unreadable text is a ModelError with the place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from quarkcli.errors import ModelError


def parse(content: bytes, where: str, *, unique: bool = False, paths: bool = False) -> Any:
    """Returns the value of a JSON text in UTF-8.

    Raises ModelError with line and column, also for half a surrogate pair.

    unique   whether a key that stands twice is an error
    paths    whether half a surrogate pair may stand for a byte of a path that is no text
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"not valid JSON: {error.msg}", where=f"{where}:{error.lineno}:{error.colno}", kind="E-JSON-DAMAGED"
        ) from error
    except RecursionError as error:
        raise ModelError("not valid JSON: nested too deep", where=where, kind="E-JSON-DAMAGED") from error
    except ValueError as error:  # bytes that are no UTF-8, numbers of more digits than Python reads
        raise ModelError(f"not valid JSON: {error}", where=where, kind="E-JSON-DAMAGED") from error
    if not paths and ("\\ud" in text or "\\uD" in text):
        half = next((place for place, found in _texts(value) if not _is_text(found)), None)
        if half is not None:
            raise ModelError(
                f"{half or 'it'} has half a surrogate pair, which UTF-8 does not allow",
                where=where,
                kind="E-JSON-DAMAGED",
            )
    return value


def parse_object(content: bytes, where: str, *, paths: bool = False) -> dict[str, Any]:
    """As `parse`, of a text that must hold an object."""
    value = parse(content, where, paths=paths)
    if not isinstance(value, dict):
        raise ModelError("must hold a JSON object", where=where, kind="E-JSON-SHAPE")
    return value


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text inside, keys too, with the path to it."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield f"a key of {at or 'the object'}", key
            yield from _texts(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{at}.{index}" if at else str(index))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)
