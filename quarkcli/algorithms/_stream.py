"""Finds the residual stream of a plan: what of each part stands on it and changes with its channels. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from quarkcli.errors import ConfigError
from quarkcli.family import Residual, expert_bias
from quarkcli.plan.model import Changes, Part, Plan, Target


def by_part(plan: Plan) -> Iterator[tuple[Part, dict[str, Target]]]:
    """Yields every part with its weights."""
    weights: dict[int, dict[str, Target]] = {part.index: {} for part in plan.parts}
    for name, target in plan.targets.items():
        weights[target.part][name] = target
    for part in plan.parts:
        yield part, weights[part.index]


def streams(plan: Plan) -> Iterator[tuple[Part, Residual]]:
    """Yields what of every part stands on the residual stream."""
    for part, weights in by_part(plan):
        yield part, plan.rewrites.residual(part, weights)


def check_residual(plan: Plan) -> None:
    """Raises ConfigError where some tensor's place on the residual stream is not known."""
    rule = plan.rewrites.family.residual if plan.rewrites.family is not None else None
    refused = f"the channels of the residual stream cannot change places in model family '{plan.family}'"
    if rule is not None and rule.no_permutation is not None:
        raise ConfigError(
            f"{refused}: {rule.no_permutation}",
            hint="write residual: false to leave the residual stream as it is",
            kind="E-ALGORITHM-FAMILY",
        )
    for _, residual in streams(plan):
        for name, why in residual.unknown.items():
            raise ConfigError(
                f"{refused}: {why}",
                where=name,
                hint="write residual: false (r1: false for rotation), or name in the family file and in 'slots' "
                "all that reads and writes the stream",
                kind="E-ALGORITHM-FAMILY",
            )


def held_by(plan: Plan, modules: set[str]) -> set[str]:
    """Returns the source tensors that hold the weights and biases of modules."""
    names = {tensor for part in plan.parts for tensor in part.tensors}
    found = set()
    for target in (plan.targets[module] for module in modules):
        found |= {target.view.tensor, *(bias for bias in (target.bias, expert_bias(target)) if bias in names)}
    return found


def copies(plan: Plan, changes: Changes) -> int:
    """Returns the bytes of float32 copies of a part's changed weights, and thrice of its largest while it changes."""
    most = 0
    for _, weights in by_part(plan):
        own = [4 * target.numel for target in weights.values() if target.view.tensor in changes.tensors]
        most = max(most, sum(own) + 3 * max(own, default=0))
    return most
