"""Fits a block to its wanted output step by step, and keeps the best result on held-out rows. Tuners share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, TypeVar

from quarkcli.algorithms._parameters import whole
from quarkcli.algorithms.base import Needs, Tuner
from quarkcli.errors import ConfigError
from quarkcli.plan.model import Plan

if TYPE_CHECKING:
    from quarkcli.job.tuning import TunedBlock

CHECKS = 20  # times that a block's error on held-out rows is measured
FORWARD_TOKENS = 2048  # tokens in one forward and backward pass on a CPU
# Float32 values that a backward pass keeps of every activation: as it is read, as it is written, and its gradient.
KEPT_VALUES = 3

State = TypeVar("State")


def keep_best(
    name: str,
    block: TunedBlock,
    iters: int,
    batch: int,
    step: Callable[[list[int], float], None],
    error: Callable[[], float],
    state: Callable[[], State],
) -> tuple[State | None, float, float]:
    """Returns the best state found, None where the start is the best; the error before, and that of what is returned.

    step    moves the block: on these batches, at this share of the first rates, which falls to zero
    error   of the block as it is, on held-out rows
    state   what the block is now
    """
    before = least = error()
    best: State | None = None
    every = max(1, iters // CHECKS)
    for number, batches in enumerate(_batches(block, iters, batch)):
        block.working(f"{name}: step {number + 1} of {iters}")
        step(batches, 1.0 - number / iters)
        if (number + 1) % every == 0 or number + 1 == iters:
            now = error()
            if now < least:
                least, best = now, state()
    return best, before, least


def _batches(block: TunedBlock, iters: int, batch: int) -> Iterator[list[int]]:
    """Yields the batches behind every step: one after the other, whole forwards of about `batch` rows."""
    passes = min(max(1, round(batch / block.rows)), len(block.fitted))
    for number in range(iters):
        yield [block.fitted[(number * passes + n) % len(block.fitted)] for n in range(passes)]


class BlockTuner(Tuner):
    """A tuner that fits blocks to what the source's blocks hand on, step by step.

    per_weight   bytes that it takes for each weight, beside those of a backward pass
    iters        steps for each block; 0 changes nothing
    batch        calibration rows behind a step, in whole forwards
    """

    streams = frozenset({"served", "source"})
    per_weight: ClassVar[int]

    def __init__(self, iters: int, batch: int) -> None:
        self.iters = whole(f"{self.name} iters", iters, 0)
        self.batch = whole(f"{self.name} batch", batch, 1)

    def needs(self, plan: Plan) -> Needs:
        """Returns what makes the activations of its blocks run."""
        if not self.iters:
            return {}
        return {target.site: {"outputs"} for target in plan.quantized() if target.site is not None}

    def check(self, plan: Plan) -> None:
        """Raises ConfigError when no block has a quantized weight that a forward pass reaches."""
        blocks = {part.index for part in plan.parts if part.block is not None}
        if not any(target.part in blocks and target.site is not None for target in plan.quantized()):
            raise ConfigError(
                f"{self.name} has nothing to do: none of its quantized weights is in a decoder block",
                hint=f"leave {self.name} out, or give it other 'slots' (the weights that it works on)",
                kind="E-ALGORITHM-IDLE",
            )

    def forwards(self, tokens: int) -> float:
        """Returns the passes that its steps make: forward, backward to inputs and to weights."""
        return 3 * self.iters * FORWARD_TOKENS / tokens if tokens else 0.0

    def memory(self, plan: Plan) -> int:
        """Returns the bytes that fitting the largest block takes: so many for each weight, and a backward pass."""
        weights: dict[int, int] = {}
        activations: dict[int, int] = {}
        for target in plan.quantized() if self.iters else ():
            weights[target.part] = weights.get(target.part, 0) + target.numel
            if target.expert is None:
                activations[target.part] = activations.get(target.part, 0) + sum(target.shape)
        tokens = FORWARD_TOKENS * KEPT_VALUES * 4
        return max((self.per_weight * n + tokens * activations.get(p, 0) for p, n in weights.items()), default=0)
