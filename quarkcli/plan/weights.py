"""Matches the patterns on weight slots that a recipe has beside the ordered list: algorithms and shared scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quarkcli.errors import ConfigError
from quarkcli.family import Layout, Weight
from quarkcli.plan.model import Step
from quarkcli.plan.names import Hits, Names
from quarkcli.recipe import nearby
from quarkcli.recipe.entries import SCALED, SLOTS, Entry, Origin
from quarkcli.recipe.recipe import Recipe


def matched(
    what: str, patterns: Sequence[tuple[str, Origin]], layout: Layout, *, required: bool = True
) -> list[tuple[Weight, Hits]]:
    """Returns every weight of the model with the patterns (their indices) that match its slot.

    Raises ConfigError, with the pattern's place, for one that no weight slot matches. `what` says it.
    """
    entries = [Entry(pattern, None, True, origin=origin) for pattern, origin in patterns]
    found = [(weight, hits[0]) for weight, hits in Names(entries).of_weights(layout.weights.values())]
    seen = {hit for _, hits in found for hit in hits}
    for index, (pattern, origin) in enumerate(patterns):
        if required and index not in seen:
            raise ConfigError(
                f"{what}: '{pattern}' matches none of {len(found)} weights",
                where=str(origin),
                hint=nearby.hint(pattern, [f"{weight.name}.weight_quantizer" for weight, _ in found]),
                kind="E-PATTERN-NOMATCH",
            )
    return found


def steps(recipe: Recipe, layout: Layout) -> list[Step]:
    """Returns the recipe's algorithms, each with the weights that its `slots` name. Raises ConfigError as `matched`."""
    found = []
    places = recipe.algorithm_places or [""] * len(recipe.algorithms)
    for (name, given), place in zip(recipe.algorithms, places, strict=True):
        parameters = {key: value for key, value in given.items() if key != SLOTS}
        if isinstance(parameters.get(SCALED), list):
            parameters[SCALED] = _holding(name, parameters[SCALED], layout, place or recipe.file or recipe.name)
        weights = None
        if SLOTS in given:
            patterns = [(pattern, Origin(place or recipe.file or recipe.name)) for pattern in given[SLOTS]]
            weights = frozenset(weight.name for weight, hits in matched(f"algorithm {name}", patterns, layout) if hits)
        found.append(Step(name, parameters, weights))
    return found


def _holding(step: str, rows: list[Any], layout: Layout, where: str) -> list[Any]:
    """Returns the rows of `scaling_layers` whose condition holds for the model, without it.

    Raises ConfigError when none does.
    """
    found = []
    for row in rows:
        condition = row.get("condition") if isinstance(row, Mapping) else None
        if condition is None:
            found.append(row)
        elif _same_shape(_two_names(condition, where), layout):
            found.append({key: value for key, value in row.items() if key != "condition"})
    if rows and not found:
        what = f"algorithm {step}: no condition of {SCALED} is true for this model"
        raise ConfigError(what, where=where, hint="leave the algorithm out", kind="E-ALGORITHM-PARAMETER")
    return found


def _two_names(condition: Any, where: str) -> list[str]:
    """Returns A and B of `{same_shape: [A, B]}`. Raises ConfigError for anything else."""
    names = condition.get("same_shape") if isinstance(condition, Mapping) and len(condition) == 1 else None
    if not isinstance(names, list) or len(names) != 2 or not all(isinstance(name, str) for name in names):
        hint = "write condition: {same_shape: [self_attn.v_proj.weight, self_attn.o_proj.weight]}"
        raise ConfigError(
            f"{SCALED} has the unknown condition {condition!r}",
            where=where,
            hint=hint,
            kind="E-ALGORITHM-PARAMETER",
        )
    return names


def _same_shape(names: list[str], layout: Layout) -> bool:
    """True when two weights, named below their block, are alike in every block that has both."""
    first, second = (name.removesuffix(".weight") for name in names)
    shapes = {weight.name: weight.shape for weight in layout.weights.values()}
    pairs = [
        (shape, shapes.get(name.removesuffix(first) + second))
        for name, shape in shapes.items()
        if name.endswith(f".{first}")
    ]
    return all(other is None or shape == other for shape, other in pairs)
