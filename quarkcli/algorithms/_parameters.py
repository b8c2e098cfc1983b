"""Checks the parameters that recipes give algorithms: each returns the value, or raises ConfigError that names it."""

from __future__ import annotations

from typing import Any

from quarkcli.errors import ConfigError

AUTO = "auto"


def flag(name: str, value: Any) -> bool:
    """Returns a parameter that must be true or false."""
    if not isinstance(value, bool):
        raise ConfigError(
            f"{name} must be true or false, not {value!r}", where="algorithm", kind="E-ALGORITHM-PARAMETER"
        )
    return value


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a parameter that must be a whole number."""
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)
    if not fits:
        span = f"from {least}" + (f" to {most}" if most is not None else "")
        raise ConfigError(
            f"{name} must be a whole number {span}, not {value!r}", where="algorithm", kind="E-ALGORITHM-PARAMETER"
        )
    return int(value)


def share(name: str, value: Any) -> float:
    """Returns a parameter that must lie between 0 and 1, neither of them."""
    if not _is_share(value):
        raise ConfigError(
            f"{name} must lie between 0 and 1, not {value!r}", where="algorithm", kind="E-ALGORITHM-PARAMETER"
        )
    return float(value)


def auto_share(name: str, value: Any) -> float | None:
    """Returns a parameter that must lie between 0 and 1, neither of them; None for the word auto."""
    if value == AUTO:
        return None
    if not _is_share(value):
        raise ConfigError(
            f"{name} must be auto or lie between 0 and 1, not {value!r}",
            where="algorithm",
            kind="E-ALGORITHM-PARAMETER",
        )
    return float(value)


def part(name: str, value: Any) -> float:
    """Returns a parameter that must be a number from 0 to 1."""
    if not _is_part(value):
        raise ConfigError(
            f"{name} must be a number from 0 to 1, not {value!r}", where="algorithm", kind="E-ALGORITHM-PARAMETER"
        )
    return float(value)


def auto_part(name: str, value: Any) -> float | None:
    """Returns a parameter that must be a number from 0 to 1; None for the word auto."""
    if value == AUTO:
        return None
    if not _is_part(value):
        raise ConfigError(
            f"{name} must be auto or a number from 0 to 1, not {value!r}",
            where="algorithm",
            kind="E-ALGORITHM-PARAMETER",
        )
    return float(value)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Returns a parameter that must be one of some words, numbers or truth values, and of its type."""
    for known in allowed:
        if type(known) is type(value) and known == value:
            return known
    shown = ", ".join(str(each).lower() if isinstance(each, bool) else str(each) for each in allowed)
    raise ConfigError(f"{name} must be one of {shown}, not {value!r}", where="algorithm", kind="E-ALGORITHM-PARAMETER")


def on_off(value: Any) -> Any:
    """Returns the words on and off for what YAML reads as truth values; anything else as it is."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def _is_share(value: Any) -> bool:
    return _is_part(value) and 0 < value < 1


def _is_part(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
