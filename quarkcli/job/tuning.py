"""Shows one block to a tuner: its inputs, the source's outputs, and a forward pass with gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from quarkcli.algorithms.base import Assignment, Tuned, Tuner
from quarkcli.events import Working
from quarkcli.forward.moments import HELD_OUT, held_out
from quarkcli.forward.taps import unpadded
from quarkcli.forward.walk import SOURCE, Walk
from quarkcli.job.solving import Solved
from quarkcli.model.handlers import Handlers
from quarkcli.numerics.finite import is_finite
from quarkcli.numerics.quantize import Quantized, dequantize
from quarkcli.plan.model import Part, Plan, QuantizedTarget

Rows = dict[str, Solved]


class TunedBlock:
    """A decoder block with its source weights loaded, run as it is served: quantized activations included.

    number    index of the block
    targets   its quantized weights that the tuner was given, by name; set for one tuner after the other
    vectors   kept tensors that the tuner declared and the model's class reads; set likewise
    batches   number of batches of calibration rows, and `rows` in one
    fitted    batches that a tuner fits to
    held      batches that it is judged by: one in eight, the last of fewer. Where there is one alone, it is judged by
              tokens that are held out of it; of fewer than 2,048 tokens by those that it fits to
    """

    def __init__(self, plan: Plan, walk: Walk, part: Part, tensors: Mapping[str, Tensor], served: Handlers) -> None:
        assert part.block is not None
        self.number = part.block
        self.targets: dict[str, QuantizedTarget] = {}
        self.vectors: list[str] = []
        self._walk = walk
        self._plan = plan
        self._tensors = dict(tensors)
        self._served = served
        self._others: dict[str, Tensor] = {}
        self._all: dict[str, QuantizedTarget] = {}
        self._lay_out()

    def _lay_out(self) -> None:
        """Shares out the batches that there are."""
        walk = self._walk
        self.batches = len(walk.served)
        self.rows = walk.batch
        self.held = _held_batches(self.batches)
        self.fitted = [n for n in range(self.batches) if n not in self.held] or self.held
        self._masks = walk.masks()
        self._apart = walk._batches(held_out(*walk.tokens.shape))[0] if self.batches == 1 else None
        self._wanted: dict[int, Tensor] = {}

    def halve(self, cause: BaseException) -> None:
        """Goes on with half the rows in one forward. Raises ResourceError where a batch is one row already."""
        self._walk.halve(cause)
        self._lay_out()

    def working(self, what: str) -> None:
        """Tells the listener what is being done."""
        self._walk.tell(Working(f"{what}, block {self.number}"))

    def take(self, step: Assignment, rows: Rows) -> dict[str, Quantized]:
        """Sets the block for a tuner, and returns codes and scales of its weights. The others stay as they are."""
        declared, loads = self._plan.changes[step.key].tensors, self._walk.runner.loads
        self.vectors = [name for name in self._tensors if name in declared and loads(name)]
        self._all = {name: target for name, (target, _, _) in rows.items()}
        self.targets = {name: target for name, target in self._all.items() if step.takes(target)}
        left = [row for name, row in rows.items() if name not in self.targets]
        self._others = {target.name: dequantize(quantized, target.weight) for target, _, quantized in left}
        return {name: rows[name][2] for name in self.targets}

    def put(self, vectors: Mapping[str, Tensor]) -> None:
        """Puts other values in the place of kept vectors, for the tuners that follow."""
        self._tensors |= vectors

    def is_finite(self) -> bool:
        """True when the states that it reads, and those that it should give, hold neither NaN nor infinity."""
        return all(map(is_finite, self._walk.served)) and all(is_finite(self.wanted(n)) for n in range(self.batches))

    def weight(self, name: str) -> Tensor:
        """Returns the source weight [out, in] of a target."""
        view = self.targets[name].view
        found: Tensor = view.of(self._tensors[view.tensor])
        return found

    def vector(self, name: str) -> Tensor:
        """Returns a kept tensor of the block as it is now."""
        return self._tensors[name]

    def norm_offset(self, vector: str) -> float:
        """Returns what the family adds to the weight of a norm; 0 for any other vector."""
        return self._plan.rewrites.norm_offset if vector in self._plan.norms else 0.0

    def wanted(self, batch: int) -> Tensor:
        """Returns the output that the block should have for a batch.

        It is the source stream's states behind it where there are any, else the source block's output for the served
        inputs.
        """
        if SOURCE in self._walk.hidden:
            return self._walk.wanted(self.number, batch)
        if batch not in self._wanted:
            self._wanted[batch] = self._walk.wanted(self.number, batch)
        return self._wanted[batch]

    def run(self, weights: Mapping[str, Tensor], batch: int, vectors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the block's output for the served inputs of a batch.

        Gradients flow into `weights` [out, in] and `vectors`, which take the place of the block's own. Quantized
        weights that are not given are decoded ones where another tuner has them, else the source's.
        """
        given = {**self._others, **weights}
        by_tensor: dict[str, list[str]] = {}
        for name in given:
            by_tensor.setdefault(self._all[name].view.tensor, []).append(name)
        more = vectors or {}
        grad = any(tensor.requires_grad for tensor in (*given.values(), *more.values()))
        with torch.set_grad_enabled(grad), self._walk.runner.handlers(self.number, self._served):
            changed: dict[str, Tensor] = {}
            for tensor, names in by_tensor.items():
                views = [self._all[name].view for name in names]
                changed[tensor] = _Placed.apply(self._tensors[tensor], views, *(given[name] for name in names))
            changed |= {name: value.to(self._tensors[name].dtype) for name, value in more.items()}
            return self._walk.run_with(self.number, batch, {**self._tensors, **changed})

    def loss(
        self,
        weights: Mapping[str, Tensor],
        batch: int,
        vectors: Mapping[str, Tensor] | None = None,
        *,
        held: bool = False,
    ) -> Tensor:
        """Returns the squared error of the block's output over the squared output, float32 [].

        Padding is left out. `held`: of the tokens that are held out of the batch, where some are; else of the others
        """
        wanted = self.wanted(batch)
        made = self.run(weights, batch, vectors).reshape(-1, wanted.shape[-1]).float()
        kept = self._counted(batch, wanted.shape[:-1], held)
        wanted = wanted.reshape(-1, wanted.shape[-1]).float()
        if kept is not None:
            kept = kept.to(wanted.device)
            wanted, made = wanted[kept], made[kept]
        return (made - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)

    def error(self, weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None) -> float:
        """Returns the mean `loss` on the held-out batches."""
        with torch.no_grad():
            losses = [float(self.loss(weights, batch, vectors, held=True)) for batch in self.held]
        return sum(losses) / len(losses)

    def _counted(self, batch: int, leading: torch.Size, held: bool) -> Tensor | None:
        """Returns the tokens of a batch that count, bool [values]; None: all."""
        masks = [self._masks[batch], None if self._apart is None else self._apart if held else ~self._apart]
        flat = [found for mask in masks if mask is not None and (found := unpadded(mask, leading)) is not None]
        return flat[0] if len(flat) == 1 else flat[0] & flat[1] if flat else None


