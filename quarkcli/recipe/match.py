"""Matches patterns on slot and module names: shell globs on the whole name, or `re:` and a regular expression."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from quarkcli.recipe.expressions import Expressions, as_typed


class Patterns:
    """The patterns of one file."""

    def __init__(self) -> None:
        self._expressions = Expressions()

    def matcher(self, pattern: str, where: str = "") -> Callable[[str], object]:
        """Returns a matcher for whole names. Raises ConfigError with the place `where` for an invalid pattern."""
        if pattern.startswith("re:"):
            return self._expressions.matcher(pattern[3:], where)
        return _glob(pattern).fullmatch

    def learn(self, patterns: Iterable[str], names: Iterable[str]) -> None:
        """Says that patterns will be tried on these names, where there are many (see `Expressions`)."""
        self._expressions.learn((pattern[3:] for pattern in patterns if pattern.startswith("re:")), names)


def matchers(rows: Iterable[tuple[str, list[str]]], names: Iterable[str]) -> list[tuple[str, Callable[[str], object]]]:
    """Returns (key, matcher) of every pattern of one file, given as keys with their patterns.

    `names` will be asked for.
    """
    file, listed = Patterns(), [(key, pattern) for key, own in rows for pattern in own]
    found = [(key, file.matcher(pattern)) for key, pattern in listed]
    file.learn([pattern for _, pattern in listed], names)
    return found


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    # The translation gives up no `*` that has found its text (atomic groups), so the time is linear.
    return re.compile(fnmatch.translate(pattern))


def matches(pattern: str, candidates: Iterable[str]) -> bool:
    """True when one of the candidate names matches as a whole."""
    return any(map(Patterns().matcher(pattern), candidates))


_SLOT = re.compile(r"\.[a-z]+_quantizer$")
_FLAGS = re.compile(r"(?:\(\?[aiLmsux]+\))*")
NUMBER = re.compile(r"(?<![^.\n])[0-9]+(?![^.\n])")


def fold(names: str) -> str:
    """Returns the names with `0` for every number that is a step of its own: `layers.0.w1` for `layers.12.w1`."""
    return NUMBER.sub("0", names)


def starred(name: str) -> str:
    """Returns a name with `*` for every number behind a dot: `layers.*.w1` of `layers.12.w1`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def ignores_numbers(pattern: str) -> bool:
    """True for a shell pattern that matches a name exactly when it matches the folded one.

    So do those without `?` and `[` whose digits stand beside other characters of a step: only `*` can then stand for
    a number that is a step of its own, and it stands for any.
    """
    if pattern.startswith("re:") or "?" in pattern or "[" in pattern:
        return False
    steps = (step for step in re.split(r"[.*]", pattern) if any("0" <= c <= "9" for c in step))
    return all(re.search(r"[^0-9]", step) for step in steps)


def with_flags(text: str) -> tuple[str, str]:
    """Returns the flags for all of an expression, which may stand at its beginning only, and the rest: `(?i)`, `a`."""
    found = _FLAGS.match(text)
    end = found.end() if found is not None else 0
    return text[:end], text[end:]


def slot_pattern(module: str, slot: str) -> str:
    """Returns the slot pattern of a module pattern.

    `*q_proj` gives `*q_proj.weight_quantizer`, and `*` gives `*.weight_quantizer`.
    """
    if not module.startswith("re:"):
        return f"{module}.{slot}"
    flags, rest = with_flags(module[3:])
    return f"re:{flags}(?:{rest})\\.{slot}"


def module_pattern(pattern: str) -> str:
    """Returns the module pattern that `slot_pattern` was given; any other pattern as it is."""
    if pattern.startswith("re:"):
        return f"re:{as_typed(pattern[3:])}"
    return _SLOT.sub("", pattern)
