"""Matches the patterns on weight slots that a recipe has beside the ordered list: algorithms and shared scales."""

from __future__ import annotations

from collections.abc import Sequence

from quarkcli.errors import ConfigError
from quarkcli.family import Layout, Weight
from quarkcli.plan.model import Step
from quarkcli.plan.names import Hits, Names
from quarkcli.recipe.entries import SLOTS, Entry, Origin
from quarkcli.recipe.match import suggestions
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
            close = suggestions(pattern, [f"{weight.name}.weight_quantizer" for weight, _ in found])
            raise ConfigError(
                f"{what}: '{pattern}' matches 0 of {len(found)} weight slots",
                where=str(origin),
                hint=f"did you mean {', '.join(map(repr, close))}?" if close else "see 'quark plan' for the names",
            )
    return found


def steps(recipe: Recipe, layout: Layout) -> list[Step]:
    """Returns the recipe's algorithms, each with the weights that its `slots` name. Raises ConfigError as `matched`."""
    found = []
    places = recipe.algorithm_places or [""] * len(recipe.algorithms)
    for (name, given), place in zip(recipe.algorithms, places, strict=True):
        parameters = {key: value for key, value in given.items() if key != SLOTS}
        weights = None
        if SLOTS in given:
            patterns = [(pattern, Origin(place or recipe.file or recipe.name)) for pattern in given[SLOTS]]
            weights = frozenset(weight.name for weight, hits in matched(f"algorithm {name}", patterns, layout) if hits)
        found.append(Step(name, parameters, weights))
    return found
