"""Sums over calibration rows in lanes, so that sums have the same bits on any number of ranks.

Rows are cut into eight contiguous lanes; into four where one of eight would have less than 2,048 tokens, and into fewer
where one of four would have less than 512. Sums run in order within a lane, and a fixed binary tree joins those of the
lanes. A rank works on the lanes of one subtree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

LANES, FEW_LANES = 8, 4
MANY_TOKENS = 2048  # of each of eight lanes: with fewer, a deeper tree of sums costs more than eight ranks would gain
LANE_TOKENS = 512  # at least: products of fewer rows are slow on a CPU

CPU_TOKENS = 2048  # tokens in one forward on a CPU, whatever the batch asked for: the same bits for every batch size

T = TypeVar("T")


class Lane(NamedTuple):
    """Rows `start` to `stop` of the calibration rows."""

    number: int
    start: int
    stop: int


class Span(NamedTuple):
    """The rows of one forward, all of one lane."""

    lane: int
    start: int
    stop: int


def default_batch(device: torch.device, seqlen: int, asked: int | None) -> int:
    """Returns the number of sequences in one forward.

    On a CPU it is always `CPU_TOKENS` tokens; on a GPU what was asked, else four times that.
    """
    if device.type == "cpu":
        return max(1, CPU_TOKENS // seqlen)
    return asked or max(1, 4 * CPU_TOKENS // seqlen)


def lanes(rows: int, seqlen: int) -> list[Lane]:
    """Returns the lanes of calibration rows: 8, 4, 2 or 1."""
    count = LANES if rows // LANES * seqlen >= MANY_TOKENS else FEW_LANES
    while count > 1 and rows // count * seqlen < LANE_TOKENS:
        count //= 2
    return [Lane(n, rows * n // count, rows * (n + 1) // count) for n in range(count)]


def spans(of: list[Lane], batch: int) -> list[Span]:
    """Returns the rows of every forward, of at most `batch` rows."""
    return [
        Span(lane.number, start, min(start + batch, lane.stop))
        for lane in of
        for start in range(lane.start, lane.stop, batch)
    ]


class Tree(Generic[T]):
    """Joins the values of lanes in a fixed binary tree, as soon as both sides are complete.

    Lanes come in order; a lane that is passed over has no value. At most four values of eight lanes are alive.

    join   returns the sum of two, which it may keep in the first
    """

    def __init__(self, join: Callable[[T, T], T]) -> None:
        self._join = join
        self._lane = 0
        self._value: T | None = None  # of the lane that comes in now
        self._complete: list[T | None] = []  # subtrees of the lanes before, one for each bit of their number

    @property
    def is_empty(self) -> bool:
        """True while no lane has a value."""
        return self._value is None and all(value is None for value in self._complete)

    def of_lane(self, lane: int) -> T | None:
        """Returns the value of a lane so far."""
        while self._lane < lane:
            self._complete.append(self._value)
            self._value = None
            self._lane += 1
            count = self._lane
            while count % 2 == 0:
                right = self._complete.pop()
                self._complete.append(joined(self._join, self._complete.pop(), right))
                count //= 2
        return self._value

    def put(self, value: T) -> None:
        """Sets the value of the lane that comes in now."""
        self._value = value

    def total(self) -> T | None:
        """Returns the sum of all lanes, and gives it up; None: no lane had a value."""
        value, self._value = self._value, None
        while self._complete:
            value = joined(self._join, self._complete.pop(), value)
        return value


def joined(join: Callable[[T, T], T], left: T | None, right: T | None) -> T | None:
    """Returns the sum of two values, either of which may be missing."""
    if left is None or right is None:
        return right if left is None else left
    return join(left, right)


def shares(count: int, ranks: int) -> list[range]:
    """Returns the lanes of each rank: those of one subtree, or none where there are more ranks than lanes."""
    if ranks == 1:
        return [range(count)]
    if count == 1:
        return [range(1), *[range(0)] * (ranks - 1)]
    left, right = shares(count // 2, ranks - ranks // 2), shares(count // 2, ranks // 2)
    return left + [range(lanes.start + count // 2, lanes.stop + count // 2) if lanes else lanes for lanes in right]


def covers(own: range, start: int, stop: int) -> bool:
    """True when a rank with the lanes `own` has all lanes from `start` to `stop`."""
    return bool(own) and own.start <= start and stop <= own.stop


def joined_ranks(join: Callable[[T, T], T], values: Sequence[T | None], of: Sequence[range]) -> T | None:
    """Returns the sum of what ranks have, in the tree; `of`: their lanes."""

    def node(start: int, stop: int) -> T | None:
        for value, own in zip(values, of, strict=True):
            if covers(own, start, stop):
                return value
        middle = (start + stop) // 2
        return joined(join, node(start, middle), node(middle, stop))

    return node(0, max(own.stop for own in of))
