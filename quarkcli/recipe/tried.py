"""Tries a native recipe part by part, so that all of its mistakes are found and not the first alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.entries import Origin
from quarkcli.recipe.expressions import Expressions
from quarkcli.recipe.load import Document
from quarkcli.recipe.mistakes import apart
from quarkcli.recipe.normalize import normalize

_REGEX = "re:"
_NAMES: tuple[tuple[catalog.Kind, str], ...] = (
    ("schemes", "scheme"), ("kv_cache", "kv_cache"), ("attention", "attention"),
)  # fmt: skip


def tried(document: Document, path: Path) -> Iterator[QuarkError]:
    """Yields the mistakes of a native recipe, part by part, where the whole cannot be read."""
    quantize = document.data.get("quantize")
    if not isinstance(quantize, Mapping):
        return
    for kind, key in _NAMES:
        name = quantize.get(key)
        if isinstance(name, str) and name != "none":
            yield from noted(located, document.origin("quantize", key), catalog.find, kind, name, path.parent)
    place = ("quantize", "quant_cfg")
    rows = quantize.get("quant_cfg")
    if rows is not None:
        yield from noted(normalize, rows, lambda path: str(document.origin(*path)), place)
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(row, Mapping) and isinstance(row.get("cfg"), Mapping | list) and row["cfg"]:
            weight = is_weight(str(row.get("quantizer_path", "")))
            where = document.blamed(*place, index, "cfg")
            yield from noted(located, where, to_spec, _attributes(row["cfg"]), weight=weight)
    yield from patterns(document)


def patterns(document: Document) -> Iterator[QuarkError]:
    """Yields the mistakes of regular expressions in entries."""
    rows = document.data.get("quantize", {})
    rows = rows.get("quant_cfg") if isinstance(rows, Mapping) else None
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        text = row.get("quantizer_path") if isinstance(row, Mapping) else None
        if isinstance(text, str) and text.startswith(_REGEX):
            where = str(document.origin("quantize", "quant_cfg", index))
            yield from noted(Expressions().matcher, text.removeprefix(_REGEX), where)


def _attributes(cfg: Any) -> Any:
    """Returns a cfg without the switch that may stand in it."""
    return {key: value for key, value in cfg.items() if key != "enable"} if isinstance(cfg, Mapping) else cfg


def noted(call: Callable[..., object], *args: Any, **kwargs: Any) -> Iterator[QuarkError]:
    """Yields the mistakes that a call raises."""
    try:
        call(*args, **kwargs)
    except (ConfigError, UsageError) as error:
        yield from apart(error)


def located(where: Origin, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns the result of `call(*args)`. A user error without a place gets the one of `where`."""
    try:
        return call(*args, **kwargs)
    except (ConfigError, UsageError) as error:
        raise ConfigError(
            error.what, where=error.where or str(where), hint=error.hint, kind=error.kind or "E-ENTRY"
        ) from error


def is_weight(pattern: str) -> bool:
    """True for a pattern that names weight or bias slots; others may mean activations as well."""
    return "weight" in pattern or "bias" in pattern
