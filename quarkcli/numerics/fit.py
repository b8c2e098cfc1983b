"""Chooses the scale of every group by the output it loses: e^T H_gg e, with H_gg the group's own block of the second
moment of the inputs, or its diagonal alone.

The block is right for codes that are rounded to nearest. Before a column loop, which takes away most of what columns
have in common, the diagonal chooses better scales (`docs/algorithms.md`).

Candidates are legal stored scales: for plain scales the rule's own times a few factors (with both signs where that is
asked for), for e4m3 and e5m3 the codes near the rule's, for e8m0 the exponents beside it. The rule's own scale is among
them, so a group never gets worse. Source: ModelOpt's `local_hessian`; signs: llama.cpp, auto-round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quarkcli.numerics import scales, signs
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import QParams
from quarkcli.numerics.quantize import make_qparams, params_of, tensor_amax
from quarkcli.numerics.ranges import range_of
from quarkcli.numerics.solve import dead_inputs
from quarkcli.spec import PerGroup, TensorSpec

# A plain scale times these, then times 1 +- FINER around the best.
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6)
FINER = 0.05
# Codes below and above that of the rule: from 0.6 of the scale to about its half more.
CODES = range(-6, 6)
EXPONENTS = (-1, 1)
# Below this share of the median mean square, calibration says too little of an input to clip its weights for others.
FAINT = 1e-6
# A row of more bits has nothing to gain from another scale.
FEW_BITS = 4
# Elements of a weight that are tried at once: on a CPU their buffers stay in its cache.
_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 26


def searchable(spec: TensorSpec) -> bool:
    """True when every group, or row of few bits, has a scale of its own that nothing has chosen yet."""
    worth = isinstance(spec.granularity, PerGroup) or spec.format.bits <= FEW_BITS
    return spec.has_own_scales and not spec.searches and worth


def fitted(
    weight: Tensor, spec: TensorSpec, amax: Tensor | None, importance: Tensor, *, signed: bool = False
) -> QParams:  # fmt: skip
    """Returns the scales of `weight` [out, in], each of least lost output among its candidates.

    amax        amax that the whole scale group shares, see `make_qparams`
    importance  what an error costs: `diagonal_blocks` of the second moment, or `column_importance`
    signed      scales of integers may be negative
    Scales that cover more than a row, and those of a rule or observer that searches itself, stay as the spec says.
    """
    if amax is None and spec.is_two_level:
        amax = tensor_amax(weight)  # the global scale stays as it is while groups shrink
    own = make_qparams(weight, spec, amax=amax)
    if not searchable(spec):
        return own
    best = _Best(weight, spec, own, importance)
    for params in _candidates(weight, spec, own, amax, signed):
        best.try_(params)
    if signs.is_plain(spec) and spec.symmetric:
        middle = best.params
        for factor in (1.0 + FINER, 1.0 - FINER):
            assert middle.scale is not None
            best.try_(
                replace(middle, scale=scales.nearest_plain(middle.scale.float() * factor, spec, middle.scale.dtype))
            )
    return best.params


def column_importance(gram: Tensor) -> Tensor:
    """Returns the cost of each column's squared error, float32 [in]: its mean square activation.

    Inputs that were always zero, or next to it, count as much as the median one: their weights are not for clipping.
    """
    seen = gram.diagonal()
    live = seen[~dead_inputs(gram)]
    usual = live.median() if live.numel() else seen.new_ones(())
    return torch.where(seen < FAINT * usual, usual, seen)


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """Returns the diagonal blocks [groups, size, size] of a second moment; its diagonal is `column_importance`."""
    count = gram.shape[0] // size
    index = torch.arange(gram.shape[0], device=gram.device).view(count, size)
    blocks = gram[index[:, :, None], index[:, None, :]]
    blocks.diagonal(dim1=1, dim2=2).copy_(column_importance(gram).view(count, size))
    return blocks


def _candidates(
    weight: Tensor, spec: TensorSpec, own: QParams, amax: Tensor | None, signed: bool
) -> Iterator[QParams]:  # fmt: skip
    """Yields scales to try beside the rule's own."""
    assert spec.scale is not None and own.scale is not None
    match spec.scale.dtype:
        case "e4m3" | "e5m3":
            start = own.scale.view(torch.uint8).int()
            last = 126 if spec.scale.dtype == "e4m3" else 254
            for offset in filter(None, CODES):
                codes = (start + offset).clamp_(1, last).to(torch.uint8)
                yield replace(own, scale=codes.view(own.scale.dtype))
        case "e8m0":
            for offset in EXPONENTS:
                yield replace(own, scale=(own.scale.int() + offset).clamp_(0, 254).to(torch.uint8))
        case _:
            yield from _plain_candidates(weight, spec, own, amax, signed)


