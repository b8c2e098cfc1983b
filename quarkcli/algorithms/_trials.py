"""Tries factors of channels: measures the loss of the weights that read them, on fitted and on held-out rows.

Where a solver makes up for errors of rounding, the search goes by what it cannot make up for, and the proof on held-out
rows by what the solver itself makes of some of the weights' rows. Where the server turns an input by a Hadamard,
weights and inputs are judged as they are behind it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quarkcli.algorithms._channels import Channels
from quarkcli.algorithms._columns import ColumnSolver
from quarkcli.algorithms.base import Assignment, Moment, Problem, Solver
from quarkcli.algorithms.tensors import PartTensors
from quarkcli.numerics.online import turned
from quarkcli.numerics.quantize import dequantize, quantize
from quarkcli.numerics.sample import Sample
from quarkcli.numerics.smooth import Cost, Reader, SourceCost, clamped, picked_rows
from quarkcli.numerics.solve import factorize
from quarkcli.plan.model import QuantizedTarget, is_quantized
from quarkcli.spec import PerChannel, PerGroup

if TYPE_CHECKING:
    from quarkcli.forward.statistics import Statistics

ROWS = 256  # rows of weights that candidates are tried on, of all readers together
LEAST_ROWS = 16  # and of each at least
SOLVED_ROWS = 128  # rows that the solver itself is run on
SOLVED_READERS = 4  # experts among them at most
DAMP = 0.01


class Trial:
    """Candidates for the channels of one pair.

    solvers   solver of every quantized weight
    power     2: mean square of what the outputs lose, 1: mean magnitude
    """

    def __init__(self, channels: Channels, solvers: dict[str, Assignment], power: int = 2) -> None:
        self.channels = channels
        self.site, self.expert = next(iter(channels.sites()))
        statistics = channels.statistics
        self.fitted = statistics.samples(self.site, self.expert)
        self.held = statistics.samples(self.site, self.expert, held=True)
        self.solver = self._solver(solvers)
        self.readers = _readers(channels)
        # Behind a Hadamard no column's error is its own, so that this says nothing of candidates there.
        alone = isinstance(self.solver, ColumnSolver) and all(reader.block == 1 for reader in self.readers)
        self.conditional = self._conditional() if alone else None
        seen = statistics.channel_amax(self.site, self.expert)
        self.cost_of = Cost(self.readers, seen=seen, conditional=self.conditional, power=power)
        self.plain = Cost(self.readers, seen=seen, power=power)
        self.source = _source(channels, self.fitted) if self.fitted is not None else None

    @property
    def width(self) -> int:
        return self.channels.quantized[0].shape[1]

    def cost(self, factors: Tensor) -> float:
        """Returns the cost under factors, float32 [channels], on the rows that they are fitted to."""
        assert self.fitted is not None
        lost = self.cost_of(self.channels.spread(factors, self.width), self.fitted)
        return self._with_source(lost, factors, squares=self.cost_of.squares)

    def proof(self, factors: Tensor) -> tuple[float, float] | None:
        """Returns the cost without and with factors on held-out rows; None when none were held out."""
        if self.held is None:
            return None
        pair = []
        for own in (torch.ones_like(factors), factors):
            wide = self.channels.spread(own, self.width)
            solved = self._solved(wide) if self.solver is not None else None
            lost = self.plain(wide, self.held) if solved is None else solved
            pair.append(self._with_source(lost, own, squares=self.plain.squares or solved is not None))
        return pair[0], pair[1]

    def _with_source(self, lost: float, factors: Tensor, *, squares: bool) -> float:
        """Returns what the readers lose together with what the source does, whose errors are independent of theirs.

        Of magnitudes, the mean of normal errors with both variances: sqrt(2 / pi) of their root mean square.
        """
        if self.source is None:
            return lost
        own = self.source(factors)
        return lost + own if squares else math.hypot(lost, math.sqrt(2 / math.pi * self.plain.outputs * own))

    def _solver(self, solvers: dict[str, Assignment]) -> Solver | None:
        """Returns the solver of the readers where it goes by their second moment; None where any has another."""
        found = {id(step): step for step in (solvers[target.name] for target in self.channels.quantized)}
        if len(found) != 1:
            return None
        (step,) = found.values()
        needs = step.needs(self.channels.part.plan).get(self.site, set())
        return step.algorithm if "gram" in needs and isinstance(step.algorithm, Solver) else None

    def _moment(self, expert: int | None) -> Moment | None:
        return self.channels.statistics.moment(self.site, expert)

    def _conditional(self) -> Tensor | None:
        """Returns what the columns rounded later cannot make up for, float32 [width]: 1 / diag(H^-1) in their order."""
        moment = self._moment(self.expert)
        factor = factorize(moment.gram, damp=DAMP) if moment is not None else None
        if factor is None or moment is None:
            return None
        found = factor.upper.diagonal().square()
        if factor.order is not None:
            found = torch.empty_like(found).index_copy_(0, factor.order, found)
        return torch.where(factor.dead, 0.0, found)

    def _solved(self, factors: Tensor) -> float | None:
        """Returns what the solver makes of some rows under factors, on held-out rows; None without a solution."""
        assert self.held is not None and self.solver is not None
        total = 0.0
        for expert, readers in _some_experts(self.channels.quantized).items():
            moment = self._moment(expert)
            if moment is None:
                continue
            most, block = max(LEAST_ROWS, SOLVED_ROWS // len(readers)), _block(self.channels.part, readers[0])
            picked = [picked_rows(self.channels.part.columns(t.name), most, t.weight) for t in readers]
            amax = [_amax(self.channels.part, t, factors, self.channels) for t in readers]
            problem = Problem(
                self.site, expert, 0, tuple(readers), tuple(turned(w * factors, block) for w in picked), tuple(amax),
                moment.scaled(factors.reciprocal()).turned(block), lambda text: None,
            )  # fmt: skip
            solved = self.solver.solve(problem)
            if solved is None:
                return None
            for target, weight, quantized in zip(readers, picked, solved, strict=True):
                changed = turned(dequantize(quantized, target.weight), block) / factors
                rows = self.held.rows
                own = self.plain.input(target.input, factors, rows, block) if target.input is not None else rows
                lost = self.held.mean((own @ changed.T - rows @ weight.T).square()).sum()
                total += float(lost) * target.shape[0] / len(weight)
        return total


def _readers(channels: Channels) -> list[Reader]:
    targets = channels.quantized
    most = max(LEAST_ROWS, ROWS // len(targets))
    shares = _token_shares(channels)
    found = []
    for target in targets:
        weight = channels.part.columns(target.name)
        rows = picked_rows(weight, most, target.weight)
        share = shares.get(target.expert, 1.0) if target.expert is not None else 1.0
        columns = weight.abs().amax(0)
        importance = share * weight.shape[0] / len(rows)
        block = _block(channels.part, target)
        found.append(Reader(rows, columns, target.weight, target.input, target.scale_group, importance, block))
    return found


def _block(part: PartTensors, target: QuantizedTarget) -> int:
    """Returns the size of the Hadamard blocks that the server turns a weight's input by; 1: none."""
    return part.plan.online.get(target.name, 1)


