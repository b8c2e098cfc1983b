"""Predicts time, memory and disk of each rank, from the work of a plan and the rates of a device. Torch-free.

Data-free, parts are dealt out by their bytes. Calibrated, every rank reads every block; rows are cut into `LANES`, and
a rank runs whole lanes; the problems of a block are dealt out by their cost, and ranks write parts in turn. Reading and
writing overlap the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quarkcli.algorithms.base import Effort
from quarkcli.forward.group import dealt
from quarkcli.forward.lanes import LANES, shares
from quarkcli.job import costs
from quarkcli.job.costs import PartCost
from quarkcli.job.forecast import PART_SHARE, RUNTIME_BYTES, Forecast, part_sizes
from quarkcli.job.options import Prepared
from quarkcli.job.rates import Rates
from quarkcli.job.reach import last_part

# Tokens in a forward on the device, and the values that it holds of each for every value of the widest activation.
BATCH_TOKENS, HELD = 8192, 6
AHEAD = 3  # parts on their way in the host's memory: one is read, one waits for the device, one is written
RUNTIME_DEVICE = 600_000_000  # the driver's context, and a workspace


@dataclass(frozen=True)
class RankForecast:
    """The forecast for one rank.

    parts    that it writes
    read, written   bytes
    seconds  from the start of the process, by phase: start, read, forward, moments, solve, quantize, write
    overlapped   seconds of them that reading and writing take beside the rest
    time     all of it
    host, device, disk   bytes; device None: it works in the host's memory
    """

    rank: int
    parts: int
    read: int
    written: int
    seconds: dict[str, float]
    overlapped: float
    time: float
    host: int
    device: int | None
    disk: int


@dataclass(frozen=True)
class Prediction:
    """The forecast of a job on so many devices."""

    rates: Rates
    ranks: list[RankForecast] = field(default_factory=list)

    @property
    def time(self) -> float:
        """Returns the seconds that the slowest rank takes."""
        return max(rank.time for rank in self.ranks)

    @property
    def fits(self) -> bool:
        """Returns whether no rank takes more than its device has."""
        most = self.rates.memory
        return most is None or all((rank.device or 0) <= most for rank in self.ranks)


def of_plan(prepared: Prepared, rates: Rates, ranks: int) -> Prediction:
    """Returns the forecast of a job that was prepared. Of several dialects, the first one's files are counted."""
    plan, settings, size = prepared.plan, prepared.calibration, prepared.forecast
    rows, seqlen = (settings.samples, settings.seqlen) if settings else (0, 0)
    sizes = part_sizes(plan, prepared.dialect, prepared.weights.headers)
    last = last_part(plan, prepared.needs)
    # Weights that are decoded while they are read are larger than their files.
    stored = size.source_bytes / max(1, sum(one.source for one in sizes))
    sizes = [one._replace(source=round(one.source * stored)) for one in sizes]
    config = prepared.source.config
    work = costs.costs(plan, sizes, prepared.steps, prepared.needs, config, last, rows, seqlen)
    return predict(work, size, rates, ranks, rows * seqlen, seqlen)


def predict(work: Sequence[PartCost], size: Forecast, rates: Rates, ranks: int, tokens: int, seqlen: int) -> Prediction:
    """Returns the forecast of a job.

    ranks    devices, one process each
    tokens, seqlen   of calibration: in all, and of a row
    """
    works = [_Work(cost, rates, tokens, seqlen) for cost in work]
    if size.calibrated:
        owners = [cost.part.index % ranks for cost in work]
    else:
        owners = dealt([cost.read for cost in work], ranks)
    lanes = _lanes(ranks) if size.calibrated else [1.0] * ranks
    solves = _solving(work, rates, ranks)
    found = []
    for rank in range(ranks):
        own = [work for work, owner in zip(works, owners, strict=True) if owner == rank]
        reads = works if size.calibrated and ranks > 1 else own
        found.append(_rank(rank, own, reads, works, lanes[rank], solves[rank], size, rates, ranks))
    return Prediction(rates, found)


