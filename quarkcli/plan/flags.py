"""Finds flags without which the plan stays the same. Each is a line in the plan, so that nobody takes it for done."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from quarkcli.family import Layout
from quarkcli.plan.compose import OWN_NAMES, Composed, Overrides
from quarkcli.plan.model import TARGET_KINDS, Plan
from quarkcli.plan.names import Hits
from quarkcli.plan.order import Order
from quarkcli.recipe.recipe import Recipe
from quarkcli.spec import TensorSpec

Slots = tuple[tuple[Hits, ...], str]  # entries by kind, and the class of the module

_EMBEDDING = "nn.Embedding"
_NO_PATTERNS = ("exclude", "include", "layers", "layer_types")


def warn(
    plan: Plan,
    composed: Composed,
    order: Order,
    weights: Collection[Slots],
    attention: Collection[tuple[Hits, str]],
    recipe: Recipe,
    overrides: Overrides,
    layout: Layout,
) -> None:
    """Adds a line for every flag without which each slot would end as it does.

    weights, attention   the entries that match the slots of a module, by name; equal modules once
    """
    if overrides.entries:  # whoever edits a plan may take back what a flag said
        return
    ends = _Ends(order, weights, attention)
    for flag, indices in _flags(composed, recipe).items():
        absent = not any(plan.matches[index] for index in indices)
        if absent and composed.entries[indices[0]].user:
            continue  # said already
        if not ends.differ_without(indices):
            plan.warnings.append(f"{flag} changes nothing: the plan is the same without it")
    plan.warnings += _unprotected(plan, recipe, overrides, layout)
    if overrides.allow_unmatched and not any(getattr(overrides, name) for name in _NO_PATTERNS):
        plan.warnings.append("--allow-unmatched changes nothing: no flag has a pattern")


def _flags(composed: Composed, recipe: Recipe) -> dict[str, list[int]]:
    """Returns indices of the entries that flags made, by flag.

    Cache and attention only where they are switched off and the recipe names no scheme for them: a scheme that holds
    is an effect also where another flag implies it, and one that is overruled is warned about (`checks.warn`).
    """
    own = {f"{flag} none": getattr(recipe, field) in (None, "none") for flag, field in OWN_NAMES.items()}
    own["--kv-cache none"] &= not any(entry.unit.startswith("attention ") for entry in composed.entries)
    found: dict[str, list[int]] = {}
    for index, entry in enumerate(composed.entries[: composed.edits_start]):
        flag = str(entry.origin)
        if entry.origin.is_flag and own.get(flag, not flag.startswith(tuple(OWN_NAMES))):
            found.setdefault(flag, []).append(index)
    return found


class _Ends:
    """Computes the outcomes of slots without some of the entries.

    Entries that were left out once stay out, so that one of two equal flags still counts as needed.
    """

    def __init__(self, order: Order, weights: Collection[Slots], attention: Collection[tuple[Hits, str]]) -> None:
        self.order = order
        self.weights = weights
        self.attention = attention
        self.out: frozenset[int] = frozenset()
        self._known: dict[tuple[Hits, str, bool], TensorSpec | None] = {}

    def differ_without(self, indices: Iterable[int]) -> bool:
        less = self.out | set(indices)
        if any(self._weight(slots, self.out) != self._weight(slots, less) for slots in self.weights):
            return True
        if any(self._one(*slot, False, self.out) != self._one(*slot, False, less) for slot in self.attention):
            return True
        self.out = less
        return False

    def _weight(self, slots: Slots, out: frozenset[int]) -> tuple[TensorSpec | None, ...]:
        """Returns the specs that count: inputs and outputs only of a quantized weight, and of no embedding."""
        hits, parent = slots
        found = dict(zip(TARGET_KINDS, hits, strict=True))
        weight = self._one(found["weight"], parent, True, out)
        if weight is None:
            return ()
        bias = self._one(found["bias"], parent, True, out)
        if parent == _EMBEDDING:
            return weight, bias
        return weight, bias, *(self._one(found[kind], parent, False, out) for kind in ("input", "output"))

    def _one(self, hits: Hits, parent: str, weight: bool, out: frozenset[int]) -> TensorSpec | None:
        key = (hits if out.isdisjoint(hits) else tuple(i for i in hits if i not in out)), parent, weight
        if key not in self._known:
            self._known[key] = self.order.decision(key[0], parent, weight=weight)[0].spec
        return self._known[key]


def _unprotected(plan: Plan, recipe: Recipe, overrides: Overrides, layout: Layout) -> Iterator[str]:
    for role in dict.fromkeys(overrides.unprotect):
        modules = [module for module, kept in layout.protected.items() if kept == role]
        quantized = [m for m in modules if (target := plan.targets.get(m)) is not None and target.weight is not None]
        if not recipe.exclusions:
            yield f"--unprotect {role} changes nothing: {recipe.name} has no default exclusions"
        elif not modules and (count := sum(1 for kept in layout.tensor_roles.values() if kept == role)):
            tensors = "tensor" if count == 1 else f"{count} tensors"
            yield f"--unprotect {role} changes nothing: quark has no quantizer for the {tensors} of this role"
        elif not modules:
            yield f"--unprotect {role} changes nothing: the model has no module of this role"
        elif not quantized:
            yield f"--unprotect {role} changes nothing: no entry quantizes the {len(modules)} modules of this role"
