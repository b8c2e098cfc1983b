"""Keeps codes and scales of a quantized source for weights that the plan leaves alone, if the dialect can hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from quarkcli import dialects, servers
from quarkcli.algorithms.base import Assignment
from quarkcli.dialects.base import StoredTarget, Writer
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.origin import Origin
from quarkcli.disk.weights import WeightSource
from quarkcli.errors import ConfigError, ModelError
from quarkcli.plan.model import Decision, Plan, Target, is_quantized
from quarkcli.recipe.match import starred
from quarkcli.servers.base import alone
from quarkcli.spec import TensorSpec

Slots = Mapping[str, Decision]


def carry(
    plan: Plan,
    weights: WeightSource,
    origin: Origin,
    writers: Sequence[Writer],
    steps: Iterable[Assignment],
    target: str,
) -> Plan:
    """Returns the plan with these weights as the source has them, which every one of these dialects must say.

    Raises ConfigError where some would keep codes that others cannot say: two plans are two runs.
    """
    steps = list(steps)
    *others, first = [_carry(plan, weights, origin, dialect, steps, target) for dialect in (*writers[1:], writers[0])]
    for dialect, other in zip(writers[1:], others, strict=True):
        if other.carried != first.carried:
            name = sorted(other.carried ^ first.carried)[0]
            keeps, decodes = (dialect, writers[0]) if name in other.carried else (writers[0], dialect)
            raise ConfigError(
                f"these need two plans: format {keeps.name} keeps the codes of weights that are quantized already, "
                f"and format {decodes.name} needs them decoded",
                where=name,
                hint="write the checkpoint formats in separate runs",
                kind="E-DIALECT-CANNOT",
            )
    return first


def _carry(
    plan: Plan, weights: WeightSource, origin: Origin, dialect: Writer, steps: Iterable[Assignment], target: str
) -> Plan:
    """Returns the plan with these weights as the source has them; or as it was, with the reason noted in `origin`.

    Static scales of their inputs go with them, where the dialect can say them. Each has its scales for itself.

    target   the server that was named, or another word
    """
    found = _left(plan, weights)
    if not found:
        return plan
    if any(step.kind in ("transform", "tuner") for step in steps):
        origin.decoded_because = "an algorithm may change weights before they are quantized"
        return plan
    served, origin.stripped = dialects.is_served(dialect, plan), 0
    tried = _with(plan, found)
    origin.decoded_because = _reason(tried, dialect, target, served)
    if not origin.decoded_because:
        return tried
    able = dict(_able(plan, found, lambda some: not _reason(some, dialect, target, served)))
    tried = _with(plan, able)
    if not able or _reason(tried, dialect, target, served):
        return plan
    origin.stripped = sum(stored is not found[name] for name, stored in able.items())
    return tried


def _able(
    plan: Plan, found: Mapping[str, StoredTarget], holds: Callable[[Plan], bool]
) -> Iterator[tuple[str, StoredTarget]]:
    """Yields the weights that can keep their codes with those that servers fuse them with, each kind by itself.

    Of a kind that a dialect cannot say with static scales of inputs, it yields them without.
    """
    forms = [found, {name: _stripped(stored) for name, stored in found.items()}]
    tried = [(form, _with(plan, form)) for form in forms if form is found or forms[0] != form]
    members: dict[str, list[str]] = {}
    for name, target in tried[0][1].targets.items():
        members.setdefault(starred(target.group), []).append(name)
    for kind in {starred(plan.targets[name].group): None for name in found}:
        for form, whole in tried:
            some = [target for name in members[kind] if is_quantized(target := whole.targets[name])]
            if holds(alone(whole, some)):
                yield from ((name, form[name]) for name in members[kind] if name in form)
                break


def _stripped(stored: StoredTarget) -> StoredTarget:
    """Returns a weight without a static scale of its input; the same one where it has none."""
    return replace(stored, input=None) if stored.input is not None and stored.input.needs_amax else stored


def _with(plan: Plan, found: Mapping[str, StoredTarget]) -> Plan:
    kinds: dict[tuple[TensorSpec, TensorSpec | None], Slots] = {}
    own = {name: _as_stored(plan.targets[name], stored, kinds) for name, stored in found.items()}
    tensors = {target.view.tensor for target in own.values()}
    return replace(
        plan,
        targets={name: own.get(name, target) for name, target in plan.targets.items()},
        kept={tensor: why for tensor, why in plan.kept.items() if tensor not in tensors},
        carried=frozenset(own),
    )


def _reason(tried: Plan, dialect: Writer, target: str, served: bool) -> str:
    """Returns why the weights cannot keep their codes; empty when they can. `served`: decoded, a server loads them."""
    refusals = dialect.refusals(tried)
    if refusals:
        return refusals[0]
    if served and not dialects.is_served(dialect, tried):
        return "with them vLLM would not load the checkpoint"
    try:
        servers.check_plan(tried, dialect, target)
    except ModelError as error:
        return error.what
    return ""


def _left(plan: Plan, weights: WeightSource) -> dict[str, StoredTarget]:
    """Returns those of the source's quantized weights that the plan does not quantize."""
    if not isinstance(weights, Checkpoint):
        return {}
    left = (name for name, target in plan.targets.items() if target.weight is None)
    stored = {name: each for name, each in weights.view.targets.items() if each.columns is None}
    return {name: stored[name] for name in left if name in stored and stored[name].shape == plan.targets[name].shape}


def _as_stored(
    target: Target, stored: StoredTarget, kinds: dict[tuple[TensorSpec, TensorSpec | None], Slots]
) -> Target:
    specs = {"weight": stored.weight, "input": stored.input}
    slots = {kind: Decision(specs.get(kind), None) for kind in target.slots}
    return Target.of(target, kinds.setdefault((stored.weight, stored.input), slots), target.name)
