"""Resolves entries and a layout into a plan: the outcome of every slot, and the entry that decided it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from quarkcli.family import PROTECTED, AttentionModule, Layout, Weight
from quarkcli.memory import without_collection
from quarkcli.plan import blocks, checks, effects, flags, share, weights
from quarkcli.plan.cache import minimum_entries
from quarkcli.plan.compose import Composed, Overrides, compose
from quarkcli.plan.model import ATTENTION_KINDS, TARGET_KINDS, Attention, Decision, Plan, Target
from quarkcli.plan.names import ATTENTION_CLASS, Hits, Names
from quarkcli.plan.order import Order
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.recipe import Recipe


@without_collection()
def resolve(
    recipe: Recipe,
    overrides: Overrides,
    layout: Layout,
    *,
    guards: bool = True,
) -> Plan:
    """Returns the plan of a recipe for one model.

    guards   whether what enables must have an effect: not while a plan is being edited

    Raises ConfigError for a required pattern without a match (with near misses), an enabling entry without any
    effect, and a plan that quantizes nothing; ModelError for widths that do not fit.
    """
    composed = compose(recipe, overrides, layout)
    if overrides.min_kv_scale is not None:
        end, least = composed.edits_start, minimum_entries(composed, layout, overrides.min_kv_scale)
        composed.entries[end:end] = least
        composed.edits_start += len(least)
    resolver, plan = _applied(composed, recipe, layout)
    if overrides.on_indivisible != "error":
        left, line = checks.left_out(plan) if overrides.on_indivisible == "keep" else checks.padded(plan)
        composed.entries[composed.edits_start : composed.edits_start] = left
        composed.edits_start += len(left)
        resolver, plan = _applied(composed, recipe, layout)
        plan.warnings.append(line)
    if layout.inferred:
        plan.warnings.append(_inferred(layout))
    plan.warnings += recipe.differs
    effects.check_matches(plan)
    checks.warn(plan)
    share.check(plan)
    if guards:
        blocks.warn(plan)
        effects.check_effect(plan, resolver.outcomes(), composed.meant, edited=bool(overrides.entries))
        flags.warn(plan, composed, resolver.order, resolver.alike, resolver.attended, recipe, overrides, layout)
    checks.check_stored(plan, layout.transposed)
    checks.check(plan)
    return plan


def _applied(composed: Composed, recipe: Recipe, layout: Layout) -> tuple[_Resolver, Plan]:
    """Returns the plan that the entries make, without any check of it."""
    resolver = _Resolver(composed)
    targets = resolver.targets(layout.weights.values(), share.scale_groups(recipe.share, layout))
    resolver.names.learn(attention_slots(module.name for module in layout.attention))
    attention = {module.name: resolver.attention(module) for module in layout.attention}
    return resolver, Plan(
        scheme=recipe.name,
        family=layout.family,
        architecture=layout.architecture,
        guessed=layout.inferred,
        entries=composed.entries,
        parts=layout.parts,
        targets=targets,
        attention=attention,
        sites=layout.sites,
        kept=kept(layout, targets, composed.entries),
        algorithms=weights.steps(recipe, layout),
        matches=resolver.matches,
        tied_head=layout.tied_head,
        doubled_head=layout.doubled_head,
        restores=frozenset(composed.restores),
        exclusions_start=composed.exclusions_start,
        share=recipe.share,
        own_expert_inputs=recipe.expert_inputs == "own",
        rewrites=layout.rewrites,
        norms=tuple(name for name, role in layout.tensor_roles.items() if role == "norm"),
        matrices=layout.matrices,
    )


def _inferred(layout: Layout) -> str:
    """Returns the warning text for roles that were inferred from tensor names."""
    text = (
        f"quark has no family file for model type '{layout.family}' and guessed the roles from tensor names; "
        "check the plan"
    )
    block = next((part.name for part in layout.parts if part.block is not None), "")
    text += f" (the language model is {block.rpartition('.')[0]}"
    fused = next((w.view for w in layout.weights.values() if w.expert is not None and w.view.rows is not None), None)
    if fused is not None:
        text += f"; gate and up are read as the halves of {fused.tensor.rpartition('.')[2]}"
    return text + ")"


class _Resolver:
    """Applies the ordered list to slots, each question once, and counts what every entry matched.

    alike     weights whose slots the same entries match, with their class: how many
    attended  the same of attention slots
    """

    def __init__(self, composed: Composed) -> None:
        self.names = Names(composed.entries)
        self.order = Order(composed.entries, frozenset(composed.restores), composed.exclusions_start)
        self.matches = [0] * len(composed.entries)
        self.known: dict[tuple[Hits, str, bool], tuple[Decision, tuple[int, ...]]] = {}
        self.alike: dict[tuple[tuple[Hits, ...], str], int] = {}
        self.attended: set[tuple[Hits, str]] = set()

    def targets(self, weights: Iterable[Weight], groups: dict[str, str]) -> dict[str, Target]:
        """Returns every weight with what its slots ended as. `groups`: scale groups that differ from the family's."""
        alike: dict[tuple[tuple[Hits, ...], str], dict[str, Decision]] = {}
        counts = self.alike
        equal: dict[tuple[Decision, ...], dict[str, Decision]] = {}
        targets = {}
        for weight, hits in self.names.of_weights(list(weights)):
            key = hits, weight.parent_class
            slots = alike.get(key)
            if slots is None:
                found = self._slots(hits, weight.parent_class)
                slots = alike[key] = equal.setdefault(tuple(found.values()), found)
                counts[key] = 0
            counts[key] += 1
            targets[weight.name] = Target.of(weight, slots, groups.get(weight.name))
        for (hits, parent_class), count in counts.items():
            for kind, own in zip(TARGET_KINDS, hits, strict=True):
                self._count(own, parent_class, is_weight_kind(kind), count)
        return targets

    def attention(self, module: AttentionModule) -> Attention:
        slots = {}
        for kind in ATTENTION_KINDS:
            hits = self.names.of_slot(attention_names(module.name, kind))
            slots[kind] = self._decide(hits, ATTENTION_CLASS, False)
            self.attended.add((hits, ATTENTION_CLASS))
            self._count(hits, ATTENTION_CLASS, False, 1)
        return Attention(
            module.name, module.part, module.k_proj, module.v_proj, slots, module.head_dim, module.latent
        )  # fmt: skip

    def outcomes(self) -> Iterator[tuple[Hits, Decision]]:
        """Returns every distinct decision with the entries that applied to it, by first appearance."""
        return ((spoke, decision) for decision, spoke in self.known.values())

    def _slots(self, hits: tuple[Hits, ...], parent_class: str) -> dict[str, Decision]:
        return {
            kind: self._decide(own, parent_class, is_weight_kind(kind))
            for kind, own in zip(TARGET_KINDS, hits, strict=True)
        }

    def _decide(self, hits: Hits, parent_class: str, weight: bool) -> Decision:
        key = hits, parent_class, weight
        if key not in self.known:
            self.known[key] = self.order.decision(hits, parent_class, weight=weight)
        return self.known[key][0]

    def _count(self, hits: Hits, parent_class: str, weight: bool, count: int) -> None:
        for index in self.known[hits, parent_class, weight][1]:
            self.matches[index] += count


