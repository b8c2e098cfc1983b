"""Weighs calibration tokens in second moments: those that occur often count less.

A text repeats a few tokens, and a mean over its tokens is of these. Weights that are chosen for it lose more on other
texts. Word vectors are learned from fewer of the frequent words for the same reason (arXiv 1310.4546).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Balance:
    """Weights of tokens, by site.

    A token whose id occurs n times counts n^-share, as the nearest power of two: that scales an activation without
    rounding it, so products of 16-bit activations stay exact.

    ids      int64 [rows, seqlen], of all calibration rows
    mask     bool [rows, seqlen] or None; False on padding, which is not counted
    shares   exponents from 0 to 1, by site; where there is none, or 0, all tokens count alike
    """

    def __init__(self, ids: Tensor, mask: Tensor | None, shares: Mapping[str, float]) -> None:
        self.ids, self.mask, self.shares = ids, mask, shares
        self._tables: dict[float, Tensor] = {}

    def table(self, site: str) -> Tensor | None:
        """Returns the weight of each token id, float32 [ids]; None where all count alike."""
        share = self.shares.get(site, 0.0)
        if not share:
            return None
        if share not in self._tables:
            counts = torch.bincount(self.ids.flatten(), None if self.mask is None else self.mask.double().flatten())
            self._tables[share] = _table(counts, share)
        return self._tables[share]


def _table(counts: Tensor, share: float) -> Tensor:
    # Python's log2 is exact for powers of two, so a weight halfway between two is the same on every machine.
    known, where = counts.clamp_min(1).unique(return_inverse=True)
    each = [2.0 ** -round(share * math.log2(count)) for count in known.tolist()]
    return torch.tensor(each, dtype=torch.float32)[where]
