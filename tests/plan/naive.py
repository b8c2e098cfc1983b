"""The ordered list the slow way: every entry tried on every name of every slot. What plans are measured against."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from quarkcli.family import Layout
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.entries import Entry
from quarkcli.spec import TensorSpec


def slots(layout: Layout) -> Iterator[tuple[str, list[str], str, bool]]:
    """(slot, all its names, class of its module, of a weight or bias)."""
    for weight in layout.weights.values():
        for kind in ("weight", "input", "output", "bias"):
            names = [f"{name}.{kind}_quantizer" for name in (weight.name, *weight.aliases)]
            yield names[0], names, weight.parent_class, kind in ("weight", "bias")
    for module in layout.attention:
        for kind in "qkvp":
            names = [f"{module.name}.{kind}_bmm_quantizer"]
            yield names[0], names + ([f"{module.name}.softmax_quantizer"] if kind == "p" else []), "nn.Module", False


def fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def resolve(entries: list[Entry], layout: Layout) -> tuple[dict[str, tuple[Any, int | None]], list[int]]:
    """Slot -> (spec, deciding entry), and how many slots every entry spoke of."""
    found: dict[str, tuple[Any, int | None]] = {}
    counts = [0] * len(entries)
    for slot, names, parent, weight in slots(layout):
        stages: list[list[Any]] = []  # [spec, on]
        stored, decided = "first", None
        for index, entry in enumerate(entries):
            if entry.parent_class not in (None, parent):
                continue
            number = None
            if any(fits(entry.quantizer_path, name) for name in names):
                pass
            elif any(fits(entry.quantizer_path, f"{name}.{n}") for name in names for n in (0, 1)) and re.search(
                r"\.[01]$", entry.quantizer_path
            ):
                number = int(entry.quantizer_path[-1])
                if len(stages) < 2:
                    continue
            else:
                continue
            counts[index] += 1
            decided = index
            spec = to_spec(entry.cfg, weight=weight) if entry.cfg is not None else None
            if number is not None:
                stages[number] = [spec or stages[number][0], entry.enable]
            elif spec is not None:
                stored = spec.stored
                stages = [[replace(stage, then=None, stored="first"), entry.enable] for stage in spec.stages]
            else:
                for stage in stages:
                    stage[1] = entry.enable
        found[slot] = _joined([spec for spec, on in stages if on], stored), decided
    return found, counts


def _joined(stages: list[TensorSpec], stored: Any) -> TensorSpec | None:
    if len(stages) < 2:
        return stages[0] if stages else None
    return replace(stages[0], then=stages[1], stored=stored)
