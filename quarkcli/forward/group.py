"""Stands for the processes that share a run. A process alone is a group of one."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from quarkcli.forward.lanes import Lane, covers, joined, shares

T = TypeVar("T")


def dealt(sizes: Sequence[float], ranks: int) -> list[int]:
    """Returns the rank that gets each piece of work: the largest first, always to the first that has least."""
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        load, rank = heapq.heappop(loads)
        owners[index] = rank
        heapq.heappush(loads, (load + sizes[index], rank))
    return owners


class Group:
    """The ranks of a run; this class is one rank alone. All ranks call its methods in the same order.

    rank   of this process; 0 speaks for all
    size   how many there are
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._shares = [range(1), *[range(0)] * (self.size - 1)]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def work_on(self, device: str) -> None:
        """Says where this rank computes, which is where what others send is put."""

    def own(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Cuts the lanes among the ranks, and returns this one's."""
        self._shares = shares(len(lanes), self.size)
        return [lanes[number] for number in self._shares[self.rank]]

    @property
    def shares(self) -> list[range]:
        """Returns the lanes of each rank."""
        return self._shares

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the order of ranks."""
        return [value]

    def share(self, value: T, owner: int = 0) -> T:
        """Returns the value of the owner."""
        return value

    def pass_on(self, value: Any, source: int, target: int) -> Any:
        """Returns, on the target, the source's value; None elsewhere. Only these two ranks call it."""
        return value

    def collect(self, join: Callable[[T, T], T], value: T | None, target: int) -> T | None:
        """Returns, on the target, the sum of what the lanes of all ranks have, in the tree; None elsewhere."""
        return self._node(join, value, 0, max(own.stop for own in self._shares), target)

    def _node(self, join: Callable[[T, T], T], value: T | None, start: int, stop: int, target: int) -> T | None:
        owner = self._owner(start, stop)
        if owner is not None:
            return self._moved(value, owner, target)
        middle = (start + stop) // 2
        sides = []
        for low, high in ((start, middle), (middle, stop)):
            place = target if self._works(target, low, high) else self._first(low)
            sides.append(self._moved(self._node(join, value, low, high, place), place, target))
        return joined(join, *sides) if self.rank == target else None

    def _moved(self, value: T | None, source: int, target: int) -> T | None:
        if self.rank not in (source, target):
            return None
        return value if source == target else self.pass_on(value, source, target)

    def _owner(self, start: int, stop: int) -> int | None:
        """Returns the rank that has all lanes of a subtree."""
        found = (rank for rank, own in enumerate(self._shares) if covers(own, start, stop))
        return next(found, None)

    def _first(self, lane: int) -> int:
        return next(rank for rank, own in enumerate(self._shares) if lane in own)

    def _works(self, rank: int, start: int, stop: int) -> bool:
        own = self._shares[rank]
        return bool(own) and start <= own.start and own.stop <= stop
