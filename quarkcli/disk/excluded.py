"""Compares a config's list of left-out modules with the files: each linear is quantized, or in the list.

An entry that is missing makes a loader look for codes that are not there; one too many makes it pass over scales.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from quarkcli.dialects.base import Reader
from quarkcli.errors import CheckError, ConfigError, ModelError, some
from quarkcli.family import Layout, Weight
from quarkcli.recipe.expressions import Expressions

_MARK = "re:"


def check(reader: Reader, config: Mapping[str, Any], layout: Layout, quantized: Iterable[str]) -> str:
    """Returns the check made. Raises CheckError for linears that are left in or out against the files."""
    found, quantized = reader.left_out(config), set(quantized)
    _check_head(reader, config, layout, quantized)
    if not found:
        return "the config has no list of modules that are not quantized"
    entries = Entries(entry for listed in found.values() for entry in listed)
    whole = reader.unlisted | layout.unlisted
    kept = {name for name, weight in layout.weights.items() if not _roles(layout, weight) & whole} - quantized
    if layout.tied_head and reader.lists_tied and "head" not in reader.unlisted:
        kept.add(layout.tied_head.removesuffix(".weight"))
    missing = sorted(kept - reader.untouched(config, kept) - entries.left(kept, loosely=True))
    surplus = sorted(entries.left(quantized, loosely=reader.lists_parts))
    where = " and ".join(found)
    if missing:
        raise CheckError(
            f"{len(missing)} modules are not quantized, but {where} does not list them: {some(missing)}",
            kind="E-CHECK-EXCLUDED",
        )
    if surplus:
        raise CheckError(
            f"{len(surplus)} modules are quantized, but {where} lists them: {some(surplus)}", kind="E-CHECK-EXCLUDED"
        )
    return f"{where} lists exactly the {len(kept)} linear modules that are not quantized"


def _roles(layout: Layout, weight: Weight) -> set[str]:
    """Returns the role of a weight, and the one that it is left alone for."""
    return {weight.role, layout.protected.get(weight.name, weight.role)}


def _check_head(reader: Reader, config: Mapping[str, Any], layout: Layout, quantized: set[str]) -> None:
    """Raises CheckError where a config says otherwise of the head than the files."""
    heads = {name for name, weight in layout.weights.items() if weight.role == "head"}
    said, is_quantized = config.get(reader.head_key) is True, bool(heads & quantized)
    if reader.head_key and said != is_quantized:
        what = "is quantized, but" if is_quantized else "is not quantized, but"
        where = some(sorted(heads)) if heads else "the head"
        raise CheckError(f"{what} {reader.head_key} is {str(said).lower()}", where=where, kind="E-CHECK-EXCLUDED")


class Entries:
    """The entries of such lists: names, parents of modules, globs, and `re:` patterns that match from the start."""

    def __init__(self, texts: Iterable[str]) -> None:
        listed = list(dict.fromkeys(texts))
        self.patterns = [text.removeprefix(_MARK) for text in listed if text.startswith(_MARK)]
        self.globs = [text for text in listed if any(sign in text for sign in "*?[") and not text.startswith(_MARK)]
        self.names = {text for text in listed if text not in self.globs and not text.startswith(_MARK)}

    def left(self, modules: Iterable[str], *, loosely: bool = False) -> set[str]:
        """Returns the modules that an entry speaks of. `loosely`: also where a name is part of a module's name."""
        modules = set(modules)
        found = {name for name in modules if any(parent in self.names for parent in _parents(name))}
        for glob in self.globs:
            found |= {*fnmatch.filter(modules - found, glob), *fnmatch.filter(modules - found, f"{glob}.*")}
        found |= self._matched(modules - found)
        if loosely:
            found |= {name for name in modules - found if any(part in name for part in self.names)}
        return found

    def _matched(self, modules: set[str]) -> set[str]:
        expressions = Expressions("match")
        try:
            matchers = [expressions.matcher(pattern) for pattern in self.patterns]
            expressions.learn(self.patterns, modules)
            return {name for name in modules if any(match(name) for match in matchers)}
        except ConfigError as error:
            raise ModelError(
                error.what, where="quantization_config", hint=error.hint, kind="E-SOURCE-CONFIG"
            ) from error


def _parents(name: str) -> Iterable[str]:
    """Returns a name and all of its parents."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))
