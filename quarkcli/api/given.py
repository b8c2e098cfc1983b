"""Reads arguments of Python calls that follow AMD Quark's, and refuses those of another type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from quarkcli.errors import ConfigError


def wrong(what: str, *, where: str = "", hint: str = "") -> ConfigError:
    return ConfigError(what, where=where, hint=hint, kind="E-PYTHON-VALUE")


def as_text(value: Any, where: str, hint: str = "") -> str:
    """Returns a text. Raises ConfigError for anything else."""
    if not isinstance(value, str):
        raise wrong(f"{where} must be text, not {value!r:.60}", hint=hint)
    return value


def as_mapping(value: Any, where: str) -> dict[Any, Any]:
    """Returns a mapping, or the fields of one of amd-quark's own objects; none for None. Raises ConfigError."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if value is not None and not isinstance(value, Mapping):
        raise wrong(f"a mapping is needed, not {value!r:.60}", where=where)
    return dict(value or {})


def as_names(value: Any, where: str) -> list[str]:
    """Returns a list of names or patterns. Raises ConfigError for anything else, a single text too."""
    found: list[Any] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [None]
    if not all(isinstance(name, str) for name in found):
        hint = f"write [{value!r}]" if isinstance(value, str) else ""
        raise wrong(f"a list of names is needed, not {value!r:.60}", where=where, hint=hint)
    return found
