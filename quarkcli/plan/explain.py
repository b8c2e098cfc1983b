"""Explains a slot: it lists the entries that speak of it, in order, and the outcome. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quarkcli.errors import ConfigError
from quarkcli.plan.model import Attention, Decision, Plan, Target
from quarkcli.plan.names import ATTENTION_CLASS, Names, stage_of
from quarkcli.plan.order import Order
from quarkcli.plan.resolve import attention_names, is_weight_kind
from quarkcli.recipe.attributes.written import granularity_to_yaml, spec_to_yaml
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.nearby import examples
from quarkcli.spec import TensorSpec


@dataclass(frozen=True)
class Match:
    """An entry whose pattern fits the slot.

    effect   what it did: `replaces`, `switches on`, `switches off`, `brings back` what was said before the exclusions,
             the same for a stage of a chain, or why it does not speak of the slot
    after    what the slot would be quantized with if the list ended here; None: not at all
    """

    index: int
    entry: Entry
    effect: str
    after: TensorSpec | None
    decides: bool

    def as_json(self) -> dict[str, Any]:
        entry = self.entry
        return {
            "index": self.index,
            "pattern": entry.quantizer_path,
            "parent_class": entry.parent_class,
            "cfg": entry.cfg,
            "enable": entry.enable,
            "origin": str(entry.origin),
            "effect": self.effect,
            "after": spec_to_yaml(self.after) if self.after is not None else None,
            "decides": self.decides,
        }


@dataclass(frozen=True)
class Explanation:
    """One slot of a plan.

    names         that a pattern may use for it, its own first
    matches       in the order of the list; the last one that does anything decides
    spec          what its last entry says; None: off
    idle          why the slot stays off although it has a spec, else None
    site          the activation behind a static scale of an input; slots of one site share it
    scale_group   the group whose weights share a per-tensor scale, and which they are; none where it shares nothing
    """

    slot: str
    names: tuple[str, ...]
    parent_class: str
    role: str
    matches: tuple[Match, ...]
    spec: TensorSpec | None
    idle: str | None
    site: str | None
    readers: tuple[str, ...]
    scale_group: str | None
    sharers: tuple[str, ...]

    @property
    def decided(self) -> Match | None:
        return next((match for match in self.matches if match.decides), None)

    def facts(self) -> dict[str, Any]:
        """Returns the spec in words: rule and granularity of every stage."""
        stages = self.spec.stages if self.spec is not None else ()
        return {
            "spec": self.spec.describe() if self.spec is not None else None,
            "rule": [stage.scale.rule if stage.scale is not None else None for stage in stages],
            "granularity": [granularity_to_yaml(stage.granularity) for stage in stages],
        }

    def as_json(self) -> dict[str, Any]:
        facts = self.facts()
        return {
            "schema": "quark/explanation/1",
            "slot": self.slot,
            "names": list(self.names),
            "parent_class": self.parent_class,
            "role": self.role,
            "matches": [match.as_json() for match in self.matches],
            "decided_by": self.decided.index if self.decided is not None else None,
            "spec": spec_to_yaml(self.spec) if self.spec is not None else None,
            "text": facts["spec"],
            "rule": facts["rule"],
            "granularity": facts["granularity"],
            "idle": self.idle,
            "site": self.site,
            "readers": list(self.readers),
            "scale_group": self.scale_group,
            "sharers": list(self.sharers),
        }


def explain(plan: Plan, slot: str) -> Explanation:
    """Returns the explanation of a slot. Raises ConfigError, with near misses, for a slot that the plan does not have.

    slot   its full name, any other name that patterns may use for it, or a module's name for its weight
    """
    name, owner, kind = _find(plan, slot)
    names = _names(owner, kind)
    role, parent_class = "attention", ATTENTION_CLASS
    if isinstance(owner, Target):
        role, parent_class = owner.role, owner.parent_class
    decision = owner.slots[kind]
    site = _site(owner, kind, decision)
    sharers = _sharers(plan, owner, kind)
    return Explanation(
        slot=name,
        names=names,
        parent_class=parent_class,
        role=role,
        matches=_matches(plan, names, parent_class, is_weight_kind(kind)),
        spec=decision.spec,
        idle=_idle(owner, kind) if decision.spec is not None else None,
        site=site,
        readers=plan.sites[site].members if site in plan.sites else (),
        scale_group=owner.scale_group if isinstance(owner, Target) and sharers else None,
        sharers=sharers,
    )


def _find(plan: Plan, slot: str) -> tuple[str, Target | Attention, str]:
    """Returns (the slot's own name, its module, its kind)."""
    slots = _slots(plan)
    other: dict[str, str] = {}
    for name, (owner, kind) in slots.items():
        for alias in _names(owner, kind)[1:]:
            other.setdefault(alias, name)  # without its index, a name means the first expert
    whole, _ = stage_of(slot)
    for asked in (slot, whole, f"{slot}.weight_quantizer"):
        name = asked if asked in slots else other.get(asked, asked)
        if name in slots:
            return name, *slots[name]
    pools = (slots, plan.targets) if "_quant" in slot else (plan.targets, slots)
    close = next(filter(None, (examples(slot, pool) for pool in pools)), [])
    hint = (
        f"did you mean {', '.join(map(repr, close))}?"
        if close
        else "run 'quark plan --json --full' for the names of all quantizers"
    )
    if close and "*" in slot:
        hint = f"give one name, not a pattern: {' or '.join(map(repr, close))}"
    raise ConfigError(f"no quantizer is called '{slot}'", hint=hint, kind="E-SLOT-UNKNOWN")


def _slots(plan: Plan) -> dict[str, tuple[Target | Attention, str]]:
    """Returns every slot's module and kind."""
    owners: list[Target | Attention] = [*plan.targets.values(), *plan.attention.values()]
    return {_names(owner, kind)[0]: (owner, kind) for owner in owners for kind in owner.slots}


def _names(owner: Target | Attention, kind: str) -> tuple[str, ...]:
    """Returns the names that a pattern may use for a slot, its own first."""
    if isinstance(owner, Attention):
        return attention_names(owner.name, kind)
    return tuple(f"{spelling}.{kind}_quantizer" for spelling in (owner.name, *owner.aliases))


def _matches(plan: Plan, names: tuple[str, ...], parent_class: str, weight: bool) -> tuple[Match, ...]:
    order = Order(plan.entries, plan.restores, plan.exclusions_start)
    hits = Names(plan.entries).of_slot(names)
    steps = dict(order.steps(hits, parent_class, weight=weight))
    last = max(steps, default=None)
    found = []
    for index in hits:
        entry, after = plan.entries[index], None
        if index in steps:
            effect = _effect(plan, index)
            after = order.spec(steps[index], weight=weight)
        elif entry.parent_class not in (None, parent_class):
            effect = f"only for {entry.parent_class}; this is {parent_class}"
        else:
            effect = "is about a stage of a chain that this quantizer does not have"
        found.append(Match(index, entry, effect, after, index == last))
    return tuple(found)


def _effect(plan: Plan, index: int) -> str:
    entry, stage = plan.entries[index], stage_of(plan.entries[index].quantizer_path)[1]
    if index in plan.restores:
        return "restores what was set before the exclusions"
    if entry.cfg is None:
        effect = "switches on" if entry.enable else "switches off"
    else:
        effect = "replaces" if entry.enable else "replaces the attributes, switched off"
    return effect if stage is None else f"{effect} stage {stage}"


def _idle(owner: Target | Attention, kind: str) -> str | None:
    """Returns the reason why a slot with a spec is not quantized, or None when it is."""
    if isinstance(owner, Attention):
        return None
    used: Mapping[str, TensorSpec | None] = {
        "weight": owner.weight, "input": owner.input, "output": owner.output, "bias": owner.bias_spec,
    }  # fmt: skip
    if used[kind] is not None:
        return None
    if owner.weight is None:
        return "its weight is not quantized"
    return "an embedding reads token numbers" if owner.is_embedding else "the model has no such tensor"


def _site(owner: Target | Attention, kind: str, decision: Decision) -> str | None:
    """Returns the name of the activation that a static scale is measured on."""
    if decision.spec is None or not decision.spec.is_static:
        return None
    if isinstance(owner, Attention):
        return f"{owner.name}.{kind}"
    return {"input": owner.site, "output": owner.output_site}.get(kind)


def _sharers(plan: Plan, owner: Target | Attention, kind: str) -> tuple[str, ...]:
    """Returns the weights that share the per-tensor scale of a weight, with it."""
    if not isinstance(owner, Target) or kind != "weight" or owner.weight is None or not owner.weight.has_tensor_scale:
        return ()
    group = owner.scale_group
    members = [t.name for t in plan.quantized() if t.scale_group == group]
    return tuple(members) if len(members) > 1 else ()
