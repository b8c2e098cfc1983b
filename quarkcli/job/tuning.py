"""One block as a tuner sees it: inputs, the source's outputs, and a forward pass with gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quarkcli.algorithms.base import Assignment, Tuner
from quarkcli.forward.walk import Walk
from quarkcli.job.solving import Solved
from quarkcli.numerics.quantize import Quantized
from quarkcli.plan.model import Part, QuantizedTarget


class TunedBlock:
    """A decoder block with its source weights loaded.

    targets   its quantized weights that the tuner was given, by name; set for one tuner after the other
    batches   number of batches of calibration rows
    """

    def __init__(self, walk: Walk, part: Part, tensors: Mapping[str, Tensor]) -> None:
        assert part.block is not None
        self.targets: dict[str, QuantizedTarget] = {}
        self.batches = len(walk.served)
        self._walk = walk
        self._block = part.block
        self._tensors = tensors
        self._wanted: dict[int, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """Returns the source weight [out, in] of a target."""
        view = self.targets[name].view
        found: Tensor = view.of(self._tensors[view.tensor])
        return found

    def wanted(self, batch: int) -> Tensor:
        """Returns the output that the block should have for a batch.

        It is the source stream's states behind it where there are any, else the source block's output for the served
        inputs.
        """
        if batch not in self._wanted:
            self._wanted[batch] = self._walk.wanted(self._block, batch)
        return self._wanted[batch]

    def run(self, weights: Mapping[str, Tensor], batch: int) -> Tensor:
        """Returns the block's output for the served inputs of a batch, with `weights` [out, in] instead of its own.

        Gradients flow into `weights`. Activations are not quantized.
        """
        with torch.enable_grad():
            changed: dict[str, Tensor] = {}
            for name, weight in weights.items():
                view = self.targets[name].view
                whole = changed.get(view.tensor)
                if whole is None:
                    whole = self._tensors[view.tensor].clone()
                changed[view.tensor] = _placed(whole, self.targets[name], weight)
            return self._walk.run_with(self._block, batch, {**self._tensors, **changed})


def _placed(whole: Tensor, target: QuantizedTarget, weight: Tensor) -> Tensor:
    """Returns a file tensor with other values where a weight lies; a new tensor, so that gradients flow."""
    made = whole.clone()
    target.view.of(made).copy_(weight)
    return made


def tuned(tuners: Sequence[tuple[Assignment, Tuner]], block: TunedBlock, solved: Iterable[Solved]) -> Iterator[Solved]:
    """Yields every weight of a block with the codes and scales that the tuners, one after the other, leave it."""
    rows = {target.name: (target, weight, quantized) for target, weight, quantized in solved}
    for step, tuner in tuners:
        block.targets = {name: target for name, (target, _, _) in rows.items() if step.takes(target)}
        before: dict[str, Quantized] = {name: rows[name][2] for name in block.targets}
        for name, quantized in tuner.tune(block, before).items() if before else ():
            rows[name] = (*rows[name][:2], quantized)
    yield from rows.values()
