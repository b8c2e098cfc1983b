"""Keeps sampled rows of activations, and means of magnitudes. Transforms that scale channels decide from them.

Rows that are kept depend on the rows and their order in a lane alone, never on how many come at once.

The first token of a calibration row is unlike all others: attention rests on it, and its activations are often a
thousand times as large (arXiv 2402.17762). An even choice takes none of them or far too many, as lengths of rows are
powers of two. So they are sampled apart, and each row says how many tokens it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quarkcli.algorithms.base import FIRST, FITTED_ROWS, HELD_ROWS
from quarkcli.forward.lanes import Tree, joined_ranks
from quarkcli.forward.moments import CHUNK, chosen
from quarkcli.numerics.sample import Sample


class EvenRows:
    """Rows picked evenly: every one of each lane while they are few, then every second, every fourth and so on.

    most   rows kept at most, of all lanes; of more than that came, about half as many are
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.every = 1
        self.lanes: dict[int, tuple[int, Tensor]] = {}  # by lane: how many rows came, and which are kept

    def add(self, rows: Tensor, lane: int = 0) -> None:
        """Takes rows [tokens, features] of a lane, in sample order."""
        seen, kept = self.lanes.get(lane, (0, rows[:0]))
        more = rows[-seen % self.every :: self.every]
        self.lanes[lane] = seen + len(rows), torch.cat([kept, more])
        self._thin(self.every)

    def merge(self, other: EvenRows) -> None:
        """Takes in the rows of other lanes."""
        self.most = max(self.most, other.most)
        every = max(self.every, other.every)
        other._thin(every)
        self._thin(every)
        self.lanes = dict(sorted((self.lanes | other.lanes).items()))
        self._thin(every)

    def _thin(self, least: int) -> None:
        """Keeps every so many-th row alone, until there are few enough."""
        while self.every < least or sum(-(-seen // self.every) for seen, _ in self.lanes.values()) > self.most:
            self.every *= 2
            self.lanes = {lane: (seen, kept[::2].clone()) for lane, (seen, kept) in self.lanes.items()}

    @property
    def seen(self) -> int:
        """Returns how many rows came."""
        return sum(seen for seen, _ in self.lanes.values())

    def rows(self) -> Tensor | None:
        """Returns the rows [n, features]; None when none came."""
        kept = [kept for seen, kept in self.lanes.values() if seen]
        return torch.cat(kept) if kept else None


class Strata:
    """Rows picked evenly of first tokens and of all others. most: of these at most; of those an eighth."""

    def __init__(self, most: int) -> None:
        self.first, self.others = EvenRows(most // FIRST), EvenRows(most)

    def add(self, rows: Tensor, first: Tensor | None, lane: int) -> None:
        """Takes rows of a lane. first: bool [tokens], which are first tokens; None: nothing is known of that."""
        if first is None:
            self.others.add(rows, lane)
            return
        self.first.add(rows[first], lane)
        self.others.add(rows[~first], lane)

    def merge(self, other: Strata) -> None:
        self.first.merge(other.first)
        self.others.merge(other.others)

    def sample(self) -> Sample | None:
        """Returns the rows with their weights; None when none came."""
        found = [(rows, each.seen) for each in (self.first, self.others) if (rows := each.rows()) is not None]
        if not found:
            return None
        rows = torch.cat([rows for rows, _ in found])
        each = [torch.full((len(rows),), seen / len(rows), dtype=torch.float32) for rows, seen in found]
        weights = torch.cat(each).to(rows.device)
        return Sample(rows, weights / weights.mean())


class Samples:
    """Rows of one activation, those that are held out apart from the others."""

    def __init__(self) -> None:
        self.fitted, self.held = Strata(FITTED_ROWS), Strata(HELD_ROWS)

    def add(self, rows: Tensor, held: Tensor | None, lane: int = 0, first: Tensor | None = None) -> None:
        """Takes rows in sample order.

        held   bool [tokens], which of them are held out; None: none
        first  bool [tokens], which are first tokens; None: nothing is known of that
        """
        if held is None:
            self.fitted.add(rows, first, lane)
            return
        self.fitted.add(rows[~held], chosen(first, ~held), lane)
        self.held.add(rows[held], chosen(first, held), lane)

    def merge(self, other: Samples) -> None:
        """Takes in the rows of other lanes."""
        self.fitted.merge(other.fitted)
        self.held.merge(other.held)

    def sample(self, held: bool) -> Sample | None:
        return (self.held if held else self.fitted).sample()


def first_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Returns which calibration tokens [rows, seqlen] are the first of their row, bool; mask is 0 on padding."""
    first = torch.zeros(tokens.shape, dtype=torch.bool)
    places = torch.zeros(len(tokens), dtype=torch.int64) if mask is None else mask.cpu().int().argmax(1)
    return first.scatter_(1, places.unsqueeze(1), True)


class MeanMagnitude:
    """Mean of |x| over tokens, float32 [features], summed chunk by chunk and lane by lane."""

    def __init__(self) -> None:
        self.sums: Tree[Tensor] = Tree(torch.add)  # float64 [features + 1]: of |x|, then the tokens
        self._mean: Tensor | None = None

    def add(self, rows: Tensor, lane: int = 0) -> None:
        """Takes a chunk's rows [tokens, features]."""
        for chunk in rows.split(CHUNK) if len(rows) else ():
            own = torch.cat([chunk.abs().float().sum(0).double(), torch.tensor([len(chunk)]).to(chunk.device)])
            before = self.sums.of_lane(lane)
            self.sums.put(own if before is None else before + own)

    def merge(self, totals: Sequence[Tensor | None], of: Sequence[range]) -> None:
        """Takes the sums of all ranks; `of`: their lanes."""
        total = joined_ranks(torch.add, totals, of)
        self.sums = Tree(torch.add)
        if total is not None:
            self.sums.put(total)

    def result(self) -> Tensor | None:
        """Returns the mean, None when no token came; nothing can be added from then on."""
        if self._mean is None:
            total = self.sums.total()
            self._mean = None if total is None else (total[:-1] / total[-1]).float()
        return self._mean


def picked(shares: Iterable[tuple[int, Tensor]], held: bool) -> Tensor | None:
    """Returns rows picked evenly of shares of lanes, as many as `Samples` keeps; None when there are none."""
    even = EvenRows(HELD_ROWS if held else FITTED_ROWS)
    for lane, rows in shares:
        even.add(rows, lane)
    return even.rows()
