"""GPTQ (arXiv 2210.17323): round column by column and let the columns not yet rounded make up for the error.

Scales are fixed beforehand from the source weights (static groups), so the stored layout does not change; with
`act_order` the columns with the largest activations are rounded first. `scale_search` shrinks each group's amax by the
factor of `SHRINKS` that leaves the least rounding error, every column weighted by its mean square activation. Of
inputs that were zero in calibration nothing is known: their weights are rounded to nearest, and count as much as those
of an ordinary input when a scale is searched. The solver asks the format for scales and codes and assumes nothing
about integers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quarkcli.algorithms.base import PartWork, same_spec, weight_sites
from quarkcli.errors import ConfigError
from quarkcli.plan.model import Plan, Target
from quarkcli.spec import MIN_MAX, SEARCH_RULES, PerGroup, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.calibration.statistics import Statistics
    from quarkcli.numerics.quantize import QParams


SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Below this share of the median mean square, calibration says too little of an input to clip its weights for others.
FAINT = 1e-6


class GPTQ:
    """damp: ridge as a share of the mean diagonal; act_order: largest activations first; scale_search: see above."""

    name: ClassVar[str] = "gptq"
    kind: ClassVar[Literal["transform", "solver"]] = "solver"
    parameters: ClassVar[dict[str, Any]] = {"damp": 0.01, "act_order": True, "scale_search": True}

    def __init__(self, damp: float, act_order: bool, scale_search: bool) -> None:
        if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 < damp < 1:
            raise ConfigError(f"gptq damp must lie between 0 and 1, not {damp!r}", where="algorithm")
        for name, value in (("act_order", act_order), ("scale_search", scale_search)):
            if not isinstance(value, bool):
                raise ConfigError(f"gptq {name} must be true or false, not {value!r}", where="algorithm")
        self.damp = float(damp)
        self.act_order = act_order
        self.scale_search = scale_search

    def needs(self, plan: Plan) -> dict[str, set[str]]:
        return {target.site: {"gram"} for target in plan.quantized() if target.site is not None}

    def check(self, plan: Plan) -> None:
        return None

    def apply(self, work: PartWork, statistics: Statistics | None) -> None:
        solved: set[str] = set()
        for site, readers in weight_sites(work.targets).items():
            assert statistics is not None  # none where nothing is read by a matrix: embeddings
            for expert, members in _by_expert(readers).items():
                gram, tokens = statistics.gram(site, expert)
                for target in self._solve(work, members, gram, tokens):
                    solved.add(target.name)
        _round(work, [target for target in work.targets if target.name not in solved])

    def _solve(self, work: PartWork, members: list[Target], gram: Tensor | None, tokens: int) -> list[Target]:
        """Solve weights that read the same activation. Returns those done; the rest is rounded, and said."""
        from quarkcli.numerics.solve import dead_inputs, factorize

        if gram is None:
            work.warn(f"{members[0].name}: no calibration token; rounded to nearest instead of gptq")
            return []
        dead = dead_inputs(gram)
        if bool(dead.any()):
            work.dead_inputs.update({target.name: int(dead.sum()) for target in members})
        if bool(dead.all()):
            return []
        factor = factorize(gram, damp=self.damp, act_order=self.act_order)
        if factor is None:
            work.warn(f"{members[0].name}: second moment of {tokens} tokens cannot be factorized; rounded to nearest")
            return []
        for same in same_spec(members).values():
            self._solve_together(work, same, factor, column_importance(gram) if self.scale_search else None)
        return members

    def _solve_together(self, work: PartWork, members: list[Target], factor: Any, importance: Tensor | None) -> None:
        """Rows are independent, so weights with one spec and one activation are one problem."""
        import torch

        from quarkcli.numerics.quantize import Quantized, lattice
        from quarkcli.numerics.solve import solve

        spec = members[0].weight
        assert spec is not None
        weights = [work.weight(target) for target in members]
        params = [searched_qparams(w, spec, work.amax(t), importance) for w, t in zip(weights, members, strict=True)]
        each = [lattice(p, spec, w.shape) for p, w in zip(params, weights, strict=True)]
        zeros = [at.zero for at in each if at.zero is not None]
        at = replace(each[0], scale=torch.cat([at.scale for at in each]), zero=torch.cat(zeros) if zeros else None)
        solved = solve(torch.cat([w.float() for w in weights]), factor, at)
        codes = torch.split(solved.codes, [w.shape[0] for w in weights])
        for target, part, qparams in zip(members, codes, params, strict=True):
            work.losses[target.name] = solved.loss
            work.finish(target, Quantized(part.contiguous(), qparams))


def column_importance(gram: Tensor) -> Tensor:
    """Weight of each column's squared error, float32 [in]: its mean square activation, the median where it is faint."""
    import torch

    from quarkcli.numerics.solve import dead_inputs

    seen = gram.diagonal()
    usual = seen[~dead_inputs(gram)].median()
    return torch.where(seen < FAINT * usual, usual, seen)


def searched_qparams(weight: Tensor, spec: TensorSpec, amax: Tensor | None, importance: Tensor | None) -> QParams:
    """Scales of `weight` [out, in], each group's range shrunk to the least weighted error.

    amax        amax that the whole scale group shares, see `make_qparams`
    importance  weight of each column's squared error, float32 [in]; None: no search
    Scales that cover more than a row have nothing to choose from, and those of a rule or observer that searches itself
    are chosen already; both are left as the spec gives them.
    """
    import torch

    from quarkcli.numerics.quantize import QParams, decode, encode, make_qparams, tensor_amax

    if amax is None and spec.scale is not None and spec.scale.over is not None:
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
    """Chosen scales or zero points; float8 is chosen by its bits, torch has no `where` for it."""
    import torch

    if new is None or old is None:
        return old
    bits = torch.uint8 if old.element_size() == 1 else old.dtype
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)


def _by_expert(targets: list[Target]) -> dict[int | None, list[Target]]:
    out: dict[int | None, list[Target]] = {}
    for target in targets:
        out.setdefault(target.expert[1] if target.expert else None, []).append(target)
    return out


def _round(work: PartWork, targets: list[Target]) -> None:
    from quarkcli.numerics.packed import quantize

    for target in targets:
        assert target.weight is not None
        work.finish(target, quantize(work.weight(target), target.weight, amax=work.amax(target)))


ALGORITHM = GPTQ
