"""Applies `--set a.b=value`: it replaces or adds values of a recipe file, typed as YAML. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quarkcli.errors import UsageError
from quarkcli.recipe import load
from quarkcli.recipe.entries import SETTING, Origin
from quarkcli.recipe.load import Document, Path_

_NUMBER = re.compile(r"-?\d+")


def adjusted(document: Document, settings: Sequence[str]) -> Document:
    """Returns a copy of the document with values replaced or added.

    Raises UsageError for a setting that does not fit.
    """
    for text in settings:
        key, equals, written = text.partition("=")
        if not equals or not key:
            raise UsageError(
                f"'{text}' is not KEY=VALUE", where="--set", hint="write --set calibration.samples=64", kind="E-SET"
            )
        path = _path(document.data, key)
        value = load.parse(written, f"--set {key}").data
        origin = Origin(f"{SETTING}{text}")
        places = {place: found for place, found in document.places.items() if place[: len(path)] != path}
        # What has to be made for it comes from it as well.
        made = {path[:count]: origin for count in range(1, len(path)) if _is_absent(document.data, path[:count])}
        document = Document(_with(document.data, path, value), document.file, {**places, **made, path: origin})
    return document


def _path(data: Any, key: str) -> Path_:
    """Returns a setting such as `quantize.quant_cfg.0.enable` as steps.

    Members of lists are named by number. Keys may be numbers and may have dots in them.
    """
    path: list[str | int] = []
    node, words = data, key.split(".")
    while words:
        if isinstance(node, list):
            number = int(words[0]) if _NUMBER.fullmatch(words[0]) else None
            if number is None or not 0 <= number < len(node):
                raise UsageError(
                    f"'{key}': the list has {len(node)} members, counted from 0", where="--set", kind="E-SET"
                )
            path.append(number)
            node, words = node[number], words[1:]
            continue
        if node is not None and not isinstance(node, dict):
            raise UsageError(
                f"'{key}': {node!r} is a value and has no keys",
                where="--set",
                hint=f"set it as a whole: --set '{'.'.join(map(str, path))}={{{'.'.join(words)}: VALUE}}'",
                kind="E-SET",
            )
        step, words = _step(node or {}, words)
        path.append(step)
        node = (node or {}).get(step)
    return tuple(path)


def _step(node: dict[Any, Any], words: list[str]) -> tuple[str | int, list[str]]:
    """Returns the longest key of a mapping that the words begin with, else the first word; and the words left."""
    for count in range(len(words), 0, -1):
        text = ".".join(words[:count])
        number = int(text) if _NUMBER.fullmatch(text) else None
        if text in node or (number is not None and number in node):
            return (text if text in node or number is None else number), words[count:]
    return words[0], words[1:]


def _is_absent(node: Any, path: Path_) -> bool:
    try:
        for step in path:
            node = node[step]
    except (KeyError, IndexError, TypeError):
        return True
    return node is None


def _with(node: Any, path: Path_, value: Any) -> Any:
    """Returns `node` with `value` at `path`; what it shares with the original is not changed."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(node, list):
        return [_with(item, rest, value) if index == step else item for index, item in enumerate(node)]
    known = node or {}
    return {**known, step: _with(known.get(step), rest, value)}
