"""Searches without data: it clips ranges for less error, and chooses block scales among all e4m3 codes.

Sources: shrink search as in GPTQ-style tools; four over six (arXiv 2512.02010); the exhaustive sweep of e4m3 block
scales (arXiv 2606.07618).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from quarkcli.errors import ConfigError
from quarkcli.numerics import scales
from quarkcli.numerics.chunks import group_amax
from quarkcli.numerics.grid import QParams, decode_matrix, encode_matrix, grid, scale_size
from quarkcli.numerics.scales import Range
from quarkcli.spec import E4M3_MAX, MIN_MAX, PerChannel, PerTensor, PerTile, TensorSpec

# Positive finite codes of e4m3.
_FIRST_CODE, _LAST_CODE = 1, 126
# How many codes the sweep looks below and above that of absmax. A scale whose half still covers amax is never better
# than the half, whose grid holds its own: one binade, 8 codes, above would do, were it not for the odd codes up to 15,
# which have no half. Below, amax itself is clipped; a block's error at absmax is at most 15 / 36 amax^2, so a scale
# under 0.354 of it already clips more: 14 codes.
_BELOW, _ABOVE = 14, 14


def clipped(matrix: Tensor, spec: TensorSpec, range_: Range, amax: Tensor | None = None) -> Range:
    """Returns the ranges that the spec's observer keeps of the full ones.

    `amax` (float32 []) is that of the whole scale group, for a global scale; None: the matrix' own.
    """
    if spec.observer == MIN_MAX:
        return range_
    parameters = dict(spec.observer.parameters)
    if spec.observer.name == "percentile":
        return _percentile(matrix, spec, range_, parameters["percentile"])
    if spec.observer.name == "mse":
        outer = None
        if spec.scale is not None and spec.scale.global_scale is not None:
            outer = scales.global_scale(range_.amax.max() if amax is None else amax, spec.format, spec.scale)
        return _least_error(matrix, spec, range_, outer, int(parameters["steps"]), parameters["shrink"])
    raise ConfigError(
        f"observer '{spec.observer.name}' works only for activations",
        hint="use mse or percentile",
        kind="E-OBSERVER",
    )


def best_codes(matrix: Tensor, spec: TensorSpec, params: QParams) -> QParams:
    """Returns the block scales of least error where the rule asks for a search; `params` are those of absmax."""
    assert spec.scale is not None and params.scale is not None
    if spec.scale.rule == "sweep":
        return _sweep(matrix, spec, params)
    if spec.scale.rule == "four_over_six":
        return _four_over_six(matrix, spec, params)
    return params


def squared_error(matrix: Tensor, spec: TensorSpec, params: QParams) -> Tensor:
    """Returns the sum of squared errors behind every stored scale of one stage, float32, shaped like the scale."""
    at = grid(params, spec, matrix.shape)
    error = (decode_matrix(encode_matrix(matrix, at), at) - matrix.float()).square_()
    return _summed(error, spec)


def _summed(values: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the sum of `values` [rows, cols] behind every stored scale."""
    rows, cols = values.shape
    match spec.granularity:
        case PerTensor():
            return values.sum()
        case PerChannel(1):
            return values.sum(0, keepdim=True)
    size = scale_size(spec, cols)
    groups = -(-cols // size)
    padded = torch.nn.functional.pad(values, (0, groups * size - cols))
    sums = padded.view(rows, groups, size).sum(-1)
    if isinstance(spec.granularity, PerTile):
        sums = torch.nn.functional.pad(sums, (0, 0, 0, -rows % spec.granularity.rows))
        return sums.view(-1, spec.granularity.rows, groups).sum(1)
    return sums


def _least_error(
    matrix: Tensor, spec: TensorSpec, range_: Range, outer: Tensor | None, steps: int, shrink: float
) -> Range:
    """Returns every range shrunk by the factor of least squared error, of `steps` from 1 down to `shrink`.

    Among equal errors the larger range.
    """
    best, least = torch.ones_like(range_.amax), None
    for step in range(steps):
        factor = 1.0 - (1.0 - shrink) * step / max(steps - 1, 1)
        error = squared_error(matrix, spec, _params(matrix, spec, range_.scaled(factor), outer))
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        least = error if least is None else torch.minimum(least, error)
        best = torch.where(better, factor, best)
    ends = (None, None) if range_.low is None or range_.high is None else (range_.low * best, range_.high * best)
    return Range(range_.amax * best, *ends)


def _params(matrix: Tensor, spec: TensorSpec, range_: Range, outer: Tensor | None) -> QParams:
    assert spec.scale is not None
    stored = scales.stored_scale(range_, spec, matrix.dtype, outer)
    return QParams(stored, outer, scales.zero_points(range_, scales.decode_scale(stored, spec.scale.dtype), spec))


def _percentile(matrix: Tensor, spec: TensorSpec, range_: Range, percentile: float) -> Range:
    """Returns ranges with `percentile` per cent of the values (magnitudes when symmetric), by nearest rank."""
    if isinstance(spec.granularity, PerTile):
        raise ConfigError("observer 'percentile' does not work with tiles", hint="use mse", kind="E-OBSERVER")
    if spec.symmetric:
        return Range(_rank(matrix.abs(), spec, percentile, range_.amax))
    low, high = -_rank(-matrix, spec, percentile, range_.amax), _rank(matrix, spec, percentile, range_.amax)
    return Range(torch.maximum(-low, high), low, high)


def _rank(values: Tensor, spec: TensorSpec, percentile: float, like: Tensor) -> Tensor:
    """Returns the value that `percentile` per cent of those behind each scale do not exceed."""
    if isinstance(spec.granularity, PerTensor):
        runs = values.reshape(1, -1)
    elif spec.granularity == PerChannel(1):
        runs = values.t()
    else:
        runs = values.reshape(-1, scale_size(spec, values.shape[1]))
    return runs.float().kthvalue(nearest_rank(percentile, runs.shape[1]), -1).values.view(like.shape)


def nearest_rank(percentile: float, count: int) -> int:
    """Returns the rank of the least of `count` values that so many per cent do not exceed, without rounding."""
    return max(1, ceil(Fraction(str(percentile)) * count / 100))


# --- block scales under a global one ---------------------------------------------------------------------------------


def _block_errors(matrix: Tensor, spec: TensorSpec, params: QParams, codes: Tensor) -> Tensor:
    scale = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    return squared_error(matrix, spec, replace(params, scale=scale))


def _sweep(matrix: Tensor, spec: TensorSpec, params: QParams) -> QParams:
    """Returns the e4m3 code of least squared error for every block; among equal errors the larger scale.

    Only codes that can be optimal are tried, see `_ABOVE`; the result has the least error of all 126.
    """
    assert params.scale is not None
    start = params.scale.view(torch.uint8).int()
    best = start.clone()
    least: Tensor | None = None
    for offset in range(_ABOVE, -_BELOW - 1, -1):
        codes = (start + offset).clamp_(_FIRST_CODE, _LAST_CODE)
        error = _block_errors(matrix, spec, params, codes)
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        least = error if least is None else torch.where(better, error, least)
        best = torch.where(better, codes, best)
    return _keeping_zero_blocks(matrix, spec, params, best)


def _four_over_six(matrix: Tensor, spec: TensorSpec, params: QParams) -> QParams:
    """Maps amax to 6 or, with 1.5 times the scale, to 4, whichever errs less; among equals to 4, the larger scale."""
    assert params.scale is not None
    larger = (params.scale.float() * 1.5).clamp_(scales.E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
    six, four = params.scale.view(torch.uint8).int(), larger.view(torch.uint8).int()
    better = _block_errors(matrix, spec, params, four) <= _block_errors(matrix, spec, params, six)
    return _keeping_zero_blocks(matrix, spec, params, torch.where(better, four, six))


def _keeping_zero_blocks(matrix: Tensor, spec: TensorSpec, params: QParams, codes: Tensor) -> QParams:
    """Keeps the scale of the rule for all-zero blocks, which have no best scale."""
    assert params.scale is not None
    zero = group_amax(matrix, scale_size(spec, matrix.shape[1])) == 0
    chosen = torch.where(zero, params.scale.view(torch.uint8), codes.to(torch.uint8))
    return replace(params, scale=chosen.view(torch.float8_e4m3fn))