def _token_shares(channels: Channels) -> dict[tuple[str, int], float]:
    """Returns the share of a layer's tokens that each expert sees, where experts read the channels together."""
    if not channels.pair.norm:
        return {}
    counts = channels.statistics.expert_tokens()
    totals = {prefix: max(1, sum(own.values())) for prefix, own in counts.items()}
    return {(prefix, e): n / totals[prefix] for prefix, own in counts.items() for e, n in own.items()}


def _some_experts(targets: list[QuantizedTarget]) -> dict[int | None, list[QuantizedTarget]]:
    """Returns the weights by expert, those of one spec; of many experts some, evenly picked."""
    found: dict[int | None, list[QuantizedTarget]] = {}
    for target in targets:
        if target.weight == targets[0].weight:
            found.setdefault(target.expert[1] if target.expert else None, []).append(target)
    keys = list(found)
    return {key: found[key] for key in keys[:: -(-len(keys) // SOLVED_READERS)]}


def _amax(part: PartTensors, target: QuantizedTarget, factors: Tensor, channels: Channels) -> Tensor | None:
    """Returns the amax that a scale group shares under factors of the columns; None without a scale per tensor."""
    if not target.weight.has_tensor_scale:
        return None
    mine = set(channels.pair.readers)
    members = [t for t in part.targets.values() if is_quantized(t) and t.scale_group == target.scale_group]
    columns = ((t, part.columns(t.name)) for t in members)
    scaled = ((t, own * factors if t.name in mine else own) for t, own in columns)
    return torch.stack([turned(own, _block(part, t)).abs().max() for t, own in scaled]).max()


def _source(channels: Channels, read: Sample) -> SourceCost | None:
    """Returns the cost of the source's own rows where they share scales, so that factors of channels matter to them."""
    target = channels.part.targets.get(channels.pair.source) if not channels.pair.norm else None
    if target is None or not is_quantized(target) or _rows_apart(target) or target.site is None:
        return None
    sample = samples_now(channels.part, target, channels.statistics)
    if sample is None:
        return None
    block = _block(channels.part, target)
    squares = sample.mean(turned(sample.rows, block).square())
    weight = turned(channels.part.columns(target.name), block)
    picked = torch.arange(0, len(weight), max(1, -(-len(weight) // ROWS)), device=weight.device)
    readers = sum(channels.gathered(channels.part.columns(t.name).square().sum(0)).sum(0) for t in channels.quantized)
    passed = channels.gathered(read.mean(read.rows.square())).mean(0) * readers * (len(weight) / len(picked))
    largest = weight.abs().amax(1)
    return SourceCost(weight[picked], picked, largest, target.weight, squares, passed[picked])


def _rows_apart(target: QuantizedTarget) -> bool:
    """True when every row has scales of its own, so that a row may be of any size."""
    return all(isinstance(s.granularity, PerGroup) or s.granularity == PerChannel(0) for s in target.weight.stages)


def samples_now(
    part: PartTensors, target: QuantizedTarget, statistics: Statistics, held: bool = False
) -> Sample | None:
    """Returns sampled rows of what a weight reads, since the transform at work scaled channels."""
    assert target.site is not None
    expert = target.expert[1] if target.expert else None
    sample = statistics.samples(target.site, expert, held)
    factor = part.scaled.get((target.site, expert))
    return sample if sample is None or factor is None else sample.times(factor)


def clip_proof(
    part: PartTensors, target: QuantizedTarget, statistics: Statistics, limits: Tensor
) -> tuple[float, float] | None:
    """Returns what outputs lose on held-out rows, the weight as it is and clamped; None without held-out rows."""
    sample = samples_now(part, target, statistics, held=True)
    if sample is None:
        return None
    weight = part.columns(target.name)
    step = max(1, -(-len(weight) // ROWS))
    some, limit = weight[::step], limits[::step]
    amax = weight.abs().max() if target.weight.has_tensor_scale else None
    pair = []
    for own in (some, clamped(some, limit)):
        lost = (dequantize(quantize(own, target.weight, amax=amax), target.weight) - some) @ sample.rows.T
        pair.append(float(sample.mean(lost.square_().T).mean()))
    return pair[0], pair[1]
