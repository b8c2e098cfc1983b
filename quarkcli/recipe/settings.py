"""`--set a.b=value`: values of a recipe file replaced or added, typed as YAML. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quarkcli.errors import UsageError
from quarkcli.recipe import load
from quarkcli.recipe.entries import Origin
from quarkcli.recipe.load import Document, Path_

_NUMBER = re.compile(r"-?\d+")


def adjusted(document: Document, settings: Sequence[str]) -> Document:
    """A copy of the document with values replaced or added. Raises UsageError for a setting that does not fit."""
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"'{text}' is not KEY=VALUE", where="--set", hint="--set calibration.samples=64")
        path = _path(document.data, key)
        places = {place: found for place, found in document.places.items() if place[: len(path)] != path}
        data = _with(document.data, path, load.parse(value, f"--set {key}").data)
        document = Document(data, document.file, {**places, path: Origin(f"--set {text}")})
    return document


def _path(data: Any, key: str) -> Path_:
    """`quantize.quant_cfg.0.enable` as steps: members of lists by number, and keys, which may be numbers too."""
    path: list[str | int] = []
    node = data
    for word in key.split("."):
        number = int(word) if _NUMBER.fullmatch(word) else None
        if isinstance(node, list):
            if number is None or not 0 <= number < len(node):
                raise UsageError(f"'{key}': the list has {len(node)} members, counted from 0", where="--set")
            path.append(number)
            node = node[number]
            continue
        if node is not None and not isinstance(node, dict):
            raise UsageError(f"'{key}': {node!r} has no parts", where="--set", hint="--set calibration.samples=64")
        step = number if number is not None and number in (node or {}) else word
        path.append(step)
        node = (node or {}).get(step)
    return tuple(path)


def _with(node: Any, path: Path_, value: Any) -> Any:
    """`node` with `value` at `path`; what it shares with the original is not changed."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(node, list):
        return [_with(item, rest, value) if index == step else item for index, item in enumerate(node)]
    known = node or {}
    return {**known, step: _with(known.get(step), rest, value)}
