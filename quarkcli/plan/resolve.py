"""Entries x layout -> plan: what every slot ends as, and which entry decided it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from quarkcli.errors import ConfigError
from quarkcli.family import PROTECTED, Layout, Weight
from quarkcli.plan import checks
from quarkcli.plan.compose import Composed, Overrides, compose
from quarkcli.plan.model import ATTENTION_KINDS, TARGET_KINDS, Attention, Decision, Plan, Target
from quarkcli.recipe.attributes import native
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.match import compiled, suggestions
from quarkcli.recipe.recipe import Recipe
from quarkcli.spec import TensorSpec

_State = tuple[dict[str, Any] | None, bool, int | None]  # cfg, enabled, deciding entry
_UNTOUCHED: _State = (None, False, None)


def resolve(recipe: Recipe, overrides: Overrides, layout: Layout, algorithms: list[tuple[str, dict[str, Any]]]) -> Plan:
    """The plan of a recipe for one model.

    Raises ConfigError for a required pattern without a match (with near misses), an enabling entry without any
    effect, and a plan that quantizes nothing; ModelError for widths that do not fit.
    """
    composed = compose(recipe, overrides, layout)
    resolver = _Resolver(composed)
    targets = {weight.name: _target(resolver, weight) for weight in layout.weights.values()}
    attention = {
        module.name: Attention(
            module.name, module.part, module.k_proj, module.v_proj,
            {kind: _attention_slot(resolver, module.name, kind) for kind in ATTENTION_KINDS},
            module.head_dim, module.latent,
        )
        for module in layout.attention
    }  # fmt: skip
    plan = Plan(
        scheme=recipe.name,
        family=layout.family,
        entries=composed.entries,
        parts=layout.parts,
        targets=targets,
        attention=attention,
        sites=layout.sites,
        kept=_kept(layout, targets, composed.entries),
        algorithms=algorithms,
        matches=resolver.matches,
        tied_head=layout.tied_head,
        warnings=_warnings(layout, overrides, resolver),
        restores=frozenset(composed.restores),
    )
    checks.warn(plan)
    _check_required(plan, resolver)
    _check_effect(plan, resolver)
    checks.check(plan)
    return plan


class _Resolver:
    """Applies the ordered list to one slot at a time and counts what every entry matched."""

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.entries = composed.entries
        self.exact: dict[str, list[int]] = {}
        self.patterns: list[tuple[int, Any]] = []
        for index, entry in enumerate(self.entries):
            if any(c in entry.quantizer_path for c in "*?[") or entry.quantizer_path.startswith("re:"):
                self.patterns.append((index, _compiled(entry).fullmatch))
            else:
                self.exact.setdefault(entry.quantizer_path, []).append(index)
        self.matches = [0] * len(self.entries)
        self.specs: dict[str, TensorSpec] = {}
        self.names: dict[str, tuple[str, ...]] = {}  # slot -> the names that a pattern may use for it

    def decide(self, slot: str, aliases: tuple[str, ...], parent_class: str) -> Decision:
        candidates = self.names[slot] = (slot, *aliases)
        hits = {index for name in candidates for index in self.exact.get(name, ())}
        hits.update(index for index, match in self.patterns if any(match(name) for name in candidates))
        state = before = _UNTOUCHED
        for index in sorted(hits):
            entry = self.entries[index]
            if entry.parent_class not in (None, parent_class):
                continue
            self.matches[index] += 1
            if index in self.composed.restores:
                state = (before[0], before[1], index)
                continue
            state = (entry.cfg if entry.cfg is not None else state[0], entry.enable, index)
            if index < self.composed.exclusions_start:
                before = state
        cfg, enabled, decided = state
        return Decision(self.spec(cfg) if enabled and cfg is not None else None, decided)

    def spec(self, cfg: dict[str, Any]) -> TensorSpec:
        """One object per distinct cfg."""
        key = json.dumps(cfg, sort_keys=True)
        if key not in self.specs:
            self.specs[key] = native.to_spec(cfg)
        return self.specs[key]


def _compiled(entry: Entry) -> Any:
    try:
        return compiled(entry.quantizer_path)
    except ConfigError as error:
        raise ConfigError(error.what, where=str(entry.origin)) from error


def _target(resolver: _Resolver, weight: Weight) -> Target:
    slots = {}
    for kind in TARGET_KINDS:
        suffix = f".{kind}_quantizer"
        aliases = tuple(alias + suffix for alias in weight.aliases)
        slots[kind] = resolver.decide(weight.name + suffix, aliases, weight.parent_class)
    return Target(**vars(weight), slots=slots)


def _attention_slot(resolver: _Resolver, module: str, kind: str) -> Decision:
    aliases = (f"{module}.softmax_quantizer",) if kind == "p" else ()
    return resolver.decide(f"{module}.{kind}_bmm_quantizer", aliases, "nn.Module")


def _kept(layout: Layout, targets: dict[str, Target], entries: list[Entry]) -> dict[str, str]:
    """Source tensor -> why it is copied as it is. A fused tensor with one quantized expert is not kept."""
    owner: dict[str, list[Target]] = {}
    for target in targets.values():
        owner.setdefault(target.view.tensor, []).append(target)
    biases = {target.bias for target in targets.values() if target.bias_spec is not None}
    kept = {}
    for part in layout.parts:
        for tensor in part.tensors:
            weights = owner.get(tensor, [])
            if tensor in biases or any(target.weight is not None for target in weights):
                continue
            kept[tensor] = _reason(tensor, weights, layout, entries)
    return kept


def _reason(tensor: str, weights: list[Target], layout: Layout, entries: list[Entry]) -> str:
    if weights:
        decided = weights[0].slots["weight"].entry
        return str(entries[decided].origin) if decided is not None else "no entry matched"
    role = layout.tensor_roles.get(tensor, "other")
    if role in PROTECTED:
        return f"{role}: {PROTECTED[role]}"
    return "not a weight matrix" if role != "other" else "not part of the family"


def _warnings(layout: Layout, overrides: Overrides, resolver: _Resolver) -> list[str]:
    warnings = []
    if layout.inferred:
        warnings.append(
            f"no family file for model type '{layout.family}': roles were inferred from tensor names; check the plan"
        )
    for index in _unmatched(resolver):
        entry = resolver.entries[index]
        if not entry.required and not entry.origin.text.startswith("default exclusion"):
            warnings.append(f"{entry.origin}: '{entry.quantizer_path}' matched 0 of {len(resolver.names)} slots")
    return warnings


def _unmatched(resolver: _Resolver) -> Iterable[int]:
    """First entry of every unit that matched nothing."""
    matched = {entry.unit for entry, count in zip(resolver.entries, resolver.matches, strict=True) if count}
    seen: set[str] = set()
    for index, entry in enumerate(resolver.entries):
        unit = entry.unit or f"#{index}"
        if entry.unit in matched or unit in seen or (not entry.unit and resolver.matches[index]):
            continue
        seen.add(unit)
        yield index


def _check_required(plan: Plan, resolver: _Resolver) -> None:
    for index in _unmatched(resolver):
        entry = plan.entries[index]
        if not entry.required:
            continue
        modules = set(plan.targets)
        pattern = entry.quantizer_path
        shown = pattern.removesuffix(".weight_quantizer") if entry.origin.text.startswith("--") else pattern
        pool = modules if entry.origin.text.startswith("--") else resolver.names
        close = suggestions(shown, pool)
        hint = f"did you mean {', '.join(repr(name) for name in close)}?" if close else "see 'quark plan' for the names"
        what = f"'{shown}' matches 0 of {len(modules)} modules"
        raise ConfigError(what, where=str(entry.origin), hint=hint)


def _check_effect(plan: Plan, resolver: _Resolver) -> None:
    deciders = {decision.entry for _, decision in plan.slots() if decision.spec is not None}
    by_unit: dict[str, list[int]] = {}
    for index, entry in enumerate(plan.entries):
        if entry.user and entry.enable:
            by_unit.setdefault(entry.unit or f"#{index}", []).append(index)
    for indices in by_unit.values():
        entry = plan.entries[indices[0]]
        if not plan.matches[indices[0]] or deciders.intersection(indices):
            continue
        winners = _winners(plan, resolver, indices)
        if any(decision.spec is not None for decision in winners):
            continue  # overruled by another enabling entry: not without effect
        overruling = [d.entry for d in winners if d.entry is not None and d.entry not in indices]
        later = dict.fromkeys(str(plan.entries[index].origin) for index in overruling)
        raise ConfigError(
            f"'{entry.quantizer_path}' enables quantizers, but every one of them ends switched off",
            where=str(entry.origin),
            hint=f"later entries win: {'; '.join(list(later)[:3])}" if later else "it has no cfg to enable",
        )
    if not any(plan.quantized()) and not any(module.specs for module in plan.attention.values()):
        listed = "; ".join(f"{e.quantizer_path} ({e.origin})" for e in plan.entries[:6])
        raise ConfigError("the plan quantizes nothing", hint=f"entries in order: {listed}")


def _winners(plan: Plan, resolver: _Resolver, indices: list[int]) -> list[Decision]:
    """What the slots that these entries match ended as."""
    patterns = [compiled(plan.entries[index].quantizer_path) for index in indices]
    spellings = resolver.names
    return [d for slot, d in plan.slots() if any(p.fullmatch(name) for name in spellings[slot] for p in patterns)]
