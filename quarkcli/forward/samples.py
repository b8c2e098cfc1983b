"""Rows of activations kept as they are, and means of magnitudes: what scaling channels is decided from.

Both depend on the rows and their order alone, never on how many come at once: the batch size changes no bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quarkcli.algorithms.base import FITTED_ROWS, HELD_ROWS
from quarkcli.forward.moments import CHUNK


class EvenRows:
    """Rows picked evenly in sample order: every one while they are few, then every second, every fourth and so on.

    most   rows kept at most; of more than that came, at least half as many are
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen = 0
        self._every = 1
        self._kept: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Takes rows [tokens, features] in sample order."""
        self._kept.append(rows[-self.seen % self._every :: self._every].clone())
        self.seen += rows.shape[0]
        while -(-self.seen // self._every) > self.most:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._every *= 2

    def rows(self) -> Tensor | None:
        """Returns the rows [n, features]; None when none came."""
        return torch.cat(self._kept) if self.seen else None


class Samples:
    """Rows of one activation, those that are held out apart from the others."""

    def __init__(self) -> None:
        self.fitted = EvenRows(FITTED_ROWS)
        self.held = EvenRows(HELD_ROWS)

    def add(self, rows: Tensor, held: Tensor | None) -> None:
        """Takes rows in sample order. held: bool [tokens], which of them are held out; None: none."""
        if held is None:
            self.fitted.add(rows)
            return
        self.fitted.add(rows[~held])
        self.held.add(rows[held])

    def rows(self, held: bool) -> Tensor | None:
        return (self.held if held else self.fitted).rows()


class MeanMagnitude:
    """Running mean of |x| over tokens, float32 [features], folded in chunks of a fixed number of tokens."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    def add(self, rows: Tensor) -> None:
        """Takes rows [tokens, features] in sample order."""
        self._waiting.append(rows.abs())
        self._waiting_rows += rows.shape[0]
        while self._waiting_rows >= CHUNK:
            magnitudes = torch.cat(self._waiting)
            self._fold(magnitudes[:CHUNK])
            self._waiting = [magnitudes[CHUNK:].clone()]
            self._waiting_rows -= CHUNK

    def result(self) -> Tensor | None:
        """Returns the mean, None when no token came."""
        if self._waiting_rows:
            self._fold(torch.cat(self._waiting))
        self._waiting, self._waiting_rows = [], 0
        return None if self._sum is None else (self._sum / self._tokens).float()

    def _fold(self, magnitudes: Tensor) -> None:
        own = magnitudes.float().sum(0).double()
        self._sum = own if self._sum is None else self._sum + own
        self._tokens += magnitudes.shape[0]


def picked(batches: Iterable[Tensor], held: bool) -> Tensor | None:
    """Returns rows of `batches` picked evenly, as many as `Samples` keeps; None when there are none."""
    even = EvenRows(HELD_ROWS if held else FITTED_ROWS)
    for rows in batches:
        even.add(rows)
    return even.rows()
