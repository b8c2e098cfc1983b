"""Finds factors for channels that move size from activations to weights, and the loss that then remains.

The cost is measured on sampled rows of the activation: the mean over tokens of |qdq(X / s) qdq(W s)^T - X W^T|^p, of
all weights that read the channels, p = 2 or 1. Where the server turns inputs by a block Hadamard H, it is that of
qdq(X / s H) qdq(W s H)^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quarkcli.numerics.online import turned
from quarkcli.numerics.products import through_onednn
from quarkcli.numerics.quantize import dequantize, fake_quantize, quantize, static_scale
from quarkcli.numerics.sample import Sample
from quarkcli.spec import PerTile, TensorSpec
from quarkcli.threads import Workers

_LEAST_WEIGHT = 1e-5  # below, a column counts as this large: what nobody reads must not blow a channel up
_LEAST_FACTOR = 1e-4
# Weights that are clipped at once, and rows of them at least: on a GPU every group costs a few launches.
_CLIPPED, _DEVICE_CLIPPED, _CLIPPED_ROWS = 1 << 19, 1 << 23, 128
_CLIPPING = 8  # threads that do so at once, at most: each takes about 25 MB
_COARSE = 4  # every so many candidates are tried first, then those around the best


def smooth_factors(seen: Tensor, columns: Tensor, alpha: float, clamp_min: float = 1e-3) -> Tensor:
    """Returns SmoothQuant's factors, float32 [channels]: seen^alpha / columns^(1 - alpha).

    seen       largest magnitude of every channel; 1 for a channel that was always zero
    columns    largest magnitude of the weights that read it
    clamp_min  the smallest factor
    """
    factors = seen.double().pow(alpha) / columns.double().clamp_min(_LEAST_WEIGHT).pow(1.0 - alpha)
    return torch.where(seen > 0, factors.clamp_min(clamp_min), 1.0).float()


def scaled_factors(seen: Tensor, columns: Tensor | None, ratio: float) -> Tensor:
    """Returns AWQ's factors, float32 [channels]: seen^ratio, or seen^ratio / columns^(1 - ratio).

    They are divided by the geometric mean of the largest and smallest. 1 for a channel that was always zero.
    seen     mean magnitude of every channel
    columns  root mean square of the weights that read it; None: activations alone
    """
    factors = seen.double().pow(ratio)
    if columns is not None:
        factors = factors / columns.double().clamp_min(_LEAST_WEIGHT).pow(1.0 - ratio)
    live = seen > 0
    if not bool(live.any()):
        return torch.ones_like(seen)
    known = factors[live].clamp_min(_LEAST_FACTOR)
    factors = factors.clamp_min(_LEAST_FACTOR) / (known.max() * known.min()).sqrt()
    return torch.where(live, factors, 1.0).float()


@dataclass
class Reader:
    """Weights that read the channels, with some of their rows.

    rows      float32 [n, width], evenly picked
    columns   largest magnitude of every column of the whole weight, float32 [width]
    spec      how it is quantized; `input`: how what it reads is, None: not at all
    group     weights of one name share a scale per tensor
    importance  how much an error of its output counts, by the share of tokens that it sees and of rows that were picked
    block     size of the Hadamard blocks that the server turns its input by; 1: none
    """

    rows: Tensor
    columns: Tensor
    spec: TensorSpec
    input: TensorSpec | None
    group: str
    importance: float = 1.0
    block: int = 1


def picked_rows(weight: Tensor, most: int, spec: TensorSpec) -> Tensor:
    """Returns at most about `most` rows of a weight, evenly picked; where rows share scales, whole tiles of them."""
    tile = max((s.granularity.rows for s in spec.stages if isinstance(s.granularity, PerTile)), default=1)
    count = -(-weight.shape[0] // tile)
    step = max(1, -(-count * tile // most))
    if tile == 1:
        return weight[::step]
    return torch.cat([weight[at * tile : (at + 1) * tile] for at in range(0, count, step)])


class Cost:
    """Says what the readers' outputs lose under factors of the columns.

    seen         largest magnitude of every column of the activation, for static scales of inputs; None: not needed.
                 Where the server turns the input, the sampled rows tell its range
    conditional  mean square of every column that those rounded after it cannot make up for, float32 [width], where a
                 solver makes up for errors; then weights are judged by it, not by the rows
    power        2: mean square, 1: mean magnitude
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        *,
        seen: Tensor | None = None,
        conditional: Tensor | None = None,
        power: int = 2,
    ) -> None:
        self.readers = list(_joined(readers))
        self.seen = seen
        self.conditional = conditional
        self.power = power

    @property
    def squares(self) -> bool:
        """True when the cost is one of squares, not of magnitudes."""
        return self.power == 2 or self.conditional is not None

    @property
    def outputs(self) -> float:
        """Returns the number of outputs that the cost is summed over, each counted as it weighs."""
        return float(sum(reader.importance.sum() for reader in self.readers))

    def __call__(self, factors: Tensor, sample: Sample) -> float:
        """Returns the cost under factors, float32 [width], on sampled rows of the activation."""
        total, rows = 0.0, sample.rows
        inputs: dict[tuple[int, int], Tensor] = {}
        for reader in self.readers:
            key = id(reader.input), reader.block
            if reader.input is not None and key not in inputs:
                inputs[key] = self.input(reader.input, factors, rows, reader.block)
            own = inputs[key] if reader.input is not None else rows
            with through_onednn():
                total += self._of(reader, factors, sample, own)
        return total

    def _of(self, reader: _Joined, factors: Tensor, sample: Sample, own: Tensor) -> float:
        changed, rows = reader.quantized(factors) / factors, sample.rows
        if self.conditional is None:
            lost = self._lost(reader, changed, rows, own)
            return float(sample.mean(lost.abs() if self.power == 1 else lost.square()) @ reader.importance)
        weights = (changed.sub_(reader.rows).square_() @ self.conditional) @ reader.importance
        if reader.input is None:
            return float(weights)
        return float(weights + sample.mean(((own - rows) @ reader.rows.T).square_()) @ reader.importance)

    def _lost(self, reader: _Joined, changed: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """Returns what the outputs of sampled rows of weights lose, [n, rows]."""
        if reader.input is None:
            return rows @ changed.sub_(reader.rows).T
        if reader.outputs is None or reader.outputs[0] is not rows:
            reader.outputs = rows, rows @ reader.rows.T
        return (own @ changed.T).sub_(reader.outputs[1])

    def input(self, spec: TensorSpec, factors: Tensor, rows: Tensor, block: int = 1) -> Tensor:
        """Returns the rows as a quantized input of smoothed, turned channels gives them, back at their own size."""
        read = turned(rows / factors, block)
        static = None
        if self.seen is not None and spec.needs_amax:
            static = static_scale((self.seen / factors).max() if block == 1 else read.abs().max(), spec)
        return turned(fake_quantize(read, spec, static), block) * factors


@dataclass
class _Joined:
    """Rows of weights with one spec that share their scale per tensor, if they have one.

    outputs  rows of the activation last asked for, and the outputs that they have without quantization
    """

    rows: Tensor
    columns: Tensor
    spec: TensorSpec
    input: TensorSpec | None
    importance: Tensor
    block: int
    outputs: tuple[Tensor, Tensor] | None = None

    def quantized(self, factors: Tensor) -> Tensor:
        """Returns the rows times factors, turned, quantized, dequantized and turned back."""
        read, amax = turned(self.rows * factors, self.block), None
        if self.spec.has_tensor_scale:
            amax = (self.columns * factors).max() if self.block == 1 else read.abs().max()
        return turned(dequantize(quantize(read, self.spec, amax=amax), self.spec), self.block)


def _joined(readers: Sequence[Reader]) -> Iterable[_Joined]:
    groups: dict[object, list[Reader]] = {}
    for reader in readers:
        group = reader.group if reader.spec.has_tensor_scale else ""
        groups.setdefault((reader.spec, reader.input, reader.block, group), []).append(reader)
    for own in groups.values():
        importance = torch.cat([r.rows.new_full((len(r.rows),), r.importance) for r in own])
        columns = torch.stack([r.columns for r in own]).amax(0)
        rows = torch.cat([r.rows for r in own])
        yield _Joined(rows, columns, own[0].spec, own[0].input, importance, own[0].block)


class SourceCost:
    """Says what the linear that writes the channels loses when its rows share scales, in the readers' outputs.

    weight      some of its rows, float32 [n, in]; `picked`: the channels that they write
    largest     largest magnitude of every row of the whole weight, float32 [channels]
    squares     mean square of every column of what it reads, float32 [in]
    importance  how much the relative error of each of these rows counts, float32 [n]
    """

    def __init__(
        self, weight: Tensor, picked: Tensor, largest: Tensor, spec: TensorSpec, squares: Tensor, importance: Tensor
    ) -> None:  # fmt: skip
        self.weight = weight
        self.picked = picked
        self.largest = largest
        self.spec = spec
        self.squares = squares
        energy = weight.square() @ squares
        self.importance = importance / energy.clamp_min(torch.finfo(torch.float32).tiny)

    def __call__(self, factors: Tensor) -> float:
        """Returns the cost under factors of all channels."""
        own = factors[self.picked].unsqueeze(1)
        amax = (self.largest / factors).max() if self.spec.has_tensor_scale else None
        lost = dequantize(quantize(self.weight / own, self.spec, amax=amax), self.spec) * own - self.weight
        return float((lost.square() @ self.squares) @ self.importance)


@dataclass(frozen=True)
class Choice:
    """A candidate with its cost: the kind and ratio that made it, its factors, float32 [channels]."""

    kind: str
    ratio: float
    factors: Tensor
    cost: float


def search(
    kinds: dict[str, Callable[[float], Tensor]], steps: int, cost: Callable[[Tensor], float], first: Sequence[Choice]
) -> Choice:
    """Returns the cheapest candidate: of `first`, and of ratios 0, 1/steps ... 1 of every kind.

    Of more than twelve ratios every fourth is tried, and then those around the best of each kind.
    """
    best = min(first, key=lambda choice: choice.cost)
    for kind, make in kinds.items():
        found: dict[int, Choice] = {}

        def tried(index: int, kind: str = kind, make: Callable[[float], Tensor] = make) -> Choice:
            factors = make(index / steps)
            return Choice(kind, index / steps, factors, cost(factors))

        stride = _COARSE if steps > 3 * _COARSE else 1
        for index in range(0, steps + 1, stride):
            found[index] = tried(index)
        middle = min(found, key=lambda index: found[index].cost)
        for index in range(max(0, middle - stride + 1), min(steps, middle + stride - 1) + 1):
            if index not in found:
                found[index] = tried(index)
        best = min([best, *found.values()], key=lambda choice: choice.cost)
    return best


def clip_limits(
    weight: Tensor, sample: Sample, spec: TensorSpec, amax: Tensor | None, least: float, step: float
) -> tuple[Tensor, Tensor]:
    """Returns the magnitude at which every group of a weight is best clipped, and where that is below its largest.

    The criterion is what the outputs lose on sampled rows of the activation. Groups are chosen one after the other,
    each with the errors of all others as they are by then: what one adds to an output another may take away. First
    every second step is tried, then those beside the best.

    weight   float32 [out, width]
    amax     that of the scale group, for specs with a scale per tensor
    least    the smallest share of the largest magnitude that is tried, in steps of `step`
    Limits are float32 [out, groups].
    """
    size = spec.group_size or weight.shape[1]
    count, last = weight.shape[1] // size, int((1.0 - least) / step + 1e-9)
    read = Read.of(sample.balanced().view(-1, count, size))

    def chosen(part: slice) -> tuple[Tensor, Tensor]:
        """Returns the limits of some rows, and where they clip."""
        whole = weight[part]
        largest = whole.view(-1, count, size).abs().amax(-1)

        def error(steps: Tensor) -> Tensor:
            kept = _clamped(whole, largest * (1.0 - step * steps), size)
            apart = dequantize(quantize(kept, spec, amax=amax), spec).sub_(whole).view(-1, count, size)
            return apart.transpose(0, 1)

        steps = torch.zeros(largest.shape, dtype=torch.int64, device=weight.device)
        now = error(steps).contiguous()
        lost = read.outputs(now)
        for more in filter(None, (range(2, last + 1, 2), (-1, 1))):  # of one step in all, none is a second one
            tried = [(steps + number).clamp_(0, last) for number in more]
            best = _descended(now, [error(own) for own in tried], read, lost)
            steps = torch.stack([steps, *tried]).gather(0, best.unsqueeze(0))[0]
        return largest * (1.0 - step * steps), steps > 0

    on_cpu = weight.device.type == "cpu"
    at_once = max(_CLIPPED_ROWS, (_CLIPPED if on_cpu else _DEVICE_CLIPPED) // weight.shape[1])
    parts = [slice(start, start + at_once) for start in range(0, len(weight), at_once)]
    threads = min(torch.get_num_threads(), _CLIPPING, len(parts)) if on_cpu else 1
    with through_onednn(), Workers(threads) as workers:
        limits, clipped = zip(*workers.map(chosen, parts), strict=True)
    return torch.cat(limits), torch.cat(clipped)


class Read(NamedTuple):
    """Sampled rows of an activation, group by group.

    rows     float32 [groups, n, size]
    squares  their second moments [groups, size, size]; None where there are fewer rows than columns
    """

    rows: Tensor
    squares: Tensor | None

    @classmethod
    def of(cls, rows: Tensor) -> Read:
        """Returns those of rows [n, groups, size]."""
        apart = rows.transpose(0, 1).contiguous()
        return cls(apart, apart.transpose(1, 2) @ apart if apart.shape[1] > apart.shape[2] else None)

    def outputs(self, errors: Tensor) -> Tensor:
        """Returns what outputs lose by errors [groups, R, size] of weights, float32 [R, n]."""
        lost = errors.new_zeros(errors.shape[1], self.rows.shape[1])
        for own, rows in zip(errors, self.rows, strict=True):
            lost.addmm_(own, rows.T)
        return lost

    def costs(self, group: int, changes: Tensor, lost: Tensor) -> Tensor:
        """Returns how much more outputs lose [R, candidates], where a group's error changes [R, candidates, size]."""
        rows = self.rows[group]
        if self.squares is not None:
            pull = (lost @ rows).mul_(2).unsqueeze(1)
            return (changes @ self.squares[group]).add_(pull).mul_(changes).sum(2)
        passed = changes @ rows.T
        return (passed + 2 * lost.unsqueeze(1)).mul_(passed).sum(2)


def _descended(now: Tensor, others: list[Tensor], read: Read, lost: Tensor) -> Tensor:
    """Returns what every group is to have, int64 [R, groups]: 0 for the error that it has, else the number of another.

    now     errors of the weights' groups, float32 [groups, R, size]; follows
    others  what they may be instead, each like `now`
    lost    what outputs lose, float32 [R, n]; follows
    """
    changes = torch.stack(others, 2).sub_(now.unsqueeze(2))
    every = torch.arange(now.shape[1], device=now.device)
    chosen = torch.zeros(now.shape[:2], dtype=torch.int64, device=now.device)
    for group, own in enumerate(changes):
        least, best = read.costs(group, own, lost).min(1)
        better = least < 0
        chosen[group] = torch.where(better, best + 1, 0)
        moved = own[every, best].mul_(better.unsqueeze(1))
        lost.addmm_(moved, read.rows[group].T)
        now[group] += moved
    return chosen.T


def _clamped(weight: Tensor, limits: Tensor, size: int) -> Tensor:
    apart = weight.view(weight.shape[0], -1, size)
    limit = limits.unsqueeze(-1)
    return torch.minimum(torch.maximum(apart, -limit), limit).view_as(weight)


def clamped(weight: Tensor, limits: Tensor) -> Tensor:
    """Returns a weight [out, width] clamped to limits [out, groups]."""
    return _clamped(weight, limits, weight.shape[1] // limits.shape[1])
