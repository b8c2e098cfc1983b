"""A toy tuner: the codes with the largest gradients of the block's output error go one step down, if that helps."""

from typing import Any, ClassVar

import torch

from quarkcli.algorithms.base import Needs, Tuned, Tuner
from quarkcli.numerics.quantize import Quantized, dequantize, encode
from quarkcli.plan.model import Plan


class Nudge(Tuner):
    """share: how many of a weight's codes may move; 0 changes nothing."""

    name = "nudge"
    parameters: ClassVar[dict[str, Any]] = {"share": 0.002}
    seen: ClassVar[list[tuple[float, float]]] = []

    def __init__(self, share: float) -> None:
        self.share = share

    def needs(self, plan: Plan) -> Needs:
        return {t.site: {"outputs"} for t in plan.quantized() if t.site is not None}

    def tune(self, block: Any, quantized: dict[str, Quantized]) -> Tuned:
        values = {name: dequantize(q, block.targets[name].weight) for name, q in quantized.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        before = error(block, leaves)
        before.backward()
        reached = [name for name, leaf in leaves.items() if bool(leaf.grad.any())]
        assert len(reached) > len(leaves) / 2  # an expert may see no token
        best = dict(quantized)
        for name, leaf in leaves.items():
            spec, old = block.targets[name].weight, quantized[name]
            count = int(self.share * leaf.numel())
            chosen = torch.zeros(leaf.numel(), dtype=torch.bool)
            chosen[leaf.grad.abs().flatten().topk(count).indices] = True
            step = 0.6 * values[name].square().mean().sqrt() * leaf.grad.sign() * chosen.view_as(leaf)
            moved = values[name] - step
            new = Quantized(encode(moved, spec, old.params), old.params)
            least = error(block, values)
            if float(error(block, {**values, name: dequantize(new, spec)})) < float(least):
                best[name], values[name] = new, dequantize(new, spec)
        self.seen.append((before.item(), float(error(block, values))))
        return Tuned(best)


def error(block: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = [(block.run(weights, i).float() - block.wanted(i).float()).square().mean() for i in range(block.batches)]
    return torch.stack(losses).mean()


ALGORITHM = Nudge