def _plain_candidates(
    weight: Tensor, spec: TensorSpec, own: QParams, amax: Tensor | None, signed: bool
) -> Iterator[QParams]:  # fmt: skip
    full = range_of(weight, spec, amax)
    whole = full.amax.max() if amax is None else amax
    for factor in FACTORS[1:]:
        yield params_of(weight, spec, full.scaled(factor), whole)
    if signed and signs.may_be_negative(spec):
        assert own.scale is not None
        # The extreme value at the lowest code, whatever its sign.
        sign = -torch.sign(_extreme(weight, full.amax.shape[1]))
        reach = full.amax / -spec.format.minimum
        for factor in FACTORS:
            yield replace(own, scale=scales.nearest_plain(sign * reach * factor, spec, own.scale.dtype))
            yield replace(own, scale=scales.nearest_plain(-sign * reach * factor, spec, own.scale.dtype))


def _extreme(weight: Tensor, groups: int) -> Tensor:
    """Returns the value of largest magnitude of every group, float32 [rows, groups]."""
    runs = weight.view(weight.shape[0], groups, -1)
    at = runs.abs().argmax(-1, keepdim=True)
    return runs.gather(-1, at).squeeze(-1).float()


class _Best:
    """The best scales so far, by group, with what they lose."""

    def __init__(self, weight: Tensor, spec: TensorSpec, own: QParams, importance: Tensor) -> None:
        self.weight, self.spec, self.importance = weight, spec, importance
        self.params = own
        self.least = self._lost(own)

    def try_(self, params: QParams) -> None:
        lost = self._lost(params)
        better = lost < self.least
        self.least = torch.where(better, lost, self.least)
        zero = _where(better, params.zero_point, self.params.zero_point)
        self.params = replace(self.params, scale=_where(better, params.scale, self.params.scale), zero_point=zero)

    def _lost(self, params: QParams) -> Tensor:
        """Returns the lost output of every row and group, float32 [rows, groups]."""
        scale = self._real(params).unsqueeze(-1)
        rows, count, _ = scale.shape
        zero = None if params.zero_point is None else params.zero_point.unsqueeze(-1)
        out = torch.empty(rows, count, dtype=torch.float32, device=self.weight.device)
        limit = _CHUNK if self.weight.device.type == "cpu" else _DEVICE_CHUNK
        step = max(1, limit // self.weight.shape[1])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values = self.weight[part].float().view(-1, count, self.weight.shape[1] // count)
            error = values / scale[part]
            codec(self.spec.format).round_(error, self.spec.format, None, None if zero is None else zero[part])
            error.mul_(scale[part]).sub_(values)
            out[part] = _cost(error, self.importance)
        return out

    def _real(self, params: QParams) -> Tensor:
        assert params.scale is not None and self.spec.scale is not None
        scale = scales.decode_scale(params.scale, self.spec.scale.dtype)
        return scale if params.global_scale is None else scale * params.global_scale


def _cost(error: Tensor, importance: Tensor) -> Tensor:
    """Returns the cost of errors [rows, groups, size], as [rows, groups]."""
    if importance.dim() == 1:
        return error.square_().mul_(importance.view(error.shape[1:])).sum(-1)
    across = error.transpose(0, 1)
    return (torch.bmm(across, importance) * across).sum(-1).t()


def _where(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Returns the chosen scales or zero points. Float8 is chosen by its bits: torch has no `where` for it."""
    if new is None or old is None:
        return old
    bits = torch.uint8 if old.element_size() == 1 else old.dtype
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)
