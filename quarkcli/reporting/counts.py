"""Counts what a plan makes of weights and caches, and by which rules."""

from __future__ import annotations

from collections import Counter

from quarkcli.plan.model import Plan
from quarkcli.recipe.match import starred


def modules_by_scheme(plan: Plan) -> dict[str, int]:
    """Returns the count of weights per decision.

    A decision is `weight spec | input spec`, then output and bias if there are some, or `kept`.
    """
    counts: Counter[str] = Counter()
    for target in plan.targets.values():
        if target.weight is None:
            counts["kept"] += 1
            continue
        activation = target.input.describe() if target.input else "unquantized"
        more = "".join(
            f" | {kind} {spec.describe()}"
            for kind, spec in (("outputs", target.output), ("biases", target.bias_spec))
            if spec is not None
        )
        counts[f"weights {target.weight.describe()} | inputs {activation}{more}"] += 1
    return dict(counts.most_common())


def attention_by_scheme(plan: Plan) -> dict[str, int]:
    """Returns the count of enabled attention slots per spec."""
    counts: Counter[str] = Counter()
    for module in plan.attention.values():
        for kind, decision in module.slots.items():
            if decision.spec is not None:
                counts[f"{kind} {decision.spec.describe()}"] += 1
    return dict(counts.most_common())


def shared_scales(plan: Plan) -> dict[str, int]:
    """Returns the count of scale groups by name, `*` for the numbers in it: weights there share per-tensor scales."""
    return dict(Counter(starred(name) for name in plan.shared()))


def decided_by(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns the effect of each rule: origin of an entry -> slots it switched on and off, being the last to match."""
    found: dict[int, dict[str, int]] = {}
    for _, decision in plan.slots():
        if decision.entry is not None:
            counts = found.setdefault(decision.entry, {"on": 0, "off": 0})
            counts["off" if decision.spec is None else "on"] += 1
    out: dict[str, dict[str, int]] = {}
    for index in sorted(found):
        counts = out.setdefault(str(plan.entries[index].origin), {"on": 0, "off": 0})
        for state, count in found[index].items():
            counts[state] += count
    return out


def split_tensors(plan: Plan) -> dict[str, int]:
    """Returns the source tensors that were written as several: fused experts -> count of weights."""
    counts: Counter[str] = Counter(
        target.view.tensor for target in plan.targets.values() if target.view.expert is not None
    )
    return {tensor: count for tensor, count in counts.items() if tensor not in plan.kept}
