"""AutoRound (arXiv 2309.05516): learns how to round each code, and factors of scales, by the sign of the gradients.

Every block starts from the codes and scales of its solver. An offset V within half a step of the grid moves a weight
inside, or out of, the rounding interval of its code; a factor moves the scale of a group, which is stored as the format
stores it. Both step by the sign of the gradient of the block's output error, at a rate that falls to zero; the target
is what the source's blocks hand on, and activations are quantized as they are served. The result with the least error
on held-out rows is kept, which is the start itself where nothing is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms import _parameters
from quarkcli.algorithms._fitting import BlockTuner, keep_best
from quarkcli.algorithms.base import Tuned

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.job.tuning import TunedBlock
    from quarkcli.numerics.adjust import Adjustable
    from quarkcli.numerics.quantize import Quantized

# For each weight: its place, offset, value and gradient in float32, what one of them takes on the way, two copies of
# the weight as the model computes, the codes it starts from and the best.
PER_WEIGHT = 4 * 4 + 4 + 4 + 2


class AutoRound(BlockTuner):
    """The AutoRound tuner.

    iters: steps for each block, 0 changes nothing; batch: calibration rows behind a step, in whole forwards;
    lr: first rate of the offsets, `auto` is 1 / iters; minmax: whether scales move; minmax_lr: first rate of their
    factors, `auto` is that of the offsets.
    """

    name = "autoround"
    per_weight = PER_WEIGHT
    parameters: ClassVar[Mapping[str, Any]] = {
        "iters": 200, "batch": 8, "lr": "auto", "minmax": True, "minmax_lr": "auto",
    }  # fmt: skip

    def __init__(self, iters: int, batch: int, lr: float | str, minmax: bool, minmax_lr: float | str) -> None:
        super().__init__(iters, batch)
        self.lr = _parameters.auto_share("autoround lr", lr) or 1.0 / max(1, self.iters)
        self.minmax = _parameters.flag("autoround minmax", minmax)
        self.minmax_lr = _parameters.auto_share("autoround minmax_lr", minmax_lr) or self.lr

    def tune(self, block: TunedBlock, quantized: dict[str, Quantized]) -> Tuned:
        from quarkcli.numerics.adjust import Adjustable, moves_codes
        from quarkcli.numerics.quantize import dequantize

        specs = {name: block.targets[name].weight for name in quantized}
        weights = {
            name: _Moving(Adjustable(block.weight(name), start, specs[name]), self.minmax)
            for name, start in quantized.items()
            if moves_codes(specs[name])
        }
        fixed = {name: dequantize(start, specs[name]) for name, start in quantized.items() if name not in weights}

        def step(batches: list[int], share: float) -> None:
            leaves = {name: moving.values().requires_grad_() for name, moving in weights.items()}
            for batch in batches:
                block.loss({**fixed, **leaves}, batch).backward()
            for name, moving in weights.items():
                grad = leaves.pop(name).grad
                if grad is not None and bool(grad.any()):
                    moving.step(grad, self.lr * share, self.minmax_lr * share)

        def error() -> float:
            return block.error({**fixed, **{name: moving.values() for name, moving in weights.items()}})

        def state() -> dict[str, Quantized]:
            return {name: moving.quantized() for name, moving in weights.items() if moving.moved}

        best, before, after = keep_best(self.name, block, self.iters, self.batch, step, error, state)
        return Tuned(best or {}, {}, before, after)


class _Moving:
    """The offsets and factors of one weight.

    moved   whether they were ever moved: an expert without tokens keeps what its solver chose
    """

    def __init__(self, weight: Adjustable, scales: bool) -> None:
        self.weight = weight
        self.offset = weight.offset()
        self.factors = weight.factors() if scales else None
        self.moved = False

    def quantized(self) -> Quantized:
        return self.weight.quantized(self.offset, self.factors)

    def values(self) -> Tensor:
        return self.weight.values(self.offset, self.factors)

    def step(self, grad: Tensor, lr: float, minmax_lr: float) -> None:
        """Moves against the sign of the gradients that follow from `grad`, the one by the values."""
        from quarkcli.numerics.adjust import within

        by_offset, by_factors = self.weight.gradients(self.offset, self.factors, grad)
        self.offset.sub_(by_offset.sign_(), alpha=lr).clamp_(-0.5, 0.5)
        if self.factors is not None and by_factors is not None:
            within(self.factors.sub_(by_factors.sign_(), alpha=minmax_lr))
        self.moved = True


ALGORITHM = AutoRound
