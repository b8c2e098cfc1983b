"""Finds the weights that share a per-tensor scale: those that servers fuse, and those that `share` rows join.

`share: []` takes the family's groups away. Servers still fuse them and keep one of the scales, which is why it is
warned about. Static scales of inputs belong to the activation that is read, so that all its readers share them anyway,
among them the experts of a layer: their amax is the maximum over all of them, unless `expert_inputs: own` is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quarkcli.errors import ConfigError
from quarkcli.family import Layout, Weight
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.plan.weights import matched
from quarkcli.recipe.entries import Share

# What comes of unequal scales where servers fuse: of scales over block scales, and of any other.
_REFUSED = "servers keep one of them and decode the others wrong, so 'quark verify' fails"
_MERGED = "servers keep all of them or round all codes again with the largest; 'quark verify' warns"


def scale_groups(rows: Sequence[Share] | None, layout: Layout) -> dict[str, str]:
    """Returns a mapping from weight to the scale group that the recipe puts it in.

    Weights that are not named keep the family's.

    Rows join weights of one part, and with each the family's group that it is in. Raises ConfigError, with the row's
    place, for a pattern that no weight slot matches.
    """
    if rows is None:
        return {}
    if not rows:
        return {name: name for name in layout.weights}
    row_of = [number for number, row in enumerate(rows) for _ in row.slots]
    exact = any(row.exact for row in rows)
    found = matched("share", [(p, row.origin) for row in rows for p in row.slots], layout, required=not exact)
    if exact:
        return _exact_groups((weight, [row_of[hit] for hit in hits]) for weight, hits in found)
    joined: dict[str, str] = {}  # a group -> the one that it is part of
    first: dict[tuple[int, int], str] = {}
    for weight, hits in found:
        for number in {row_of[hit] for hit in hits}:
            one = _root(joined, first.setdefault((number, weight.part), weight.group))
            other = _root(joined, weight.group)
            if one != other:
                joined[other] = one
    return {w.name: root for w in layout.weights.values() if (root := _root(joined, w.group)) != w.group}


def _exact_groups(found: Iterable[tuple[Weight, list[int]]]) -> dict[str, str]:
    """Returns a mapping from weight to the group of the first row that names it, else to its own group."""
    rows: dict[tuple[object, ...], list[str]] = {}
    groups = {}
    for weight, numbers in found:
        groups[weight.name] = weight.name
        if numbers:
            rows.setdefault((numbers[0], weight.part, weight.expert), []).append(weight.name)
    for names in rows.values():
        leaves = [name.rpartition(".")[2] for name in names]
        apart = len(set(leaves)) < len(leaves)  # several modules of one kind in the block: by the module above
        first: dict[str, str] = {}
        for name in names:
            groups[name] = first.setdefault(name.rpartition(".")[0] if apart else "", name)
    return groups


def _root(joined: Mapping[str, str], group: str) -> str:
    while group in joined:
        group = joined[group]
    return group


def check(plan: Plan) -> None:
    """Warns where sharing is taken away or joins nothing. Raises ConfigError for a group of different specs."""
    if plan.own_expert_inputs:
        plan.warnings.append(f"expert_inputs: own {_of_experts(plan)}")
    if plan.share is None:
        return
    if not plan.share or any(row.exact for row in plan.share):
        _warn_of_split(plan)
    if not plan.share:
        return
    rows: dict[str, list[QuantizedTarget]] = {}
    for target in plan.quantized():
        if target.shares is not None:
            rows.setdefault(target.shares, [])
    for target in plan.quantized():
        if target.scale_group in rows:
            rows[target.scale_group].append(target)
    for members in rows.values():
        _check_group(members, plan.share)
    if not any(member.weight.has_tensor_scale for members in rows.values() for member in members):
        plan.warnings.append(f"{plan.share[0].origin}: share has no effect: no two of its weights have one scale each")


def _of_experts(plan: Plan) -> str:
    """Returns the warning text for input scales that every expert has for itself."""
    if not any(own.expert is not None and own.spec.needs_amax for own in plan.activations()):
        return "changes nothing: no input of an expert has a static scale"
    return (
        "gives every expert its own input scale; servers use the largest for all experts of a layer; 'quark "
        "verify' warns"
    )


def _warn_of_split(plan: Plan) -> None:
    """Warns of weights that servers fuse and that do not share their per-tensor scale."""
    groups = split_groups(plan)
    origin = f"{plan.share[0].origin}: share" if plan.share else "share: []"
    if groups:
        plan.warnings.append(
            f"{origin}: {len(groups)} groups of weights that servers multiply together do not share their "
            "per-tensor scales; " + (_REFUSED if any(groups.values()) else _MERGED)
        )


def split_groups(plan: Plan) -> dict[str, bool]:
    """Returns the groups that servers fuse whose members have per-tensor scales of their own.

    The value is true where such a scale lies over block scales: servers decode all but one of the members wrong.
    """
    fused: dict[str, set[str]] = {}
    over: set[str] = set()
    for run in plan.quantized_alike():
        weight = run[0].weight
        for target in run if weight.has_tensor_scale else ():
            fused.setdefault(target.group, set()).add(target.scale_group)
            over |= {target.group} if weight.has_global_scale else set()
    return {group: group in over for group, shared in fused.items() if len(shared) > 1}


def _check_group(members: list[QuantizedTarget], rows: Sequence[Share]) -> None:
    specs = {member.weight for member in members}
    if len(specs) > 1:
        odd = next(member for member in members if member.weight != members[0].weight)
        raise ConfigError(
            f"share joins {members[0].name} and {odd.name}, which have different formats",
            where=str(rows[0].origin),
            hint="give both one scheme, or remove one from the row",
            kind="E-SHARE",
        )
