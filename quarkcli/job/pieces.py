"""Cuts the work on a part's weights into pieces, from solver to packed tensors, for several threads.

What a thread says is kept until its piece is taken: lines come in the order of the weights, whoever was faster.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quarkcli.job.packing import Packing
from quarkcli.job.solving import Solved, Work
from quarkcli.numerics.quantize import QParams, Quantized, dequantize
from quarkcli.plan.model import QuantizedTarget
from quarkcli.spec import PerTile, TensorSpec
from quarkcli.threads import Workers

# Rows of each weight that its error is measured on: as many as hold this many values, within bounds.
ERROR_VALUES, LEAST_ROWS, MOST_ROWS = 1 << 17, 64, 256


class Finished(NamedTuple):
    """A weight's packed tensors in each dialect, its error, and the seconds that packing took."""

    target: QuantizedTarget
    made: list[dict[str, Tensor]]
    error: float
    seconds: float


class Said(threading.local):
    """The lines of a thread's piece of work; None outside of one."""

    lines: list[str] | None = None


def in_turn(rows: Iterable[Solved]) -> Iterator[Work]:
    """Yields a piece for each of some weights that are solved one after the other."""
    for row in rows:
        yield [row].__iter__


def finished(
    pieces: Iterable[Work],
    packing: Packing,
    bias: Callable[[QuantizedTarget], Quantized | None],
    workers: Workers,
    said: Said,
    warn: Callable[[str], None],
) -> Iterator[Finished]:
    """Does all pieces, yields their weights in order, and hands on what was said meanwhile."""

    def do(piece: Work) -> tuple[list[Finished], list[str]]:
        said.lines = []
        try:
            return [_finished(row, packing, bias) for row in piece()], said.lines
        finally:
            said.lines = None

    for found, lines in workers.map(do, pieces):
        for line in lines:
            warn(line)
        yield from found


def _finished(row: Solved, packing: Packing, bias: Callable[[QuantizedTarget], Quantized | None]) -> Finished:
    target, weight, quantized = row
    started = time.perf_counter()
    made, error = packing.pack(target, quantized, bias(target)), weight_error(weight, quantized, target)
    return Finished(target, made, error, time.perf_counter() - started)


class Leaving:
    """Drops tensors when the last weight in them is packed.

    tensors   of the part, by name
    wanted    names of those that are needed later
    """

    def __init__(self, tensors: dict[str, Tensor], targets: Iterable[QuantizedTarget], wanted: Iterable[str]) -> None:
        self._tensors = tensors
        self._left = Counter(target.view.tensor for target in targets)
        for name in wanted:
            self._left.pop(name, None)

    def packed(self, target: QuantizedTarget) -> None:
        """Notes that a weight is packed."""
        name = target.view.tensor
        self._left[name] -= 1
        if not self._left[name]:
            del self._tensors[name]


def weight_error(weight: Tensor, quantized: Quantized, target: QuantizedTarget) -> float:
    """Returns |W - Q| / |W| (Frobenius) over evenly spaced rows."""
    rows = min(MOST_ROWS, max(LEAST_ROWS, ERROR_VALUES // max(1, weight.shape[1])))
    step = max(1, weight.shape[0] // rows)
    source = weight[::step].to(torch.float32, copy=True)
    if isinstance(target.weight.granularity, PerTile) and target.weight.then is None:
        source, decoded = _bands(weight, quantized, target.weight, target.weight.granularity.rows, rows)
    elif any(isinstance(stage.granularity, PerTile) for stage in target.weight.stages):  # several rows share scales
        decoded = dequantize(quantized, target.weight)[::step]
    else:
        decoded = dequantize(quantized.some(slice(None, None, step)), target.weight)
    norm = source.norm()
    return float(source.sub_(decoded).norm() / norm) if float(norm) > 0 else 0.0


def _bands(weight: Tensor, quantized: Quantized, spec: TensorSpec, height: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns evenly spaced rows of tiles, at least two or all, of about `rows` rows: of the source, and decoded."""
    count, params = -(-weight.shape[0] // height), quantized.params
    assert params.scale is not None
    source, decoded = [], []
    for band in range(0, count, max(1, count // max(2, rows // height))):
        own, at = slice(band * height, (band + 1) * height), slice(band, band + 1)
        zero = params.zero_point[at] if params.zero_point is not None else None
        part = Quantized(quantized.codes[own], QParams(params.scale[at], params.global_scale, zero))
        source.append(weight[own].float())
        decoded.append(dequantize(part, spec))
    return torch.cat(source), torch.cat(decoded)
