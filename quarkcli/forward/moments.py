"""Second moments of activations as running means, and the calibration tokens that are held out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quarkcli.numerics.quantize import fake_quantize
from quarkcli.spec import TensorSpec

CHUNK = 2048  # tokens folded in at once, whatever the batch: the batch size changes no bits
HELD_OUT = 8  # one row in so many
FEW_ROWS = 2 * HELD_OUT  # below, the last tokens of the set are held out instead of rows
FEW_TOKENS = 2048  # below, nothing is
PANELS = 8  # of rows, each multiplied from its diagonal on: 36/64 of the products; more panels are no faster
NARROW = 256  # features; below, panels cost as much as they save


class SecondMoment:
    """Running mean of x y^T over tokens, float32 [features of x, features of y]; y is x itself when it is not given.

    Tokens come in sample order and are folded in chunks of `CHUNK`; parts of the data, merged in order, give the mean
    of the whole. Of x x^T only the upper half is summed on a CPU; `result` mirrors it.

    read   x is fake-quantized with it, as the weights will read it, chunk by chunk; None: it is not
    """

    def __init__(self, read: TensorSpec | None = None) -> None:
        self.read = read
        self.mean: Tensor | None = None
        self.tokens = 0
        self._half = False  # the lower half of the mean is not up to date
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._waiting_rows = 0

    def add(self, rows: Tensor, other: Tensor | None = None) -> None:
        """Takes rows [tokens, features], and those of `other` [tokens, features], in sample order."""
        self._waiting.append((rows, other))
        self._waiting_rows += rows.shape[0]
        while self._waiting_rows >= CHUNK:
            x, y = self._joined()
            self._fold(x[:CHUNK], None if y is None else y[:CHUNK])
            self._waiting = [(x[CHUNK:].clone(), None if y is None else y[CHUNK:].clone())]
            self._waiting_rows -= CHUNK

    def merge(self, other: SecondMoment) -> None:
        """Takes in another's mean: a weighted mean of both. Waiting rows of either side are folded first."""
        mean, tokens = other.result()
        self.result()
        if mean is None:
            return
        total = self.tokens + tokens
        own = mean * (tokens / total)
        self.mean = own if self.mean is None else self.mean * (self.tokens / total) + own
        self.tokens = total

    def result(self) -> tuple[Tensor | None, int]:
        """Returns (mean or None when no token came, tokens)."""
        if self._waiting_rows:
            self._fold(*self._joined())
        self._waiting, self._waiting_rows = [], 0
        if self._half and self.mean is not None:
            _mirror(self.mean)
            self._half = False
        return self.mean, self.tokens

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        others = [other for _, other in self._waiting if other is not None]
        return torch.cat([rows for rows, _ in self._waiting]), torch.cat(others) if others else None

    def _fold(self, rows: Tensor, others: Tensor | None) -> None:
        count = rows.shape[0]
        if count == 0:
            return
        x = (rows if self.read is None else fake_quantize(rows, self.read)).float()
        total = self.tokens + count
        keep, weight = self.tokens / total, 1.0 / total  # the sum is scaled, not the rows: their products stay exact
        if self.mean is None:
            features = (x if others is None else others).shape[1]
            self.mean = torch.empty(x.shape[1], features, dtype=torch.float32, device=x.device)
        if others is not None:
            self.mean.addmm_(x.T, others.float(), beta=keep, alpha=weight)
        else:
            self._half = True
            for panel in _panels(x.shape[1]) if x.device.type == "cpu" else [slice(0, x.shape[1])]:
                self.mean[panel, panel.start :].addmm_(x[:, panel].T, x[:, panel.start :], beta=keep, alpha=weight)
        self.tokens = total


class Means(NamedTuple):
    """The means of `Moments`, None when no token came, and the number of tokens."""

    gram: Tensor | None
    cross: Tensor | None
    tokens: int

    def shrunk(self, prior: Means) -> Means:
        """Returns both means blended with the layer's, which counts as one token per feature.

        An expert that saw nothing gets the layer's alone.
        """
        if self.gram is None or prior.gram is None:
            return prior._replace(tokens=0) if self.gram is None else self
        weight = prior.gram.shape[0]
        total = self.tokens + weight

        def blended(own: Tensor, other: Tensor) -> Tensor:
            return (own * self.tokens + other * weight) / total

        both = self.cross is not None and prior.cross is not None
        cross = blended(self.cross, prior.cross) if both else None  # type: ignore[arg-type]
        return Means(blended(self.gram, prior.gram), cross, self.tokens)


class Moments:
    """The second moment of an activation, and its moment with the source stream's where that comes along.

    read   how the weights read the activation, where they read it quantized
    """

    def __init__(self, read: TensorSpec | None = None) -> None:
        self.gram = SecondMoment(read)
        self.cross = SecondMoment(read)

    def add(self, rows: Tensor, source: Tensor | None = None) -> None:
        """Takes rows [tokens, features] in sample order, and the source stream's for the same tokens."""
        self.gram.add(rows)
        if source is not None:
            self.cross.add(rows, source)

    def means(self) -> Means:
        gram, tokens = self.gram.result()
        return Means(gram, self.cross.result()[0], tokens)


def _panels(features: int) -> list[slice]:
    """Returns the rows of a symmetric matrix that are worked on at once, each from its diagonal on."""
    step = -(-features // PANELS) if features >= NARROW else features
    return [slice(start, start + step) for start in range(0, features, step)]


def _mirror(mean: Tensor) -> None:
    """Writes the upper half of a square matrix below its diagonal."""
    for panel in _panels(mean.shape[0]):
        corner = mean[panel, panel]
        corner.copy_(corner.triu() + corner.triu(1).T)
        mean[panel.stop :, panel] = mean[panel, panel.stop :].T


def held_out(rows: int, seqlen: int) -> Tensor | None:
    """Returns a mask of the tokens kept out of the moments that a solver fits to, bool [rows, seqlen]; None: none.

    Row 7 of every eight; of fewer than 16 rows the last eighth of the tokens; of fewer than 2,048 tokens none.
    """
    if rows * seqlen < FEW_TOKENS:
        return None
    if rows >= FEW_ROWS:
        mask = torch.zeros(rows, seqlen, dtype=torch.bool)
        mask[HELD_OUT - 1 :: HELD_OUT] = True
        return mask
    flat = torch.zeros(rows * seqlen, dtype=torch.bool)
    flat[-(rows * seqlen // HELD_OUT) :] = True
    return flat.view(rows, seqlen)


def holds_out(needs: Mapping[str, set[str]]) -> bool:
    """True when some statistic wants held-out tokens."""
    return any({"gram_val", "samples"} & kinds for kinds in needs.values())
