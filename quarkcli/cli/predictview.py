"""Shows the forecast of time, memory and disk, by rank."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from quarkcli.cli import output

if TYPE_CHECKING:
    from quarkcli.job.predict import Prediction, RankForecast

_PHASES = ("start", "read", "forward", "moments", "solve", "quantize", "write")


def rows(found: Prediction) -> list[tuple[str, str]]:
    """Returns the facts about the whole job, with their labels."""
    rates, count = found.rates, len(found.ranks)
    devices = f"{count} ranks, each on {rates.name}" if count > 1 else rates.name
    told = [("time", f"about {duration(found.time)} on {devices}"), ("rates", rates.origin)]
    if not found.fits:
        most = max(rank.device or 0 for rank in found.ranks)
        told.append(
            ("device", f"{output.size(most)} are needed, and {rates.name} has {output.size(rates.memory or 0)}")
        )
    return told


def show(found: Prediction) -> None:
    """Prints the table of ranks: those that take the same are one row."""
    output.data("")
    phases = [name for name in _PHASES if any(rank.seconds[name] for rank in found.ranks)]
    head = ("RANK", "PARTS", "READS", "WRITES", *map(str.upper, phases), "TIME", "HOST", "DEVICE", "DISK")
    cells = [(str(rank.rank), _cells(rank, phases)) for rank in found.ranks]
    rows = []
    for row, same in groupby(cells, key=lambda one: one[1]):
        numbers = [number for number, _ in same]
        rows.append((numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", *row))
    output.table(head, rows)


def _cells(rank: RankForecast, phases: list[str]) -> tuple[str, ...]:
    return (
        str(rank.parts), output.size(rank.read), output.size(rank.written),
        *(duration(rank.seconds[name]) for name in phases), duration(rank.time),
        output.size(rank.host), output.size(rank.device) if rank.device is not None else "-", output.size(rank.disk),
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Returns `2.3 s`, `41 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