def _held_batches(batches: int) -> list[int]:
    return list(range(HELD_OUT - 1, batches, HELD_OUT)) or [batches - 1]


class _Placed(torch.autograd.Function):
    """A file tensor with other values where some weights lie. Gradients flow into those weights."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, views: Sequence[Any], *weights: Tensor) -> Tensor:
        ctx.views, ctx.dtypes = views, [weight.dtype for weight in weights]
        made = whole.clone()
        for view, weight in zip(views, weights, strict=True):
            view.of(made).copy_(weight)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = (view.of(grad).to(dtype) for view, dtype in zip(ctx.views, ctx.dtypes, strict=True))
        return (None, None, *own)


def tuned(
    tuners: Sequence[tuple[Assignment, Tuner]], block: TunedBlock, solved: Iterable[Solved]
) -> tuple[Rows, dict[str, Tensor], dict[str, dict[str, float]]]:
    """Returns the weights of a block as the tuners, one after the other, leave them; vectors that changed; errors."""
    rows: Rows = {target.name: (target, weight, quantized) for target, weight, quantized in solved}
    vectors: dict[str, Tensor] = {}
    errors: dict[str, dict[str, float]] = {}
    for step, tuner in tuners:
        before = block.take(step, rows)
        if not before:
            continue
        with _deterministic(block):
            found = _fitting_memory(tuner, block, before)
        for name, quantized in found.weights.items():
            rows[name] = (*rows[name][:2], quantized)
        changed = _declared(block, step, found)
        block.put(changed)
        vectors |= changed
        if found.before is not None and found.after is not None:
            errors[step.key] = {"before": found.before, "after": found.after}
    return rows, vectors, errors


def _fitting_memory(tuner: Tuner, block: TunedBlock, before: dict[str, Quantized]) -> Tuned:
    """Runs a tuner; from its start with half the rows in a forward whenever the device runs out of memory."""
    while True:
        try:
            return tuner.tune(block, before)
        except torch.OutOfMemoryError as error:
            cause = error
        clear_frames(cause.__traceback__)  # they hold the tensors of the pass that failed
        block.halve(cause)


def _declared(block: TunedBlock, step: Assignment, found: Tuned) -> dict[str, Tensor]:
    """Returns the changed vectors in the source's dtypes. The tuner has declared them."""
    undeclared = found.vectors.keys() - block._plan.changes[step.key].tensors
    if undeclared:
        raise AssertionError(f"tuner {step.key} changes {min(undeclared)}, which it has not declared")
    return {name: value.to(block.vector(name).dtype) for name, value in found.vectors.items()}


@contextmanager
def _deterministic(block: TunedBlock) -> Iterator[None]:
    """Asks for the same bits from every run of a backward pass on a GPU; a CPU gives them anyway."""
    if block._walk.device.type != "cuda":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
