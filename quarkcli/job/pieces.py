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

from quarkcli.disk.fidelity import BROKEN
from quarkcli.errors import some
from quarkcli.job.packing import Packing
from quarkcli.job.solving import Solved, Work
from quarkcli.numerics import stacked
from quarkcli.numerics.quantize import QParams, Quantized, dequantize
from quarkcli.plan.model import QuantizedTarget
from quarkcli.spec import PerTile, TensorSpec
from quarkcli.threads import Workers

# Rows of each weight that its error is measured on: as many as hold this many values, within bounds. Of a small weight,
# of which that would be most, a share, or as many as hold the least values.
ERROR_VALUES, LEAST_ROWS, MOST_ROWS = 1 << 17, 64, 256
ERROR_SHARE, LEAST_VALUES = 8, 1 << 14
LOST = 10 ** (-BROKEN / 20)  # an error at which `verify` takes a weight for damaged


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
    """Does all pieces, yields their weights in order, and hands on what was said meanwhile.

    Warns of weights of which next to nothing is left.
    """
    lost = []

    def do(piece: Work) -> tuple[list[Finished], list[str]]:
        said.lines = []
        try:
            return _finished(list(piece()), packing, bias), said.lines
        finally:
            said.lines = None

    for found, lines in workers.map(do, pieces):
        for line in lines:
            warn(line)
        lost += [f"{row.target.name} ({row.error:.0%})" for row in found if row.error > LOST]
        yield from found
    if lost:
        warn(f"nearly all values of {len(lost)} weights are lost: {some(lost)}; exclude them, or take another scheme")


def _finished(
    rows: list[Solved], packing: Packing, bias: Callable[[QuantizedTarget], Quantized | None]
) -> list[Finished]:
    started = time.perf_counter()
    made = [packing.pack(target, quantized, bias(target)) for target, _, quantized in rows]
    errors = weight_errors(rows)
    seconds = (time.perf_counter() - started) / max(1, len(rows))
    each = zip(rows, made, errors, strict=True)
    return [Finished(target, tensors, error, seconds) for (target, _, _), tensors, error in each]


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


def weight_errors(rows: list[Solved]) -> list[float]:
    """Returns the `weight_error` of some weights: together where rows have scales of their own and all are alike."""
    kinds = {(weight.shape, target.weight) for target, weight, _ in rows}
    in_order = all(quantized.order is None for _, _, quantized in rows)
    alike = len(rows) > 1 and len(kinds) == 1 and in_order
    if not alike or not stacked.takes(rows[0][0].weight, rows[0][1].device):
        return [weight_error(weight, quantized, target) for target, weight, quantized in rows]
    every = slice(None, None, _step(rows[0][1].shape))
    source = torch.cat([weight[every] for _, weight, _ in rows]).float()
    decoded = stacked.dequantized([quantized.some(every) for _, _, quantized in rows], rows[0][0].weight)
    norms = _norms(source, len(rows))
    lost = _norms(source.sub_(decoded), len(rows))
    return torch.where(norms > 0, lost / norms, 0.0).tolist()


def _step(shape: torch.Size) -> int:
    """Returns the distance of the rows of a weight that its error is measured on."""
    rows, cols = shape[0], max(1, shape[1])
    most = max(rows // ERROR_SHARE, -(-LEAST_VALUES // cols))
    return max(1, rows // min(MOST_ROWS, max(LEAST_ROWS, ERROR_VALUES // cols), most))


def weight_error(weight: Tensor, quantized: Quantized, target: QuantizedTarget) -> float:
    """Returns |W - Q| / |W| (Frobenius) over evenly spaced rows."""
    step = _step(weight.shape)
    source = weight[::step].to(torch.float32, copy=True)
    if isinstance(target.weight.granularity, PerTile) and target.weight.then is None:
        source, decoded = _bands(weight, quantized, target.weight, target.weight.granularity.rows, step)
    elif any(isinstance(stage.granularity, PerTile) for stage in target.weight.stages):  # several rows share scales
        decoded = dequantize(quantized, target.weight)[::step]
    else:
        decoded = dequantize(quantized.some(slice(None, None, step)), target.weight)
    norm = float(_norms(source))
    return float(_norms(source.sub_(decoded))) / norm if norm > 0 else 0.0


def _norms(values: Tensor, parts: int = 1) -> Tensor:
    """Returns the norms of equal parts, float64 [parts]: there no square of a float32 number is infinite or zero."""
    return torch.linalg.vector_norm(values.reshape(parts, -1), dim=1, dtype=torch.float64)


def _bands(weight: Tensor, quantized: Quantized, spec: TensorSpec, height: int, step: int) -> tuple[Tensor, Tensor]:
    """Returns evenly spaced rows of tiles, at least two or all, about every `step`th: of the source, and decoded."""
    count, params = -(-weight.shape[0] // height), quantized.params
    assert params.scale is not None
    source, decoded = [], []
    for band in range(0, count, max(1, min(step, count // 2))):
        own, at = slice(band * height, (band + 1) * height), slice(band, band + 1)
        zero = params.zero_point[at] if params.zero_point is not None else None
        part = Quantized(quantized.codes[own], QParams(params.scale[at], params.global_scale, zero))
        source.append(weight[own].float())
        decoded.append(dequantize(part, spec))
    return torch.cat(source), torch.cat(decoded)


def output_error(before: Tensor, after: Tensor) -> float:
    """Returns |before - after| / |before| over the rows of `after`, which are fewer where memory ran out between."""
    before = before[tuple(map(slice, after.shape))].float()
    after = after.to(before.device).float()
    norm = float(_norms(before))
    return float(_norms(before - after)) / norm if norm > 0 else 0.0
