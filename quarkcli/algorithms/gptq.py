"""GPTQ (arXiv 2210.17323): rounds column by column and lets the columns not yet rounded make up for the error.

Scales are fixed beforehand from the source weights (static groups), so the stored layout does not change; with
`act_order` the columns with the largest activations are rounded first. `scale_search` shrinks each group's amax by the
factor of `SHRINKS` that leaves the least rounding error, every column weighted by its mean square activation. Of
inputs that were zero in calibration nothing is known: their weights are rounded to nearest, and count as much as those
of an ordinary input when a scale is searched. The solver asks the format for scales and codes and assumes nothing
about integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms.base import Needs, Problem, Solver
from quarkcli.algorithms.rtn import RoundToNearest
from quarkcli.errors import ConfigError
from quarkcli.plan.model import Plan
from quarkcli.spec import MIN_MAX, SEARCH_RULES, PerGroup, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import QParams, Quantized
    from quarkcli.numerics.solve import Factor


SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Below this share of the median mean square, calibration says too little of an input to clip its weights for others.
FAINT = 1e-6


class GPTQ(Solver):
    """The GPTQ solver.

    damp: ridge as a share of the mean diagonal; act_order: largest activations first; scale_search: see above.
    """

    name = "gptq"
    parameters: ClassVar[Mapping[str, Any]] = {"damp": 0.01, "act_order": True, "scale_search": True}

    def __init__(self, damp: float, act_order: bool, scale_search: bool) -> None:
        if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 < damp < 1:
            raise ConfigError(f"gptq damp must lie between 0 and 1, not {damp!r}", where="algorithm")
        for name, value in (("act_order", act_order), ("scale_search", scale_search)):
            if not isinstance(value, bool):
                raise ConfigError(f"gptq {name} must be true or false, not {value!r}", where="algorithm")
        self.damp = float(damp)
        self.act_order = act_order
        self.scale_search = scale_search
        self._last: tuple[Tensor, Factor | None] | None = None

    def needs(self, plan: Plan) -> Needs:
        return {target.site: {"gram"} for target in plan.quantized() if target.site is not None}

    def memory(self, plan: Plan) -> int:
        """Returns the bytes of the second moment, its damped copy, the factor and what makes it."""
        widest = max((run[0].shape[1] for run in plan.quantized_alike()), default=0)
        return 4 * 4 * widest * widest

    def solve(self, problem: Problem) -> list[Quantized] | None:
        from quarkcli.numerics.solve import dead_inputs

        assert problem.moment is not None
        gram = problem.moment.gram
        if bool(dead_inputs(gram).all()):
            return RoundToNearest().solve(problem)
        factor = self._factor(gram)
        if factor is None:
            return None
        return solve_together(problem, factor, column_importance(gram) if self.scale_search else None)

    def _factor(self, gram: Tensor) -> Factor | None:
        """Returns the factor of a second moment. Problems that differ in their spec alone come one after the other."""
        from quarkcli.numerics.solve import factorize

        if self._last is None or self._last[0] is not gram:
            self._last = gram, factorize(gram, damp=self.damp, act_order=self.act_order)
        return self._last[1]


def solve_together(problem: Problem, factor: Factor, importance: Tensor | None) -> list[Quantized]:
    """Returns the codes of all weights of a problem, found in one column loop: rows are independent."""
    import torch

    from quarkcli.numerics.quantize import Quantized, grid
    from quarkcli.numerics.solve import solve

    spec, weights = problem.spec, problem.weights
    params = [searched_qparams(w, spec, amax, importance) for w, amax in zip(weights, problem.amax, strict=True)]
    each = [grid(p, spec, w.shape) for p, w in zip(params, weights, strict=True)]
    zeros = [at.zero for at in each if at.zero is not None]
    at = replace(each[0], scale=torch.cat([at.scale for at in each]), zero=torch.cat(zeros) if zeros else None)
    solved = solve(torch.cat([w.float() for w in weights]), factor, at)
    codes = torch.split(solved.codes, [w.shape[0] for w in weights])
    return [Quantized(part.contiguous(), qparams) for part, qparams in zip(codes, params, strict=True)]


def column_importance(gram: Tensor) -> Tensor:
    """Returns the weight of each column's squared error, float32 [in].

    It is the column's mean square activation, or the median where that is faint.
    """
    import torch

    from quarkcli.numerics.solve import dead_inputs

    seen = gram.diagonal()
    usual = seen[~dead_inputs(gram)].median()
    return torch.where(seen < FAINT * usual, usual, seen)


def searched_qparams(weight: Tensor, spec: TensorSpec, amax: Tensor | None, importance: Tensor | None) -> QParams:
    """Returns the scales of `weight` [out, in], each group's range shrunk to the least weighted error.

    amax        amax that the whole scale group shares, see `make_qparams`
    importance  weight of each column's squared error, float32 [in]; None: no search
    Scales that cover more than a row have nothing to choose from, and those of a rule or observer that searches itself
    are chosen already; both are left as the spec gives them.
    """
    import torch

    from quarkcli.numerics.quantize import QParams, decode, encode, make_qparams, tensor_amax

    if amax is None and spec.scale is not None and spec.scale.global_scale is not None:
        amax = tensor_amax(weight)  # the global scale stays as it is while groups shrink
    best = make_qparams(weight, spec, amax=amax)
    if importance is None or not _searchable(spec):
        return best
    whole = weight.float()
    least: Tensor | None = None
    for shrink in SHRINKS:
        # Only the range of a group speaks in a scale rule, so scaling the weight scales it for any format.
        params = best if shrink == 1.0 else make_qparams((whole * shrink).to(weight.dtype), spec, amax=amax)
        error = (whole - decode(encode(weight, spec, params), spec, params)).square_().mul_(importance)
        error = error.view(weight.shape[0], -1, spec.group_size or weight.shape[1]).sum(-1)
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        least = error if least is None else torch.where(better, error, least)
        if shrink != 1.0:
            scale, zero = _where(better, params.scale, best.scale), _where(better, params.zero_point, best.zero_point)
            best = QParams(scale, best.global_scale, zero)
    return best


def _searchable(spec: TensorSpec) -> bool:
    """True when every group or row has a scale of its own that nothing has chosen yet."""
    chosen = spec.observer != MIN_MAX or (spec.scale is not None and spec.scale.rule in SEARCH_RULES)
    plain = spec.then is None and not spec.format.sub_block and spec.format.kind != "cast"
    return plain and not chosen and isinstance(spec.granularity, PerGroup)


def _where(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Returns the chosen scales or zero points. Float8 is chosen by its bits: torch has no `where` for it."""
    import torch

    if new is None or old is None:
        return old
    bits = torch.uint8 if old.element_size() == 1 else old.dtype
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)


ALGORITHM = GPTQ
