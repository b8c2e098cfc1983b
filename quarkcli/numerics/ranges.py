"""Finds the range of the values behind every scale of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quarkcli.numerics.chunks import as_matrix, group_amax, group_ends, require_finite, row_chunks
from quarkcli.numerics.grid import scale_size
from quarkcli.numerics.scales import Range
from quarkcli.spec import MIN_MAX, PerChannel, PerTensor, PerTile, TensorSpec


def range_of(matrix: Tensor, spec: TensorSpec, amax: Tensor | None, *, finite: bool = True) -> Range:
    """Returns the range behind every scale of `matrix` [rows, cols], in the shape of the stored scale (see QParams).

    amax     that of the scale group (float32 []), for one scale per tensor; None: the matrix' own
    finite   refuse NaN and inf: DataError with their first position
    """
    if amax is not None and isinstance(spec.granularity, PerTensor):
        if finite:
            require_finite(amax_per_row(matrix), matrix)
        amax = amax.to(torch.float32)
        return Range(amax, -amax, amax)
    size = scale_size(spec, matrix.shape[1])
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis == 1:
        if finite:
            require_finite(amax_per_row(matrix), matrix)
        return _columns(matrix)
    if not needs_ends(spec):
        magnitudes = group_amax(matrix, size)
        if finite:
            require_finite(magnitudes, matrix)
        return Range(_joined(magnitudes, spec, torch.amax))
    low, high = group_ends(matrix, size)
    if finite:
        require_finite(torch.maximum(-low, high), matrix)
    low, high = _joined(low, spec, torch.amin), _joined(high, spec, torch.amax)
    return Range(torch.maximum(-low, high), low, high)


def known_range(weight: Tensor, spec: TensorSpec) -> Tensor | None:
    """Returns the largest magnitudes behind the scales of `weight` [out, in], in its dtype: `quantize` takes them.

    None where a scale depends on more than that. Raises DataError as `range_of` does.
    """
    if spec.observer != MIN_MAX or spec.then is not None or needs_ends(spec) or spec.format.sub_block:
        return None
    return range_of(as_matrix(weight), spec, None).amax.to(weight.dtype)


def known_range_of(known: Tensor, spec: TensorSpec, amax: Tensor | None) -> Range:
    """Returns what `range_of` would, of a weight with this `known_range`."""
    if amax is None or not isinstance(spec.granularity, PerTensor):
        return Range(known.float())
    amax = amax.to(torch.float32)
    return Range(amax, -amax, amax)


def needs_ends(spec: TensorSpec) -> bool:
    """True when a scale depends on both ends of the range, not only on the largest magnitude."""
    return not spec.symmetric or (spec.scale is not None and spec.scale.rule == "fit")


def amax_per_row(matrix: Tensor) -> Tensor:
    """Returns float32 [rows, 1]; NaN where a row holds one."""
    return group_amax(matrix, max(matrix.shape[1], 1))


def _joined(groups: Tensor, spec: TensorSpec, reduce: object) -> Tensor:
    """Reduces the values of every row and group to one per stored scale."""
    call = torch.amax if reduce is torch.amax else torch.amin
    match spec.granularity:
        case PerTensor():
            return call(groups)
        case PerTile(rows, _):
            missing = -groups.shape[0] % rows
            padded = functional.pad(groups[None, None], (0, 0, 0, missing), mode="replicate")[0, 0]
            return call(padded.view(-1, rows, groups.shape[1]), 1)
    return groups


def _columns(matrix: Tensor) -> Range:
    """Returns one range per column, [1, cols]."""
    low = high = None
    for part in row_chunks(matrix):
        values = matrix[part].float()
        own_low, own_high = values.amin(0, keepdim=True), values.amax(0, keepdim=True)
        low = own_low if low is None else torch.minimum(low, own_low)
        high = own_high if high is None else torch.maximum(high, own_high)
    assert low is not None and high is not None
    return Range(torch.maximum(-low, high), low, high)
