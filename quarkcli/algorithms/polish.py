"""Polish: tunes what stays in 16 bits toward the outputs of the source's blocks. Codes stay.

The last step after any solver or tuner: norms of the block, biases that exist and are not quantized, and scales where
the format stores them as plain floats. Adam lowers the error of the block's output, which is compared with what the
source's blocks hand on; activations are quantized as they are served. The result with the least error on held-out rows
is kept, which is the start itself where nothing is better. Values are rounded to the source's dtypes on the way, so
that the error is that of what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms import _parameters
from quarkcli.algorithms._fitting import BlockTuner, keep_best
from quarkcli.algorithms.base import Tuned
from quarkcli.family import expert_bias
from quarkcli.plan.model import Changes, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.job.tuning import TunedBlock
    from quarkcli.numerics.quantize import Quantized

# For each weight: its value and gradient in float32, what one of them takes on the way, two copies of the weight as
# the model computes, and its code.
PER_WEIGHT = 2 * 4 + 4 + 4 + 1
LEAST_UNIT = 1e-3  # a vector of zeros still moves


class Polish(BlockTuner):
    """The polishing tuner.

    iters: steps for each block, 0 changes nothing; batch: calibration rows behind a step, in whole forwards; lr: first
    rate, as a share of a scale and of a vector's root mean square.
    """

    name = "polish"
    per_weight = PER_WEIGHT
    parameters: ClassVar[Mapping[str, Any]] = {"iters": 100, "batch": 8, "lr": 0.01}

    def __init__(self, iters: int, batch: int, lr: float) -> None:
        super().__init__(iters, batch)
        self.lr = _parameters.share("polish lr", lr)

    def changes(self, plan: Plan) -> Changes:
        """Returns the norms of the blocks that it works on, and the biases of its weights, where they are kept."""
        return Changes(frozenset(vectors(plan)) if self.iters else frozenset())

    def tune(self, block: TunedBlock, quantized: dict[str, Quantized]) -> Tuned:
        import torch

        from quarkcli.numerics.adjust import Adjustable, has_float_scales, within
        from quarkcli.numerics.quantize import dequantize

        specs = {name: block.targets[name].weight for name in quantized}
        scaled = {
            name: Adjustable(block.weight(name), start, specs[name])
            for name, start in quantized.items()
            if has_float_scales(specs[name])
        }
        fixed = {name: dequantize(start, specs[name]) for name, start in quantized.items() if name not in scaled}
        factors = {name: _factors(weight.start.params.scale) for name, weight in scaled.items()}
        moved = {name: _Vector(block.vector(name), block.norm_offset(name)) for name in block.vectors}
        leaves = [*factors.values(), *(vector.shift for vector in moved.values())]
        if not leaves:
            return Tuned({})
        adam = torch.optim.Adam(leaves, lr=self.lr, betas=(0.9, 0.95), foreach=False)

        def now() -> dict[str, Quantized]:
            return {name: weight.rescaled(factors[name]) for name, weight in scaled.items()}

        def values() -> dict[str, Tensor]:
            return {name: dequantize(q, specs[name]) for name, q in now().items()}

        def step(batches: list[int], share: float) -> None:
            adam.zero_grad()
            own = {name: value.requires_grad_() for name, value in values().items()}
            for batch in batches:
                shifted = {name: vector.value() for name, vector in moved.items()}
                block.loss({**fixed, **own}, batch, shifted).backward()
            for name, value in own.items():
                if value.grad is not None:
                    factors[name].grad = scaled[name].scale_gradients(factors[name], value.grad)
            for group in adam.param_groups:
                group["lr"] = self.lr * share
            adam.step()
            for factor in factors.values():
                within(factor)

        def error() -> float:
            with torch.no_grad():
                return block.error({**fixed, **values()}, {name: vector.value() for name, vector in moved.items()})

        def state() -> tuple[dict[str, Quantized], dict[str, Tensor]]:
            return now(), {name: vector.value().detach() for name, vector in moved.items()}

        best, before, after = keep_best(self.name, block, self.iters, self.batch, step, error, state)
        return Tuned(*(best or ({}, {})), before, after)


def vectors(plan: Plan) -> list[str]:
    """Returns the kept norms of blocks with quantized weights, and the kept biases of those weights."""
    blocks = {part.index: part for part in plan.parts if part.block is not None}
    mine = [target for target in plan.quantized() if target.part in blocks]
    inside = {name for index in {target.part for target in mine} for name in blocks[index].tensors}
    biases = [name for target in mine for name in (target.bias, expert_bias(target)) if name is not None]
    return [name for name in dict.fromkeys((*plan.norms, *biases)) if name in inside and name in plan.kept]


class _Vector:
    """A norm or bias on its way: its start, plus a shift in units of its root mean square.

    offset   what a norm adds to its weight
    """

    def __init__(self, start: Tensor, offset: float) -> None:
        import torch

        self.start = start.float()
        self.unit = (self.start + offset).square().mean().sqrt().clamp_min(LEAST_UNIT)
        self.shift = torch.zeros_like(self.start, requires_grad=True)

    def value(self) -> Tensor:
        return self.start + self.shift * self.unit


def _factors(scale: Tensor | None) -> Tensor:
    import torch

    assert scale is not None
    return torch.ones(1, *scale.shape, device=scale.device)


ALGORITHM = Polish
