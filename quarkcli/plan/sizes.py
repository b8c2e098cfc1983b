"""Computes figures of a plan: bits per weight, shares of parameters. Torch-free."""

from __future__ import annotations

from quarkcli.plan.model import Plan


def effective_bits(plan: Plan) -> float:
    """Returns bits per quantized weight of the number formats: codes, scales, zero points and shift bits.

    What a checkpoint format stores beside them (`weight_shape`, scales of inputs, zero points that are all zero) counts
    in the size of the files alone: a search compares formats, and each checkpoint format gives the same figure.
    """
    bits = weights = 0.0
    for run in plan.quantized_alike():
        target = run[0]
        bits += target.weight.bits_per_value(*target.shape) * target.numel * len(run)
        weights += target.numel * len(run)
    return bits / weights if weights else 0.0


def expert_share(plan: Plan) -> tuple[int, int]:
    """Returns (quantized, all) parameters of routed experts."""
    experts = [target for target in plan.targets.values() if target.expert is not None]
    return sum(t.numel for t in experts if t.weight is not None), sum(t.numel for t in experts)
