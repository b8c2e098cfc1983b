"""AWQ (arXiv 2306.00978): makes the weights of large channels large, where rounding costs less, and clips the largest.

Scales: channel j is multiplied by x_j^r (`plain`) or x_j^r / w_j^(1 - r) (`duo`), x_j the mean magnitude of the
activation, w_j the root mean square of the weights that read it, divided by sqrt(max * min); r = 0 ... 1. They are
judged on sampled rows by the outputs of all weights that read the channels together, with quantized inputs where the
plan has them; no forward of the parent is run. What is not better than 1 everywhere on held-out rows is not taken.
Before a solver that makes up for errors, candidates are judged by what it cannot make up for, and proved with the
solver itself.

Clipping: of every group the share of its largest magnitude with which the outputs lose least on sampled rows, one group
after the other, with the errors of all others as they are by then; q and k are left alone, because attention multiplies
their errors. A solver that searches scales does it better: then nothing is clipped unless `clip` says `on`.

ModelOpt's awq_lite is `clip: off` with `n_grid` = 1 / alpha_step, awq_clip is `scales: false`, awq_full is all of it.
AMD Quark's awq is the default.

scaling_layers   as in smoothquant; default: all channels that the model family names
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quarkcli.algorithms import _parameters
from quarkcli.algorithms._scaling import Rows, below, together
from quarkcli.algorithms._searching import SearchedScaling
from quarkcli.algorithms.base import Needs
from quarkcli.errors import ConfigError
from quarkcli.family import Pair
from quarkcli.plan.model import Changes, Part, Plan, QuantizedTarget, Target, is_quantized
from quarkcli.recipe.match import starred
from quarkcli.spec import MOST_RANGES

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms._channels import Channels
    from quarkcli.algorithms.tensors import PartTensors
    from quarkcli.forward.statistics import Statistics
    from quarkcli.numerics.sample import Sample

_UNCLIPPED = frozenset({"q", "k"})
_UNCLIPPABLE = "scales are searched already, cover more than one row, or a Hadamard mixes the values of a group"
Clip = Literal["auto", "on", "off"]


class AWQ(SearchedScaling):
    """n_grid: steps of r between 0 and 1; duo_scaling: candidates with the weights' term; scales, clip: do it or not;

    min_clip_ratio, shrink_step: the smallest share of the largest magnitude that is tried, and the steps to it.
    """

    name = "awq"
    kinds = frozenset({"samples", "mean_abs"})
    parameters: ClassVar[Mapping[str, Any]] = {
        "scales": True, "n_grid": 20, "duo_scaling": True, "clip": "auto", "min_clip_ratio": 0.5, "shrink_step": 0.05,
        "scaling_layers": None,
    }  # fmt: skip

    def __init__(
        self,
        scales: bool,
        n_grid: int,
        duo_scaling: bool,
        clip: Clip | bool,
        min_clip_ratio: float,
        shrink_step: float,
        scaling_layers: Rows,
    ) -> None:
        super().__init__(scaling_layers, n_grid)
        self.scales = _parameters.flag("awq scales", scales)
        self.duo = _parameters.flag("awq duo_scaling", duo_scaling)
        self.clip = _parameters.on_off(clip)
        if self.clip not in ("auto", "on", "off"):
            raise ConfigError(f"awq clip must be auto, on or off, not {clip!r}", kind="E-ALGORITHM-PARAMETER")
        if not scales and self.clip == "off":
            raise ConfigError(
                "awq has nothing to do: scales and clip are both off", hint="leave awq out", kind="E-ALGORITHM-IDLE"
            )
        self.least = _parameters.share("awq min_clip_ratio", min_clip_ratio)
        self.step = _parameters.share("awq shrink_step", shrink_step)
        if (1 - self.least) / self.step > MOST_RANGES:
            raise ConfigError(
                f"awq shrink_step {shrink_step!r} asks for more than {MOST_RANGES} ranges",
                hint="write a larger one",
                kind="E-ALGORITHM-PARAMETER",
            )
        if self.clip != "off" and not _steps_down(self.least, self.step):
            raise ConfigError(
                f"awq shrink_step {shrink_step!r} leads below min_clip_ratio {min_clip_ratio!r} at once",
                hint="write a smaller one",
                kind="E-ALGORITHM-PARAMETER",
            )

    # -- declarations ---------------------------------------------------------------------------------------------

    def needs(self, plan: Plan) -> Needs:
        found = super().needs(plan) if self.scales else {}
        for target in self._clipped(plan):
            assert target.site is not None
            found.setdefault(target.site, set()).add("samples")
        return found

    def changes(self, plan: Plan) -> Changes:
        scaled = super().changes(plan).tensors if self.scales else frozenset()
        return Changes(scaled | {target.view.tensor for target in self._clipped(plan)})

    def check(self, plan: Plan) -> None:
        if self.scales:
            super().check(plan)
        clipped = self._clipped(plan)
        if (self.clip == "on" and not clipped) or (not self.scales and not clipped):
            raise ConfigError(
                f"awq finds no weight to clip: {_UNCLIPPABLE}",
                where="algorithm",
                hint="leave 'clip' out, or use rtn and scales per group or channel, without 'hadamard'",
                kind="E-ALGORITHM-IDLE",
            )
        text = f"awq clips nothing: {_UNCLIPPABLE}"
        if self.clip == "auto" and not clipped and text not in plan.warnings:
            plan.warnings.append(text)

    def _clipped(self, plan: Plan) -> list[QuantizedTarget]:
        """Returns the weights that are clipped."""
        if self.clip == "off":
            return []
        blocks = {part.index for part in plan.parts if part.block is not None}
        turned = self.turned(plan)  # the server's Hadamard mixes the values of a group
        found = [t for t in plan.quantized() if t.site is not None and t.part in blocks and clippable(t)]
        found = [t for t in found if t.name not in turned]
        return found if self.clip == "on" else [t for t in found if not self._searched(plan, t)]

    def _searched(self, plan: Plan, target: Target) -> bool:
        """True when the weight's solver goes by its second moment: those search scales."""
        step = self.solvers(plan)[target.name]
        return "gram" in step.needs(plan).get(target.site or "", set())

    # -- work -----------------------------------------------------------------------------------------------------

    def kinds_of(self, plan: Plan, part: Part, pair: Pair) -> frozenset[str]:
        kinds = super().kinds_of(plan, part, pair)
        inside = not pair.norm and plan.targets[pair.source].expert is not None
        return kinds - {"mean_abs"} if inside else kinds  # of an expert's inner input the sampled rows tell

    def candidates(self, channels: Channels, sample: Sample) -> dict[str, Callable[[float], Tensor]]:
        from quarkcli.numerics.smooth import scaled_factors

        seen, columns = channels.seen_mean(sample), channels.column_rms()
        kinds = {"plain": lambda ratio: scaled_factors(seen, None, ratio)}
        if self.duo:
            kinds["duo"] = lambda ratio: scaled_factors(seen, columns, ratio)
        return kinds

    def after(self, part: PartTensors, statistics: Statistics, state: Any) -> None:
        if self.scales:
            super().after(part, statistics, state)
        wanted = {target.name for target in self._clipped(part.plan)}
        notes: dict[str, list[dict[str, Any]]] = {}
        for target in part.targets.values():
            if target.name in wanted and is_quantized(target) and (part.mine is None or target.name in part.mine):
                facts = self._clip(part, target, statistics)
                notes.setdefault(starred(below(part.part, target.name)), []).append(facts)
        for name, own in notes.items():
            part.note(clipped=name, **together(own))

    def _clip(self, part: PartTensors, target: QuantizedTarget, statistics: Statistics) -> dict[str, Any]:
        from quarkcli.algorithms._trials import clip_proof, samples_now
        from quarkcli.numerics.smooth import clip_limits

        sample = samples_now(part, target, statistics)
        if sample is None:
            return {"taken": False, "reason": "no calibration token"}
        weight = part.columns(target.name)
        amax = weight.abs().max() if target.weight.has_tensor_scale else None
        limits, clipped = clip_limits(weight, sample, target.weight, amax, self.least, self.step)
        share = round(float(clipped.float().mean()), 4)
        if not share:
            return {"taken": False, "share": share, "reason": "no group is better clipped"}
        proof = clip_proof(part, target, statistics, limits)
        facts: dict[str, Any] = {"share": share}
        if proof is not None:
            facts |= {"held_out_before": proof[0], "held_out_after": proof[1]}
            if not proof[1] < proof[0]:
                return facts | {"taken": False, "reason": "not better on held-out rows"}
        part.clamp(target.name, limits)
        return facts | {"taken": True}


def _steps_down(least: float, step: float) -> int:
    """Returns how many steps lead from the largest magnitude down to the smallest share of it that is tried."""
    return int((1.0 - least) / step + 1e-9)


def clippable(target: QuantizedTarget) -> bool:
    """True when every group or row has a scale of its own, which its range alone decides."""
    spec = target.weight
    return target.role not in _UNCLIPPED and spec.has_own_scales and not spec.searches


ALGORITHM = AWQ
