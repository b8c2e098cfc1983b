"""Finds what a report says of an activation: how large it is, how magnitudes are spread, how channels differ.

It feeds no number that is written: it looks at values that pass for other reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROWS = 64  # of each batch whose magnitudes are counted
QUANTILES = (0.5, 0.9, 0.99, 0.999)
# A bin holds the float32 magnitudes that agree in exponent and the first 5 bits of the fraction: 3 % wide at most.
_DROPPED = 18
_BINS = 1 << (31 - _DROPPED)


def ends_of(x: Tensor) -> Tensor:
    """Returns the smallest and the largest value of each feature, [2, features], of values [..., features].

    Two passes along the rows are several times faster on a CPU than torch.aminmax along an axis.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    return torch.stack((rows.amin(0), rows.amax(0)))


class Outliers:
    """Largest magnitude of every channel, over all values; counts of magnitudes, of some rows of every batch."""

    def __init__(self) -> None:
        self.channels: Tensor | None = None  # float32 [features]
        self.counts: Tensor | None = None  # int64 [bins]

    def observe(self, x: Tensor, ends: Tensor | None = None) -> None:
        """Takes values [..., features]; `ends` are theirs, where they are known."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.numel():
            return
        self._widen((ends_of(x) if ends is None else ends).abs().amax(0).float())
        magnitudes = rows[:: -(-len(rows) // ROWS)].float().abs().reshape(-1)
        bins = (magnitudes.view(torch.int32) >> _DROPPED).clamp_(max=_BINS - 1)
        if self.counts is None:
            self.counts = torch.zeros(_BINS, dtype=torch.int64, device=bins.device)
        one = torch.ones((), dtype=torch.int64, device=bins.device)
        self.counts.index_add_(0, bins, one.expand(bins.shape))

    def merge(self, other: Outliers) -> None:
        """Takes in what another rank saw of its rows."""
        if other.channels is not None and other.counts is not None:
            self._widen(other.channels if self.channels is None else other.channels.to(self.channels.device))
            self.counts = other.counts if self.counts is None else self.counts + other.counts.to(self.counts.device)

    def _widen(self, channels: Tensor) -> None:
        self.channels = channels if self.channels is None else torch.maximum(self.channels, channels)

    def facts(self) -> dict[str, Any]:
        """Returns the JSON form: `absmax`, `quantiles` of the magnitudes (within 2 %), `channels`, `outlier_ratio`.

        The ratio is that of the largest channel to the one in the middle; None where the latter is zero or either is
        not finite.
        """
        if self.channels is None or self.counts is None:
            return {}
        middle, top = float(self.channels.median()), float(self.channels.max())
        ratio = top / middle if middle > 0 and math.isfinite(top) else None
        quantiles = self._quantiles()
        return {
            "absmax": top if math.isfinite(top) else None,
            "quantiles": {f"{share:g}": min(value, top) for share, value in zip(QUANTILES, quantiles, strict=True)},
            "channels": len(self.channels),
            "outlier_ratio": ratio,
        }

    def share_below(self, limit: float) -> float:
        """Returns the share of the counted magnitudes below `limit`; those of its own bin count as above."""
        if self.counts is None or not int(self.counts.sum()):
            return 0.0
        own = int(torch.tensor(limit, dtype=torch.float32).view(torch.int32)) >> _DROPPED
        return int(self.counts[:own].sum()) / int(self.counts.sum())

    def _quantiles(self) -> list[float]:
        """Returns the middle of the bin that holds each quantile; 0 for zeros."""
        assert self.counts is not None
        upto = self.counts.cpu().cumsum(0)
        ranks = torch.tensor([max(1, math.ceil(share * int(upto[-1]))) for share in QUANTILES])
        bins = torch.searchsorted(upto, ranks).int()
        low, high = ((bins + step << _DROPPED).view(torch.float32).double() for step in (0, 1))
        return [float(value) for value in torch.where(bins > 0, (low + high) / 2, 0.0).nan_to_num(posinf=0.0)]


def told(seen: Mapping[str, Outliers]) -> dict[str, dict[str, Any]]:
    """Returns the facts of every activation, before any scaling of its channels."""
    return {site: facts for site in sorted(seen) if (facts := seen[site].facts())}