def is_weight_kind(kind: str) -> bool:
    """True for slots of weights and biases, which are known before the model runs."""
    return kind in ("weight", "bias")


def attention_names(module: str, kind: str) -> tuple[str, ...]:
    """Returns the names that a pattern may use for a slot of an attention module, its own first."""
    slot = f"{module}.{kind}_bmm_quantizer"
    return (slot, f"{module}.softmax_quantizer") if kind == "p" else (slot,)


def attention_slots(modules: Iterable[str]) -> list[str]:
    """Returns all names of all slots of attention modules."""
    return [name for module in modules for kind in ATTENTION_KINDS for name in attention_names(module, kind)]


def kept(layout: Layout, targets: Mapping[str, Target], entries: list[Entry]) -> dict[str, str]:
    """Returns a mapping from source tensor to the reason why it is copied as it is.

    A fused tensor with one quantized expert is not kept.
    """
    first: dict[str, Target] = {}
    written = set()
    for target in targets.values():
        first.setdefault(target.view.tensor, target)
        if target.slots["weight"].spec is not None:
            written.add(target.view.tensor)
            if target.bias is not None and target.bias_spec is not None:
                written.add(target.bias)
    return {
        tensor: _reason(tensor, first.get(tensor), layout, entries)
        for part in layout.parts
        for tensor in part.tensors
        if tensor not in written
    }


def _reason(tensor: str, target: Target | None, layout: Layout, entries: list[Entry]) -> str:
    if target is not None:
        decided = target.slots["weight"].entry
        return str(entries[decided].origin) if decided is not None else "no entry matched"
    role = layout.tensor_roles.get(tensor, "other")
    if role in PROTECTED:
        return f"{role}: {PROTECTED[role]}"
    return "not a weight matrix" if role != "other" else "not part of the family"
