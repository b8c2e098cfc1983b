"""Works on one part of the model: statistics, algorithms, packing, and the forward pass of the decoded weights.

`PartWorker.work` is what the job does to each part; nothing outlives it but packed tensors, hidden states and a record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from quarkcli import memory
from quarkcli.algorithms.base import Assignment, Transform, Tuner
from quarkcli.dialects.base import Writer
from quarkcli.disk.contents import Copied, copied, part_targets
from quarkcli.disk.weights import WeightSource
from quarkcli.errors import DataError, some
from quarkcli.events import Listener, Message, Working
from quarkcli.forward.balance import Balance
from quarkcli.forward.group import Group
from quarkcli.forward.guard import Guard
from quarkcli.forward.joining import join
from quarkcli.forward.outliers import Outliers, told
from quarkcli.forward.statistics import Statistics
from quarkcli.forward.walk import Walk
from quarkcli.job import damage
from quarkcli.job.options import SKIP, Calibration, OnNonfinite
from quarkcli.job.packing import Packing
from quarkcli.job.pieces import Leaving, Said, finished, in_turn, output_error
from quarkcli.job.problems import average_size
from quarkcli.job.reach import balances, last_part, takes_one_pass
from quarkcli.job.result import PartResult
from quarkcli.job.rewriting import Rewriting
from quarkcli.job.served import handlers, put_decoded
from quarkcli.job.solving import Solved, Solving, Work, named
from quarkcli.job.stages import Decoded, stages
from quarkcli.job.tuning import TunedBlock, tuned
from quarkcli.numerics.quantize import Quantized, dequantize, quantize, static_scale
from quarkcli.plan.model import Part, Plan, QuantizedTarget
from quarkcli.spec import TensorSpec
from quarkcli.threads import Workers

Observed = tuple[Statistics | None, Tensor | None]  # statistics, and the block's output for the first batch
MOSTLY = 0.9  # of an input's values: where its static scale rounds so many to zero, the run says so


class PartWorker:
    """Works on the parts of one plan, in order.

    walk      the hidden states, or None when nothing needs data
    needs     from `data_needs`
    late      those of them that are asked for after all transforms
    weights   the source
    roles     role of every tensor that the family knows
    states    decisions of transforms for the whole model, by name
    others    further dialects
    workers   threads for what needs no statistics
    """

    moves_on: ClassVar[bool] = True  # the walk goes on behind a part

    def __init__(
        self,
        plan: Plan,
        dialect: Writer,
        steps: list[Assignment],
        needs: Mapping[str, set[str]],
        weights: WeightSource,
        walk: Walk | None,
        tell: Listener,
        *,
        calibration: Calibration | None = None,
        strict: bool = False,
        roles: Mapping[str, str] | None = None,
        on_nonfinite: OnNonfinite = "stop",
        states: Mapping[str, Any] | None = None,
        late: Mapping[str, set[str]] | None = None,
        others: Sequence[Writer] = (),
        workers: Workers | None = None,
        group: Group | None = None,
    ) -> None:
        self.plan = plan
        self.group = group or Group()
        self.workers = workers or Workers()
        self._said = Said()
        self.dialect = dialect
        self.writers = [dialect, *others]
        self.solving = Solving(plan, steps, self._warn, weights, on_nonfinite == SKIP, self.workers, self.group)
        self.tuners = [(s, s.algorithm) for s in steps if isinstance(s.algorithm, Tuner)]
        self.transforms = [(s, s.algorithm) for s in steps if isinstance(s.algorithm, Transform)]
        self.states: Mapping[str, Any] = states or {}
        self.weights = weights
        self.needs = needs
        self.late = needs if late is None else late
        self.walk = walk
        self.tell = tell
        self.all_tokens = calibration is not None and calibration.moe == "all"
        self.least = calibration.min_expert_tokens if calibration is not None else 1
        self.strict = strict
        self.roles = roles or {}
        self.on_nonfinite = on_nonfinite
        self.last = last_part(plan, needs)
        self.one_pass = self.moves_on and takes_one_pass(plan, steps)
        self.balances = balances(plan, steps)
        self.headers, self.owners = weights.headers, part_targets(plan)

    def work(self, part: Part, tensors: dict[str, Tensor]) -> PartResult:
        """Quantizes one part.

        tensors   of the source, on the device; decoded weights replace them; without a walk packed ones are removed
        In order: transforms before, observe, transforms after, turn, static scales, solve, refine, tune, pack, advance.
        """
        started = time.perf_counter()
        self.warnings: list[str] = []
        self.silent: list[str] = []
        self.tuning: dict[str, dict[str, float]] = {}
        self.solving.begin()
        self.guard = Guard(self.on_nonfinite == SKIP, self._warn)
        nonfinite = damage.kept(self._copied(part), tensors, self.roles, self.on_nonfinite == "keep", self.workers)
        if self.is_shared(part):
            damage.refuse_weights(self.plan, part, tensors)
        rewriting = Rewriting(self.plan, part, tensors, self.transforms, self.states, self.weights)
        rewriting.before()
        statistics, before = self._observe(part, tensors)
        for step, transform in self.transforms:
            if statistics is not None and rewriting.after(step, transform, statistics):
                statistics, _ = self._observe(part, tensors, again=True)
        statistics = self._turn(part, tensors, rewriting.online(), statistics)
        scales = self._static_scales(part, statistics)
        packing, weight_errors = self._quantize(part, tensors, statistics, scales)
        kept = {row.info.name: row.of(tensors) for row in self._copied(part)}
        out, *others = packing.tensors(kept, rewriting.added)
        expert_tokens, sites = (statistics.expert_tokens(), told(statistics.outliers)) if statistics else ({}, {})
        self._check_experts(expert_tokens)
        del statistics
        after = self.advance(part, tensors, out, scales)
        apart = packing.apart() if self.walk is not None and part.index < self.last else {}
        error = output_error(before, after) if before is not None and after is not None and weight_errors else math.nan
        return PartResult(
            out, error if math.isfinite(error) else None, weight_errors, expert_tokens, self.warnings,
            time.perf_counter() - started, self.solving.dead_inputs, self.solving.report(), self.silent,
            list(nonfinite.parameters), list(nonfinite.others), self.tuning, rewriting.notes,
            self.solving.exact, self.guard.skipped | self.solving.skipped, apart, others,
            self.solving.seconds, sites,
        )  # fmt: skip

    def is_shared(self, part: Part) -> bool:
        """True for a part that all ranks work on together, each with its own rows; others are one rank's alone."""
        return self.walk is not None and part.index <= self.last and part.kind in {"block", "tail"}

    def _copied(self, part: Part) -> list[Copied]:
        return list(copied(self.plan, part, self.headers, self.owners))

    def _warn(self, text: str) -> None:
        if self._said.lines is not None:
            self._said.lines.append(text)
            return
        self.warnings.append(text)
        self.tell(Message(text, "warning", many=True))

    # -- statistics ----------------------------------------------------------------------------------------------

    def _observe(
        self, part: Part, tensors: Mapping[str, Tensor], staged: Decoded | None = None, again: bool = False
    ) -> Observed:
        """Runs the part in source precision, on states of the quantized parts below (`one_pass`: of the source's).

        staged   the weights of earlier stages, decoded; None: this is the first
        again    behind a transform, which may have clamped weights: states move on as they did the first time
        """
        walk = self.walk
        if walk is None or not self.is_shared(part):
            return None, None

        needs = self.needs if staged is None else staged.needs(self.needs)
        new = partial(
            Statistics, self.plan, part.index, needs, walk.runner, self.all_tokens, self.least, self.guard,
            self.group, Balance(walk.tokens, walk.mask, self.balances), self._first_stage_alone(part, staged),
        )  # fmt: skip
        if part.block is None:
            statistics, first = walk.observe_tail(new, tensors), None
        else:
            walk.runner.load_block(part.block, tensors if staged is None else staged.tensors())
            apart = staged.apart() if staged is not None else {} if again else None
            advance = self.one_pass and part.index < self.last and not again
            statistics, first = walk.observe(part.block, new, advance, apart)
        join(statistics)
        if not self.solving.is_data_free:
            memory.give_back()  # what the forward left on the heap, before problems are solved
        return statistics, first

    def _first_stage_alone(self, part: Part, staged: Decoded | None) -> bool:
        """True where nobody asks for second moments but the first stage."""
        return self.solving.staged and part.block is not None and staged is None and not self.transforms

    def _turn(
        self, part: Part, tensors: Mapping[str, Tensor], blocks: Mapping[str, int], statistics: Statistics | None
    ) -> Statistics | None:
        """Takes in that inputs are turned from now on. Returns statistics of the turned ones.

        blocks   weight, already turned -> size of its input's block Hadamard
        """
        if not blocks or self.walk is None or part.block is None or part.index > self.last:
            return statistics
        assert statistics is not None
        targets = [(self.plan.targets[name], block) for name, block in blocks.items()]
        self.walk.turned[part.block] = {target.view.tensor: block for target, block in targets}
        if statistics.turn({t.site: block for t, block in targets if t.site is not None}, self.late):
            self.walk.runner.load_block(part.block, tensors)
            return statistics
        return self._observe(part, tensors, again=True)[0]

    def _static_scales(self, part: Part, statistics: Statistics | None) -> dict[str, Tensor]:
        """Returns the stored static scales by `Activation.key`."""
        scales: dict[str, Tensor] = {}
        for key, site, spec, expert in self.plan.activations(part.index):
            if spec.is_static and key.removesuffix(".input") in self.plan.carried:
                scales[key] = self.solving.stored_input(key.removesuffix(".input"))
            elif spec.is_static:
                amax = self._amax(site, spec, expert, statistics)
                scales[key] = static_scale(amax, spec)
                if not float(amax):
                    self.silent.append(key)
                elif statistics is not None and site in statistics.outliers and expert is None:
                    self._look(key, spec, float(scales[key]), statistics.outliers[site])
        return scales

    def _look(self, key: str, spec: TensorSpec, scale: float, seen: Outliers) -> None:
        """Warns where most values are below half a step of integers: a few large ones have made the scale theirs."""
        lost = seen.share_below(scale / 2) if spec.format.kind == "integer" else 0.0
        if lost >= MOSTLY:
            self._warn(
                f"{key}: its static scale rounds {lost:.0%} of the values to zero, because of a few large ones; leave "
                "such layers out with --exclude, or take a scheme with a scale for each token, such as int8_dynamic"
            )

    def _amax(self, site: str | None, spec: Any, expert: int | None, statistics: Statistics | None) -> Tensor:
        constant = spec.scale.outermost.constant_amax
        if constant is not None:
            return torch.tensor(constant, dtype=torch.float32)
        assert statistics is not None and site is not None
        found = [statistics.amax(one, spec, expert) for one in self.plan.under_one_scale(site)]
        return max(found, key=float)

    def _check_experts(self, tokens: dict[str, dict[int, int]]) -> None:
        for layer, counts in tokens.items():
            few = [expert for expert, count in counts.items() if count < self.least]
            saw = "no calibration token" if self.least == 1 else f"fewer than {self.least} calibration tokens"
            text = (
                f"{layer}: {len(few)} of {len(counts)} experts saw {saw} ({some(few, 8)}); they use the statistics "
                "of the layer"
            )
            if few and self.strict:
                raise DataError(
                    text, hint="use more calibration rows, or --moe-calibration all", kind="E-DATA-NO-TOKEN"
                )
            if few:
                self._warn(text)

    # -- quantization --------------------------------------------------------------------------------------------

    def _quantize(
        self, part: Part, tensors: dict[str, Tensor], statistics: Statistics | None, scales: Mapping[str, Tensor]
    ) -> tuple[Packing, dict[str, float]]:
        """Returns the packed tensors in each dialect, and the error of every weight."""
        targets = list(self.plan.quantized(part.index))
        packing = Packing(self.plan, self.writers, part, scales)
        errors: dict[str, float] = {}
        self.tell(Working(f"quantizing {part.name}"))
        wanted = {row.tensor for row in self._copied(part)} if self.walk is None else tensors
        leaving = Leaving(tensors, targets, list(wanted))
        pieces, workers = self._pieces(part, targets, tensors, statistics, scales)

        def bias(target: QuantizedTarget) -> Quantized | None:
            return self._bias(target, tensors)

        for target, made, error, seconds in finished(pieces, packing, bias, workers, self._said, self._warn):
            packing.put(target, made)
            errors[target.name] = error
            self.solving.seconds[target.name] = round(self.solving.seconds.get(target.name, 0.0) + seconds, 6)
            leaving.packed(target)
            self.tell(Working(f"quantizing {part.name}, {len(errors)} of {len(targets)} weights"))
        assert len(errors) == len(targets), "an algorithm left weights out"
        return packing, errors

    def _pieces(
        self,
        part: Part,
        targets: list[QuantizedTarget],
        tensors: dict[str, Tensor],
        statistics: Statistics | None,
        scales: Mapping[str, Tensor],
    ) -> tuple[Iterable[Work], Workers]:
        """Returns the work on the weights, and who does it: several threads where no statistics are asked for."""
        tunes = self.walk is not None and part.block is not None and part.index <= self.last and bool(self.tuners)
        if (statistics is None or (self.solving.is_data_free and self.group.size == 1)) and not tunes:
            if self.walk is not None:
                self.walk.observed()
            return self.solving.work(targets, tensors, None), self.workers.on(average_size(targets))
        solved = self._solved(part, targets, tensors, statistics)
        if self.walk is not None and tunes:
            served = handlers(self.plan, part, scales, self.walk.runner.loads)
            block = TunedBlock(self.plan, self.walk, part, tensors | self._biases(part, tensors), served)
            solved = list(solved)
            if self._is_tunable(part, block):
                rows, vectors, self.tuning = tuned(self.tuners, block, solved)
                self.solving.tuned(solved, rows)
                tensors |= vectors
                solved = rows.values()
        return in_turn(solved), Workers()

    def _is_tunable(self, part: Part, block: TunedBlock) -> bool:
        """False where NaN or infinity in the block is to be passed over."""
        if not self.guard.skip or (not self.guard.skipped and block.is_finite()):
            return True
        why = next(iter(self.guard.skipped.values()), "NaN or inf in its output")
        names = " and ".join(tuner.name for _, tuner in self.tuners)
        self._warn(f"{part.name}: {why}; {names} skips it")
        self.guard.skipped.setdefault(part.name, why)
        return False

    def _solved(
        self, part: Part, targets: list[QuantizedTarget], tensors: dict[str, Tensor], statistics: Statistics | None
    ) -> Iterable[Solved]:
        """Yields every weight with its codes and scales, stage by stage where a solver asks for stages."""
        if not self.solving.staged or part.block is None or self.walk is None or statistics is None:
            if self.walk is not None:
                self.walk.observed()
            yield from self.solving.solved(targets, tensors, statistics)
            return
        decoded = Decoded(tensors)
        found = stages(targets, statistics)
        for number, members in enumerate(found):
            rows = list(self.solving.solved(targets, tensors, statistics, number, members))
            yield from rows
            if number + 1 < len(found):
                decoded.put(rows, found[number + 1])
                statistics = self._observe(part, tensors, decoded)[0]
        self.walk.observed()
        self.walk.runner.load_block(part.block, tensors)

    def _bias(self, target: QuantizedTarget, tensors: Mapping[str, Tensor]) -> Quantized | None:
        """Returns the codes of the bias as a matrix [1, out], where its slot is quantized."""
        if target.bias_spec is None or target.bias is None:
            return None
        bias: Quantized = named(target.bias, quantize, tensors[target.bias].reshape(1, -1), target.bias_spec)
        return bias

    def _biases(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the quantized biases of a part as they are served."""
        found = {}
        for target in self.plan.quantized(part.index):
            bias = self._bias(target, tensors)
            if bias is not None and target.bias is not None and target.bias_spec is not None:
                decoded = dequantize(bias, target.bias_spec).reshape(-1)
                found[target.bias] = decoded.to(tensors[target.bias].dtype)
        return found

    # -- on to the next part -------------------------------------------------------------------------------------

    def advance(
        self, part: Part, tensors: dict[str, Tensor], packed: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Moves hidden states through the block as it will be served: decoded packed weights, quantized inputs.

        Returns the output for the first batch; nothing else is run after the last part that needs data, or where
        hidden states have moved on already.
        """
        if self.walk is None or part.block is None or part.index > self.last:
            return None
        after: Tensor | None
        put_decoded(self.plan, self.dialect, part, tensors, packed, self.workers)
        self.walk.runner.load_block(part.block, tensors)
        served = handlers(self.plan, part, scales, self.walk.runner.loads)
        if part.index < self.last and not self.one_pass:
            self.walk.advance(part.block, served)
            after = self.walk.served[0] if self.walk.served else None
        else:
            after = self.walk.probe(part.block, served)
        self.walk.runner.unload_block(part.block)
        return after
