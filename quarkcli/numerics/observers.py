"""Keeps statistics of the values that pass, and gives the range behind a static scale.

The merged statistics of two halves of the data equal those of the whole bit for bit, in any order, so that ranks can
be reduced (`merged`). A power-of-two scale is a scale format and takes the range of any of these observers.

Sources: min-max, percentile and squared error as in AMD Quark's observers; the `histogram` observer has the criterion
of torch.ao.quantization.HistogramObserver (Quark's `histogrampro`), with the rounding of the real element instead of
its uniform model, and looks at every range instead of stopping at the first that does not gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, Self

import torch
from torch import Tensor

from quarkcli.errors import ConfigError, DataError
from quarkcli.numerics import search
from quarkcli.numerics.chunks import as_matrix, group_ends
from quarkcli.numerics.grid import without_chain
from quarkcli.numerics.quantize import fake_quantize, static_scale, tensor_amax
from quarkcli.numerics.ranges import range_of
from quarkcli.spec import MIN_MAX, Granularity, PerChannel, PerGroup, PerTensor, TensorSpec

# A bin holds the float32 magnitudes that agree in exponent and the first 11 bits of the fraction: every finite 16-bit
# float has a bin of its own, and any other magnitude lies less than 2^-11 of itself above the start of its bin.
_DROPPED = 12
_BINS = 1 << (31 - _DROPPED)
_PIECE = 1 << 20  # values counted at once; bounds the scratch memory
_WHOLE = PerTensor()
_BLOCK = 16  # values, those that share a scale in nvfp4
# Blocks below this part of the upper end say nothing of the lower one: near-zero ones would drag the range down.
_FLOOR = 1e-6
# The `histogram` observer tries 16 ranges per binade.
_STEP = 1 << 19


class Observer(Protocol):
    """Sees tensors; keeps what a range can be had from."""

    def observe(self, x: Tensor) -> None: ...

    def merge(self, other: Self) -> None:
        """Takes in what another has kept."""


class MinMax:
    """Smallest and largest value, float32: [] per tensor, [rows] or [features] per channel, [groups] per group.

    Groups are those of the last axis, over all rows: the largest magnitude of a block of an MX format is such an
    `amax`. NaN stays NaN.
    """

    def __init__(self, granularity: Granularity = _WHOLE) -> None:
        if not isinstance(granularity, PerTensor | PerChannel | PerGroup):
            raise ConfigError(
                f"no range is kept for {type(granularity).__name__}",
                hint="use one range per tensor, channel or group",
                kind="E-OBSERVER",
            )
        self.granularity = granularity
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Takes `x` [..., features]; per row every `x` has the same rows."""
        if x.numel():
            self._take(*_ends(x, self.granularity))

    def merge(self, other: MinMax) -> None:
        assert self.granularity == other.granularity, "ranges of different shapes"
        if other.low is not None and other.high is not None:
            self._take(other.low, other.high)

    def _take(self, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else torch.minimum(self.low, low.to(self.low.device))
        self.high = high if self.high is None else torch.maximum(self.high, high.to(self.high.device))

    @property
    def amax(self) -> Tensor:
        """Returns the largest magnitudes. Raises DataError when nothing was seen."""
        if self.low is None or self.high is None:
            raise _unseen()
        return torch.maximum(self.low.abs(), self.high.abs())


class Histogram:
    """Exact counts of magnitudes (int64) in bins of relative width 2^-11, signs dropped.

    block   values along the last axis of which only the largest magnitude is counted, and that only where it is not
            zero; a last block may be short
    counts  one per bin, indexed by the upper bits of the float32 magnitude; None before the first value
    amax    the largest magnitude, float32 []; NaN or inf when one was seen
    """

    def __init__(self, block: int = 1) -> None:
        self.block = block
        self.counts: Tensor | None = None
        self._range = MinMax()

    @property
    def amax(self) -> Tensor:
        """Returns the largest magnitude. Raises DataError when nothing was seen."""
        return self._range.amax

    def observe(self, x: Tensor) -> None:
        """Takes the values of `x`, of any shape."""
        if not x.numel():
            return
        self._range.observe(x)
        if self.block > 1:
            low, high = group_ends(as_matrix(x), self.block)
            x = torch.maximum(low.abs(), high.abs())
            x = x[x != 0]
        counts = self._counts(x.device)
        one = torch.ones((), dtype=torch.int64, device=counts.device)
        for chunk in x.reshape(-1).split(_PIECE):
            bins = chunk.abs().float().view(torch.int32) >> _DROPPED
            counts.index_add_(0, bins.to(counts.device), one.expand(bins.shape))

    def merge(self, other: Histogram) -> None:
        self._range.merge(other._range)
        if other.counts is not None:
            counts = self._counts(other.counts.device)
            counts += other.counts.to(counts.device)

    def _counts(self, device: torch.device) -> Tensor:
        if self.counts is None:
            self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        return self.counts

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Returns (start of every bin that holds values, float32, rising; their counts), on the CPU."""
        if self.counts is None:
            raise _unseen()
        counts = self.counts.cpu()
        bins = counts.nonzero()[:, 0]
        return (bins.int() << _DROPPED).view(torch.float32), counts[bins]

    def percentile(self, percentile: float) -> Tensor:
        """Returns the magnitude that `percentile` per cent do not exceed, by nearest rank: float32 [].

        Exact for values of 16 bits, for the largest magnitude, and so for 100; otherwise less than 2^-11 of itself
        (2^-137 below the smallest normal float32) too small. NaN or inf when one was seen.
        """
        amax = self.amax.cpu()
        if not bool(torch.isfinite(amax)):
            return amax
        starts, counts = self.occupied()
        index = _rank(counts, percentile)
        return amax if index is None else starts[index]

    def headroom(self, anchor: float, upper: float, rho: float) -> Tensor:
        """Returns `rho` times the magnitude at the percentile `anchor`, and at least the one at `upper`: float32 [].

        Magnitudes below a millionth of the latter do not count for the former. NaN or inf when one was seen.
        """
        top = self.percentile(upper)
        starts, counts = self.occupied()
        if not bool(torch.isfinite(top)) or not len(starts):
            return top
        kept = starts >= top * _FLOOR
        index = _rank(counts[kept], anchor)
        low = starts[kept][-1 if index is None else index]
        return torch.maximum(low * rho, top)

    def least_error(self, spec: TensorSpec, steps: int, shrink: float) -> Tensor:
        """Returns the range of least squared error under `spec`, of `steps` from the full one down to `shrink` of it.

        float32 []; among equal errors the larger range. The magnitudes stand for both signs. NaN or inf as it is.
        """
        amax = self.amax.cpu()
        best, least = amax, torch.inf
        if not bool(torch.isfinite(amax)):
            return amax
        starts, counts = self.occupied()
        for step in range(steps):
            candidate = amax * (1.0 - (1.0 - shrink) * step / max(steps - 1, 1))
            error = _squared_error(starts, counts, spec, static_scale(candidate, spec))
            if error < least:
                best, least = candidate, error
        return best

    def best_range(self, spec: TensorSpec) -> Tensor:
        """Returns the range of least squared error under `spec`, of the full one and all smaller ones, 16 per binade.

        Those that cannot be the best are not tried. Otherwise as `least_error`.
        """
        amax = self.amax.cpu()
        best, least = amax, torch.inf
        if not bool(torch.isfinite(amax)):
            return amax
        starts, counts = self.occupied()
        last: float | None = None
        for candidate in _ranges(amax):
            scale = static_scale(candidate, spec)
            if float(scale) == last:  # scales are rounded: several ranges can have one
                continue
            last = float(scale)
            if _clipping_error(starts, counts, last * spec.format.maximum) > least:
                break  # and more for every smaller range
            error = _squared_error(starts, counts, spec, scale)
            if error < least:
                best, least = candidate, error
        return best


# Kind of statistics (`ObserverSpec.statistic`) -> what keeps it.
STATISTICS: dict[str, Callable[[], MinMax | Histogram]] = {
    "absmax": MinMax,
    "channel_absmax": lambda: MinMax(PerChannel(1)),
    "histogram": Histogram,
    "blocks": lambda: Histogram(_BLOCK),
}


def amax_of(seen: MinMax | Histogram, spec: TensorSpec) -> Tensor:
    """Returns the amax behind a static scale (`static_scale`), as the observer of `spec` chooses it.

    float32 [], or shaped as `MinMax.amax`. NaN or inf when one was seen. DataError when nothing was, ConfigError where
    squared errors need the blocks that a histogram does not keep.
    """
    if isinstance(seen, MinMax):
        return seen.amax
    return _chosen(seen, spec).to(seen.amax.device)


def weight_amax(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the amax of `weight` [out, in] behind its first scale, where one covers the tensor.

    The observer chooses it (float32 []). Under a global scale it is the amax of the whole, because the observer works
    on the groups there. Raises DataError as `tensor_amax` does.
    """
    amax = tensor_amax(weight)
    if spec.observer == MIN_MAX or not isinstance(spec.granularity, PerTensor):
        return amax
    matrix, first = as_matrix(weight), without_chain(spec)
    return search.clipped(matrix, first, range_of(matrix, first, None)).amax.reshape(())


def _chosen(seen: Histogram, spec: TensorSpec) -> Tensor:
    parameters = dict(spec.observer.parameters)
    if spec.observer.name == "headroom":
        return seen.headroom(**parameters)
    if spec.observer.name == "percentile":
        return seen.percentile(parameters["percentile"])
    if not isinstance(spec.granularity, PerTensor):
        raise ConfigError(
            f"observer '{spec.observer.name}' works only with one scale per tensor",
            hint="use percentile",
            kind="E-OBSERVER",
        )
    if spec.observer.name == "mse":
        return seen.least_error(spec, int(parameters["steps"]), parameters["shrink"])
    return seen.best_range(spec)


def _ends(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    match granularity:
        case PerChannel(axis):
            # two passes: several times faster on a CPU than torch.aminmax along an axis
            matrix, along = as_matrix(x), 1 if axis == 0 else 0
            return matrix.amin(along).float(), matrix.amax(along).float()
        case PerGroup(size):
            low, high = group_ends(as_matrix(x), size)
            return low.amin(0), high.amax(0)
    low, high = torch.aminmax(x)
    return low.float(), high.float()


def _rank(counts: Tensor, percentile: float) -> int | None:
    """Returns the index of the bin that holds the nearest rank of a percentile.

    None stands for the largest magnitude of all.
    """
    upto = counts.cumsum(0)
    total = int(upto[-1]) if len(upto) else 0
    rank = search.nearest_rank(percentile, total)
    return None if rank >= total else int(torch.searchsorted(upto, rank))


def _unseen() -> DataError:
    return DataError("no calibration token reached this activation", kind="E-DATA-NO-TOKEN")


def _ranges(amax: Tensor) -> Iterator[Tensor]:
    """Yields `amax` and every smaller positive float32 with four bits of fraction, falling."""
    yield amax
    for step in range((int(amax.view(torch.int32)) - 1) // _STEP, 0, -1):
        yield torch.tensor(step * _STEP, dtype=torch.int32).view(torch.float32)


def _squared_error(starts: Tensor, counts: Tensor, spec: TensorSpec, scale: Tensor) -> float:
    rounded = fake_quantize(starts[None], spec, scale)[0]
    return float(((rounded - starts).double().square() * counts).sum())


def _clipping_error(starts: Tensor, counts: Tensor, largest: float) -> float:
    """Returns the squared error of the magnitudes above the largest that can be represented."""
    return float(((starts.double() - largest).clamp_min_(0).square() * counts).sum())
