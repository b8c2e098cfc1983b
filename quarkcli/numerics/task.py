"""Holds the rows of a problem: weights with their scales, numbered through, and runs that are solved at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quarkcli.numerics.grid import QParams, grid
from quarkcli.numerics.refine import Rows
from quarkcli.numerics.rows import cpu_rows
from quarkcli.spec import TensorSpec

SAMPLE = 64  # rows of a problem that choices are made on


class Task:
    """The weights [out, in] of a problem with their scales; rows are numbered through all of them."""

    def __init__(self, weights: Sequence[Tensor], params: Sequence[QParams], spec: TensorSpec) -> None:
        self.weights, self.params, self.spec = weights, params, spec
        self.grids = [grid(p, spec, w.shape) for p, w in zip(params, weights, strict=True)]
        self.count = sum(len(weight) for weight in weights)

    def pieces(self) -> Iterator[list[tuple[int, slice]]]:
        """Yields runs of rows, by weight, that are solved at once."""
        first = self.weights[0]
        limit = cpu_rows(first.shape[1]) if first.device.type == "cpu" else max(1, self.count)
        run: list[tuple[int, slice]] = []
        room = limit
        for index, weight in enumerate(self.weights):
            start = 0
            while start < len(weight):
                stop = min(len(weight), start + room)
                run.append((index, slice(start, stop)))
                room -= stop - start
                start = stop
                if not room:
                    yield run
                    run, room = [], limit
        if run:
            yield run

    def sample(self) -> list[tuple[int, slice]]:
        """Returns every n-th row, so that there are about `SAMPLE`."""
        step = max(1, self.count // SAMPLE)
        return [(index, slice(0, len(weight), step)) for index, weight in enumerate(self.weights)]

    def rows(self, run: Sequence[tuple[int, slice]]) -> Rows:
        """Returns rows without values yet."""

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            known = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(known) if known else None

        first = self.grids[0]
        weight = torch.cat([self.weights[i][part].float() for i, part in run])
        real = torch.cat([self.grids[i].scale[part] for i, part in run])
        zero = joined([cut(self.grids[i].zero, part) for i, part in run])
        stored = outer = None
        if self.spec.has_own_scales:
            stored = _joined_bits([required(self.params[i].scale)[part] for i, part in run])
            outer = joined([_outer(self.params[i].global_scale, self.weights[i][part]) for i, part in run])
        return Rows(weight, weight, stored, outer, real, zero, first.size, first.element)


def _outer(scale: Tensor | None, weight: Tensor) -> Tensor | None:
    return scale.view(1, 1).expand(len(weight), 1) if scale is not None else None


def _joined_bits(tensors: list[Tensor]) -> Tensor:
    """Returns scales of several weights; float8 is joined by its bits, for which torch has no `cat`."""
    if tensors[0].element_size() > 1:
        return torch.cat(tensors)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


def cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    return tensor[part] if tensor is not None else None


def required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
