"""Fits a block to its wanted output step by step, and keeps what is best on held-out rows: what tuners share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from quarkcli.algorithms.base import Needs
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


def needs(plan: Plan) -> Needs:
    """Returns what a tuner needs: that the activations of its blocks are run."""
    return {target.site: {"outputs"} for target in plan.quantized() if target.site is not None}


def check_blocks(name: str, plan: Plan) -> None:
    """Raises ConfigError when no block has a quantized weight that a forward pass reaches: nothing could be tuned."""
    blocks = {part.index for part in plan.parts if part.block is not None}
    if not any(target.part in blocks and target.site is not None for target in plan.quantized()):
        raise ConfigError(
            f"{name} tunes blocks by their outputs, and no quantized weight of its own lies in a block",
            hint=f"leave {name} out, or give it other 'slots'",
        )


def memory(plan: Plan, per_weight: int) -> int:
    """Returns the bytes that fitting the largest block takes: so many for each weight, and those of a backward pass."""
    weights: dict[int, int] = {}
    activations: dict[int, int] = {}
    for target in plan.quantized():
        weights[target.part] = weights.get(target.part, 0) + target.numel
        if target.expert is None:
            activations[target.part] = activations.get(target.part, 0) + sum(target.shape)
    tokens = FORWARD_TOKENS * KEPT_VALUES * 4
    return max((per_weight * n + tokens * activations.get(part, 0) for part, n in weights.items()), default=0)


def check_whole(where: str, value: Any, least: int) -> int:
    """Returns a parameter that must be a whole number. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where} must be a whole number from {least}, not {value!r}")
    return value


def check_rate(where: str, value: Any, auto: float | None = None) -> float:
    """Returns a parameter that must lie between 0 and 1; `auto` for that word, where it has a meaning."""
    if auto is not None and value == "auto":
        return auto
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        wanted = "lie between 0 and 1" if auto is None else "be 'auto' or lie between 0 and 1"
        raise ConfigError(f"{where} must {wanted}, not {value!r}")
    return float(value)


def check_flag(where: str, value: Any) -> bool:
    """Returns a parameter that must be true or false. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, not {value!r}")
    return value
