"""Sums second moments of activations lane by lane, and keeps some calibration tokens out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quarkcli.forward.group import Group
from quarkcli.forward.lanes import Tree
from quarkcli.numerics.products import add_product_
from quarkcli.numerics.quantize import fake_quantize
from quarkcli.spec import TensorSpec

CHUNK = 2048  # tokens folded in at once, and on a CPU those of one forward, whatever the batch asked for
HELD_OUT = 8  # one row in so many
FEW_ROWS = 2 * HELD_OUT  # below, the last tokens of the set are held out instead of rows
FEW_TOKENS = 2048  # below, nothing is
PANELS = 8  # of rows, each multiplied from its diagonal on: 36/64 of the products; more panels are no faster
NARROW = 256  # features; below, panels cost as much as they save

# Rows of some tokens, the source stream's, and how much each token counts (None: all alike).
Share = tuple[Tensor, Tensor | None, Tensor | None]


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


@dataclass
class Sums:
    """Sums over tokens: of x x^T, by `_panels` (its upper half), of x s^T, and of what they count."""

    upper: list[Tensor]
    cross: Tensor | None
    tokens: int
    weight: float

    def plus(self, other: Sums) -> Sums:
        """Returns the sum of both, kept in this one."""
        for own, more in zip(self.upper, other.upper, strict=True):
            own += more
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        self.tokens += other.tokens
        self.weight += other.weight
        return self


class Waiting:
    """Rows of an activation that come a few at a time, until those of a lane make a chunk.

    Those of lanes that ended wait as well, while they are no more than a chunk. What is folded together depends on the
    rows of its lane alone.
    """

    def __init__(self) -> None:
        self._lane = 0
        self._shares: list[tuple[Tensor, Tensor | None]] = []  # of the lane that comes in now
        self._ended: list[tuple[int, Tensor, Tensor | None]] = []

    def add(self, lane: int, rows: Tensor, source: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Takes rows; yields lane and rows of what is to be folded now, in order."""
        if lane != self._lane:
            self._end()
            self._lane = lane
        self._shares.append((rows, source))
        if sum(len(rows) for rows, _ in self._shares) >= CHUNK:
            rows, source = _together(self._shares)
            yield from self._give_up()
            yield lane, rows[:CHUNK], None if source is None else source[:CHUNK]
            self._shares = [(rows[CHUNK:], None if source is None else source[CHUNK:])] if len(rows) > CHUNK else []
        elif sum(len(rows) for _, rows, _ in self._ended) > CHUNK:
            yield from self._give_up()

    def rest(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields all that still waits."""
        self._end()
        yield from self._give_up()

    def _end(self) -> None:
        if self._shares:
            self._ended.append((self._lane, *_together(self._shares)))
        self._shares = []

    def _give_up(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        while self._ended:
            yield self._ended.pop(0)


class Moments:
    """Means over tokens: of x x^T, and of x s^T where the source stream's rows s come along; both float32.

    Tokens may be weighted, see `forward.balance`; not where this is patient.

    Rows come lane by lane, and within a lane chunk by chunk: what a chunk of calibration tokens has here is folded into
    the sum of its lane at once.

    read      x is fake-quantized with it, as the weights will read it, chunk by chunk; None: it is not
    patient   few rows of every chunk come: those of a lane wait until they make a chunk, which takes less memory than
              a sum for each lane, and less time than many products of few rows
    """

    def __init__(self, read: TensorSpec | None = None, patient: bool = False) -> None:
        self.read = read
        self.sums: Tree[Sums] = Tree(Sums.plus)
        self._waiting = Waiting() if patient else None
        self._means: Means | None = None

    def add(self, rows: Tensor, source: Tensor | None = None, lane: int = 0, weights: Tensor | None = None) -> None:
        """Takes a chunk's rows [tokens, features], the source stream's for the same tokens, and how much they count.

        weights   powers of two, float32 [tokens]; None: all tokens count alike
        """
        if self._waiting is not None:
            for ready in self._waiting.add(lane, rows, source):
                self._fold(*ready)
            return
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            self._fold(lane, rows[part], chosen(source, part), chosen(weights, part))

    def add_shares(self, shares: Iterable[Share], lane: int = 0) -> None:
        """Takes a chunk's rows in several shares, which are folded together up to `CHUNK` rows."""
        waiting: list[Share] = []
        for share in shares:
            if waiting and sum(len(rows) for rows, *_ in waiting) + len(share[0]) > CHUNK:
                self._add_all(waiting, lane)
                waiting = []
            waiting.append(share)
        if waiting:
            self._add_all(waiting, lane)

    def _add_all(self, shares: list[Share], lane: int) -> None:
        rows, source = _together([share[:2] for share in shares])
        weights = [each for *_, each in shares if each is not None]
        self.add(rows, source, lane, _joined(weights) if weights else None)

    def close(self) -> None:
        """Joins the sums of the lanes that came; nothing can be added from then on.

        Where there is no sum yet, rows go on waiting: they are less than it would be.
        """
        if self._waiting is not None and self.sums.is_empty:
            return
        total = self._total()
        if total is not None:
            self.sums.put(total)

    def _total(self) -> Sums | None:
        """Returns the sum of the lanes that came, and gives it up."""
        if self._waiting is not None:
            for ready in self._waiting.rest():
                self._fold(*ready)
        return self.sums.total()

    def means(self) -> Means:
        """Returns the means over all lanes; nothing can be added from then on."""
        if self._means is None:
            total = self._total()
            self._means = Means(None, None, 0) if total is None else _means(total)
        return self._means

    def collect(self, group: Group, owner: int) -> None:
        """Joins the sums of all ranks' lanes; the means are the owner's from then on, and nothing on other ranks."""
        if self._means is None:
            total = group.collect(Sums.plus, self._total(), owner)
            self._means = Means(None, None, 0) if total is None else _means(total)

    def spread(self, group: Group) -> None:
        """Joins the sums of all ranks' lanes; the means are those of all ranks."""
        if self._means is None and group.size > 1:
            self.collect(group, 0)
            self._means = group.share(self._means)

    def _fold(self, lane: int, rows: Tensor, source: Tensor | None, weights: Tensor | None = None) -> None:
        dtype = rows.dtype
        x = (rows if self.read is None else fake_quantize(rows, self.read)).float()
        left = x if weights is None else x * weights[:, None]
        panels = _panels(x)
        own = self.sums.of_lane(lane)
        fresh = own is None
        if own is None:
            strips = [x.new_empty(panel.stop - panel.start, x.shape[1] - panel.start) for panel in panels]
            own = Sums(strips, None if source is None else x.new_empty(x.shape[1], source.shape[1]), 0, 0.0)
            self.sums.put(own)
        for panel, upper in zip(panels, own.upper, strict=True):
            add_product_(upper, left[:, panel], x[:, panel.start :], dtype, fresh=fresh)
        if source is not None and own.cross is not None:
            both = dtype if source.dtype == dtype else torch.float32
            for panel in _panels(source):
                add_product_(own.cross[:, panel], left, source[:, panel].float(), both, fresh=fresh)
        own.tokens += len(x)
        own.weight += len(x) if weights is None else float(weights.sum(dtype=torch.float64))


def _means(sums: Sums) -> Means:
    """Returns the means, whole; `sums` are given up."""
    upper, size = sums.upper, sums.upper[0].shape[1]
    gram = upper[0] if len(upper) == 1 else upper[0].new_empty(size, size)
    if len(upper) > 1:
        for index, panel in enumerate(_panels(gram)):
            gram[panel, panel.start :] = upper[index]
            upper[index] = gram[panel, panel.start :]  # what was summed is freed
    gram /= sums.weight
    _mirror(gram)
    return Means(gram, None if sums.cross is None else sums.cross.div_(sums.weight), sums.tokens)


def _together(shares: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    sources = [source for _, source in shares if source is not None]
    return _joined([rows for rows, _ in shares]), _joined(sources) if sources else None


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _panels(of: Tensor) -> list[slice]:
    """Returns the features that are worked on at once; a symmetric matrix has each from its diagonal on."""
    features = of.shape[1]
    step = -(-features // PANELS) if features >= NARROW else features
    return [slice(start, min(start + step, features)) for start in range(0, features, step)]


def _mirror(mean: Tensor) -> None:
    """Writes the upper half of a square matrix below its diagonal, where only that is summed."""
    for panel in _panels(mean):
        corner = mean[panel, panel]
        corner.copy_(corner.triu() + corner.triu(1).T)
        mean[panel.stop :, panel] = mean[panel, panel.stop :].T


def chosen(values: Tensor | None, which: slice | Tensor) -> Tensor | None:
    """Returns what some tokens have, where there is anything."""
    return None if values is None else values[which]


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
