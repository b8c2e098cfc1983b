"""Counts the work of a plan part by part, in bytes, values and floating point operations. Torch-free.

Counted from the plan's targets alone: what it takes on a device is `predict`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quarkcli import family
from quarkcli.algorithms.base import Assignment, Effort
from quarkcli.job.forecast import PartSize
from quarkcli.job.reach import probed_rows, takes_one_pass
from quarkcli.plan.model import Part, Plan, QuantizedTarget, Target, is_quantized
from quarkcli.spec import TensorSpec

OUTPUT = "o"  # the role whose width is that of all heads together


@dataclass
class PartCost:
    """The work of one part.

    read, written   bytes of its tensors in the source, and of its files
    quantized       values of weights by spec
    weights         how many are quantized
    product         FLOP of a forward pass for each token
    attention       the same for each token and each token of its row
    widest          values of the widest activation of a token
    inputs          values of quantized inputs for each token, by spec
    moments         FLOP of second moments for each token
    problems        what algorithms do with its weights, one for each site and expert
    forwards        passes of all rows through it
    served          those of them with quantized inputs
    """

    part: Part
    read: int
    written: int
    quantized: Counter[TensorSpec] = field(default_factory=Counter)
    weights: int = 0
    product: float = 0.0
    attention: float = 0.0
    widest: int = 0
    inputs: Counter[TensorSpec] = field(default_factory=Counter)
    moments: float = 0.0
    problems: list[Effort] = field(default_factory=list)
    forwards: float = 0.0
    served: float = 0.0


def costs(
    plan: Plan,
    sizes: Sequence[PartSize],
    steps: Sequence[Assignment],
    needs: Mapping[str, set[str]],
    config: Mapping[str, Any],
    last: int,
    rows: int,
    seqlen: int,
) -> list[PartCost]:
    """Returns the work of every part, in plan order.

    last     the index of the last part that data reach; -1: no data is needed
    rows, seqlen   of calibration: how many, and tokens of each
    """
    found = [PartCost(part, size.source, size.files) for part, size in zip(plan.parts, sizes, strict=True)]
    share = routed_share(plan, config) or 1.0
    seen: set[str] = set()
    for run in plan.alike():
        for index, count in Counter(target.part for target in run).items():
            _add(found[index], run[0], count, share)
        _moments(found, run, needs, share, seen)
    for step in steps:
        _solved(found, plan, step)
    passes = 2 + sum(step.algorithm.forwards(rows * seqlen) for step in steps)
    passes += "source" in frozenset[str]().union(*(step.algorithm.streams for step in steps))
    once = takes_one_pass(plan, steps)
    for cost in found:
        if cost.part.index <= last and (cost.part.block is not None or cost.part.kind == "tail"):
            cost.served = min(1.0, probed_rows(seqlen) / rows) if once else 1.0
            cost.forwards = 1 + cost.served if once else passes if cost.part.index < last else passes - 1
    return found


def routed_share(plan: Plan, config: Mapping[str, Any]) -> float | None:
    """Returns the share of a layer's experts that a token passes; None where config.json does not say how many."""
    layers: dict[str, set[int]] = {}
    for target in plan.targets.values():
        if target.expert is not None:
            layers.setdefault(target.expert[0], set()).add(target.expert[1])
    if not layers:
        return 1.0
    active = family.active_experts(config)
    return min(1.0, active / max(map(len, layers.values()))) if active else None


def _add(cost: PartCost, target: Target, count: int, share: float) -> None:
    """Adds `count` weights like `target` to a part."""
    passed = share if target.expert is not None else 1.0
    if target.site is not None:
        cost.product += 2 * target.numel * count * passed
        cost.widest = max(cost.widest, *target.shape)
        if target.role == OUTPUT:
            cost.attention += 2 * target.shape[1] * count  # scores and values, of half the tokens each
    if not is_quantized(target):
        return
    cost.weights += count
    cost.quantized[target.weight] += target.numel * count
    if target.input is not None and target.site is not None:
        cost.inputs[target.input] += round(target.shape[1] * count * passed)


def _moments(
    found: list[PartCost], run: Iterable[Target], needs: Mapping[str, set[str]], share: float, seen: set[str]
) -> None:
    """Adds the second moments of the sites that these weights read, each once; an expert's is of its own tokens."""
    for target in run:
        site = target.site
        if site is None or "gram" not in needs.get(site, ()):
            continue
        key = site if target.expert is None else f"{site} {target.expert[1]}"
        if key not in seen:
            seen.add(key)
            both = 2 if "cross" in needs[site] else 1
            passed = share if target.expert is not None else 1.0
            found[target.part].moments += 2 * both * target.shape[1] ** 2 * passed


def _solved(found: list[PartCost], plan: Plan, step: Assignment) -> None:
    """Adds what an algorithm does, problem by problem: the weights that read one site, of one expert."""
    rows: dict[tuple[str, int | None], tuple[int, QuantizedTarget]] = {}
    for target in plan.quantized():
        if step.takes(target) and target.name not in plan.carried:
            key = target.site or target.name, target.expert[1] if target.expert is not None else None
            rows[key] = rows.get(key, (0, target))[0] + target.shape[0], target
    for count, target in rows.values():
        effort = step.algorithm.effort((count, target.shape[1]), target.weight)
        if any(effort):
            found[target.part].problems.append(effort)
