"""Second moments of activations as running means, and the calibration tokens that are held out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quarkcli.numerics.products import add_product_
from quarkcli.numerics.quantize import fake_quantize
from quarkcli.spec import TensorSpec

CHUNK = 2048  # tokens folded in at once, whatever the batch: the batch size changes no bits
HELD_OUT = 8  # one row in so many
FEW_ROWS = 2 * HELD_OUT  # below, the last tokens of the set are held out instead of rows
FEW_TOKENS = 2048  # below, nothing is
PANELS = 8  # of rows, each multiplied from its diagonal on: 36/64 of the products; more panels are no faster
NARROW = 256  # features; below, panels cost as much as they save


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
    """Running means over tokens: of x x^T, and of x s^T where the source stream's rows s come along; both float32.

    Tokens come in sample order and are folded in chunks of `CHUNK`; parts of the data, merged in order, give the means
    of the whole. Of x x^T only the upper half is summed on a CPU; `means` mirrors it.

    read   x is fake-quantized with it, as the weights will read it, chunk by chunk; None: it is not
    """

    def __init__(self, read: TensorSpec | None = None) -> None:
        self.read = read
        self.tokens = 0
        self._upper: list[Tensor] = []  # of the mean of x x^T, by `_panels`; parts of the whole once there is one
        self._gram: Tensor | None = None
        self._half = False  # the lower half of the whole is not up to date
        self._cross: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._waiting_rows = 0

    def add(self, rows: Tensor, source: Tensor | None = None) -> None:
        """Takes rows [tokens, features] in sample order, and the source stream's for the same tokens."""
        self._waiting.append((rows, source))
        self._waiting_rows += len(rows)
        del rows, source  # held by the list alone, so that what is folded is freed
        while self._waiting_rows >= CHUNK:
            self._fold(CHUNK)

    def merge(self, other: Moments) -> None:
        """Takes in another's means: weighted means of both. Waiting rows of either side are folded first."""
        own, others = self.means(), other.means()
        if others.gram is None:
            return
        total = own.tokens + others.tokens
        for mean, more in ((own.gram, others.gram), (own.cross, others.cross)):
            if mean is not None and more is not None:
                mean.mul_(own.tokens / total).add_(more, alpha=others.tokens / total)
        if own.gram is None:
            self._gram, self._cross = others.gram.clone(), None if others.cross is None else others.cross.clone()
            self._upper = [self._gram[panel, panel.start :] for panel in _panels(self._gram)]
        self.tokens = total

    def means(self) -> Means:
        if self._waiting_rows:
            self._fold(self._waiting_rows)
        if self._upper and self._gram is None:
            size = self._upper[0].shape[1]
            self._gram = self._upper[0].new_empty(size, size)
            for index, panel in enumerate(_panels(self._gram)):
                self._gram[panel, panel.start :] = self._upper[index]
                self._upper[index] = self._gram[panel, panel.start :]
        if self._gram is not None and self._half:
            _mirror(self._gram)
            self._half = False
        return Means(self._gram, self._cross, self.tokens)

    def _taken(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Returns the first rows that wait, and those of the source stream; they wait no longer."""
        taken: list[tuple[Tensor, Tensor | None]] = []
        left = count
        while left:
            rows, source = self._waiting.pop(0)
            if len(rows) > left:
                rest = rows[left:].clone(), None if source is None else source[left:].clone()
                self._waiting.insert(0, rest)
                rows, source = rows[:left], None if source is None else source[:left]
            taken.append((rows, source))
            left -= len(rows)
        self._waiting_rows -= count
        sources = [source for _, source in taken if source is not None]
        return _joined([rows for rows, _ in taken]), _joined(sources) if sources else None

    def _fold(self, count: int) -> None:
        """Folds in the first rows that wait."""
        rows, source = self._taken(count)
        dtype = rows.dtype
        x = (rows if self.read is None else fake_quantize(rows, self.read)).float()
        del rows
        total = self.tokens + count
        keep, weight = self.tokens / total, 1.0 / total  # the sum is scaled, not the rows: their products stay exact
        panels = _panels(x)
        if not self._upper:
            self._upper = [x.new_empty(panel.stop - panel.start, x.shape[1] - panel.start) for panel in panels]
        for panel, upper in zip(panels, self._upper, strict=True):
            add_product_(upper, x[:, panel], x[:, panel.start :], dtype, keep, weight)
        self._half = True
        if source is not None:
            if self._cross is None:
                self._cross = x.new_empty(x.shape[1], source.shape[1])
            for panel in _panels(source):
                both = dtype if source.dtype == dtype else torch.float32
                add_product_(self._cross[:, panel], x, source[:, panel].float(), both, keep, weight)
        self.tokens = total


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _panels(of: Tensor) -> list[slice]:
    """Returns the features that are worked on at once; on a CPU a symmetric matrix has each from its diagonal on."""
    features = of.shape[1]
    step = -(-features // PANELS) if features >= NARROW and of.device.type == "cpu" else features
    return [slice(start, min(start + step, features)) for start in range(0, features, step)]


def _mirror(mean: Tensor) -> None:
    """Writes the upper half of a square matrix below its diagonal, where only that is summed."""
    if mean.device.type != "cpu":
        return
    for panel in _panels(mean):
        corner = mean[panel, panel]
        corner.copy_(corner.triu() + corner.triu(1).T)
        mean[panel.stop :, panel] = mean[panel, panel.stop :].T


def finite(mean: Tensor) -> bool:
    """Returns whether all values are finite. A sum says so at once, but for sums that overflow."""
    return bool(torch.isfinite(mean.sum())) or bool(torch.isfinite(mean).all())


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