class _Work:
    """Seconds that a part takes on one device that has it for itself."""

    def __init__(self, cost: PartCost, rates: Rates, tokens: int, seqlen: int) -> None:
        self.cost = cost
        product = cost.product + cost.attention * seqlen
        self.forward = tokens * product * cost.forwards / rates.products
        self.forward += cost.served * tokens * sum(count / rates.decoding(spec) for spec, count in cost.inputs.items())
        self.moments = tokens * cost.moments / rates.moments
        self.quantize = sum(count / rates.quantizing(spec) for spec, count in cost.quantized.items())
        self.quantize += cost.weights * rates.weight
        if rates.link is not None:
            self.quantize += (cost.read + cost.written) / rates.link


def _rank(
    rank: int,
    own: list[_Work],
    reads: list[_Work],
    works: list[_Work],
    lanes: float,
    solve: float,
    size: Forecast,
    rates: Rates,
    ranks: int,
) -> RankForecast:
    beside = ranks if rates.shared else min(ranks, rates.node)  # that share a disk
    slower = ranks if rates.shared else 1
    # All ranks read a block at the same time, and the disk gives it to a machine once.
    readers = 1 if size.calibrated else beside
    bytes_read, written = (sum(work.cost.read for work in reads), sum(work.cost.written for work in own))
    busy = {
        "forward": lanes * slower * sum(work.forward for work in works) if size.calibrated else 0.0,
        "moments": lanes * slower * sum(work.moments for work in works) if size.calibrated else 0.0,
        "solve": slower * solve,
        "quantize": slower * sum(work.quantize for work in own),
    }
    moved = {"read": bytes_read * readers / rates.read, "write": written * beside / rates.write}
    first = max((work.cost.read for work in reads), default=0) * readers / rates.read
    last = max((work.cost.written for work in own), default=0) * beside / rates.write
    start = rates.start[1 if size.calibrated else 0]
    work = sum(busy.values())
    alone = first + last + max(work, moved["read"] - first, moved["write"] - last)
    seconds = {"start": start, "read": moved["read"], **busy, "write": moved["write"]}
    return RankForecast(
        rank, len(own), bytes_read, written, seconds, work + sum(moved.values()) - alone, start + alone,
        _host(size, rates, lanes), _device(size, works, rates, lanes), written + round(2 * size.hidden_bytes * lanes),
    )  # fmt: skip


def _host(size: Forecast, rates: Rates, lanes: float) -> int:
    if rates.memory is None:
        return size.memory_bytes
    return RUNTIME_BYTES[size.calibrated] * 4 + AHEAD * size.largest_part + round(2 * size.hidden_bytes * lanes)


def _device(size: Forecast, works: list[_Work], rates: Rates, lanes: float) -> int | None:
    """Returns the bytes on the device: a part and what is made of it, what a solver needs, a batch, hidden states."""
    if rates.memory is None:
        return None
    part = int(size.largest_part * PART_SHARE[size.calibrated])
    if not size.calibrated:
        return RUNTIME_DEVICE + part
    batch = BATCH_TOKENS * HELD * max((work.cost.widest for work in works), default=0) * 2
    hidden = round(size.hidden_bytes * lanes)
    held = hidden if 4 * hidden < rates.memory else 0  # else they wait in the host's memory
    return max(RUNTIME_DEVICE + part + size.solving + batch + held, size.whole_bytes)


def _lanes(ranks: int) -> list[float]:
    """Returns the share of all rows that each rank runs: whole lanes."""
    return [len(own) / LANES for own in shares(LANES, ranks)]


def _solving(work: Iterable[PartCost], rates: Rates, ranks: int) -> list[float]:
    """Returns the seconds that every rank solves. All wait for the slowest at the end of a block."""
    total = 0.0
    for cost in work:
        seconds = [_seconds(effort, rates) for effort in cost.problems]
        each = [0.0] * ranks
        for owner, took in zip(dealt(seconds, ranks), seconds, strict=True):
            each[owner] += took
        total += max(each)
    return [total] * ranks


def _seconds(effort: Effort, rates: Rates) -> float:
    return effort.factors / rates.factors + effort.products / rates.plain + effort.candidates / rates.candidates


def as_json(found: Prediction) -> dict[str, Any]:
    rates = found.rates
    return {
        "device": rates.name,
        "rates": rates.origin,
        "seconds": found.time,
        "device_memory": rates.memory,
        "fits": found.fits,
        "ranks": [asdict(rank) for rank in found.ranks],
    }
