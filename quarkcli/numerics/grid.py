"""Turns stored scales into the grid of a matrix, and values on that grid into codes and back.

A matrix is walked in cache-sized chunks, so that a bfloat16 weight is never held as float32 as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quarkcli.numerics import scales
from quarkcli.numerics.chunks import by_group, require_divisible, row_chunks, work_chunks
from quarkcli.numerics.formats import codec
from quarkcli.spec import Element, PerChannel, PerGroup, PerTensor, PerTile, TensorSpec

# Under a larger scale no float32 subnormal reaches half a step of any element.
_SEES_SUBNORMALS = 2.0**-100


@dataclass
class QParams:
    """Scales as stored, of one stage.

    scale         float32 / float16 / bfloat16, float8_e4m3fn, or uint8 for e8m0 (exponent + 127) and e5m3; None for an
                  element without a scale. Shape for a matrix [out, in]: PerTensor [], PerChannel(0) and PerToken
                  [out, 1], PerChannel(1) [1, in], PerGroup(g) [out, in / g], PerTile(r, c) [ceil(out/r), ceil(in/c)]
    global_scale  float32 [] multiplier over `scale`, or None; [out, 1] of matrices above each other
    zero_point    of the shape of `scale`: codes in the element's dtype, or float32
    shift         uint8 [out, in / sub_block], the shift bits of mx6 and mx9
    then          those of the second stage of a chain
    """

    scale: Tensor | None
    global_scale: Tensor | None = None
    zero_point: Tensor | None = None
    shift: Tensor | None = None
    then: QParams | None = None

    def rows(self, index: slice, count: int) -> QParams:
        """Returns the parameters of some rows of a matrix of `count` rows; what several rows share stays whole."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return tensor[index] if tensor is not None and tensor.shape[:1] == (count,) else tensor

        then = self.then.rows(index, count) if self.then is not None else None
        return QParams(cut(self.scale), cut(self.global_scale), cut(self.zero_point), cut(self.shift), then)


@dataclass(frozen=True)
class Grid:
    """The values a matrix [rows, cols] can take: (code - zero) * scale.

    scale   float32 [rows, n]; column j belongs to entry j // size
    zero    broadcasts like `scale`, or None
    """

    element: Element
    scale: Tensor
    size: int
    zero: Tensor | None = None


def effective_scale(params: QParams, spec: TensorSpec, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns the real float32 multiplier of every group: [rows, n] for a matrix of `shape` [rows, cols], of one stage.

    Column j belongs to entry j // `scale_size`; rows that share a scale are expanded, without memory where possible.
    """
    if params.scale is None or spec.scale is None:
        return torch.ones(1, 1).expand(shape[0], 1)
    scale = scales.decode_scale(params.scale, spec.scale.dtype)
    if params.global_scale is not None:
        scale = scale * params.global_scale
    if params.shift is not None:
        shift = params.shift.view(shape[0], scale.shape[1], -1).bool()
        return torch.where(shift, (scale * 0.5).unsqueeze(-1), scale.unsqueeze(-1)).flatten(1)
    return per_row(scale, spec, shape)


def per_row(stored: Tensor, spec: TensorSpec, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns a tensor of one value per stored scale as [rows, n]."""
    if isinstance(spec.granularity, PerTile):
        return stored.repeat_interleave(spec.granularity.rows, 0)[: shape[0]]
    return stored.expand(shape[0], stored.shape[-1] if stored.dim() else 1)


def scale_size(spec: TensorSpec, cols: int) -> int:
    """Returns the number of columns that one stored scale spans. It checks that groups fit."""
    match spec.granularity:
        case PerGroup(size):
            require_divisible(cols, size)
            return size
        case PerTile(_, size):
            return size
        case PerChannel(1):
            return 1
    return max(cols, 1)


def grid(params: QParams, spec: TensorSpec, shape: torch.Size | tuple[int, ...]) -> Grid:
    """Returns the grid of the stored codes of a matrix of `shape` [rows, cols].

    For a chain, the grid is that of the stage whose codes are stored. A first stage below it contributes its scale,
    but not the rounding of its own codes.
    """
    stage, own = spec, params
    below: Tensor | None = None
    if spec.codes is not spec and spec.then is not None and params.then is not None:
        below = effective_scale(params, spec, shape)
        stage, own = spec.then, params.then
    size = stage.format.sub_block or scale_size(stage, shape[1])
    scale = effective_scale(own, stage, shape)
    zero = None if own.zero_point is None else per_row(own.zero_point, stage, shape)
    return Grid(stage.format, scale if below is None else scale * below, size, zero)


def encode_matrix(matrix: Tensor, at: Grid) -> Tensor:
    """Returns codes of a finite matrix, of its shape."""
    codec_ = codec(at.element)
    codes = torch.empty(matrix.shape, dtype=codec_.code_dtype(at.element), device=matrix.device)
    for part, y, scratch in work_chunks(matrix):
        _divide(matrix[part], at, part, y)
        values, zero = _with_zero(y, at, part)
        codec_.encode_(values, at.element, codes[part].view_as(values), scratch, zero)
    return codes


def decode_matrix(codes: Tensor, at: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns values of codes, of their shape: computed in float32, rounded to `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part, y in _float_rows(out):
        values, zero = _with_zero(y, at, part)
        codec(at.element).decode_(codes[part].view_as(values), at.element, values, zero)
        _multiply(y, at, part)
        if y.dtype != dtype:
            out[part] = y
    return out


def _float_rows(out: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields chunks of rows of `out` with float32 memory for their values: the rows themselves where they are that."""
    if out.dtype == torch.float32:
        yield from ((part, out[part]) for part in row_chunks(out))
    else:
        yield from ((part, y) for part, y, _ in work_chunks(out))


def round_matrix(matrix: Tensor, at: Grid, dtype: torch.dtype) -> Tensor:
    """Returns the nearest values of the grid, in `dtype`: quantized and dequantized."""
    out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for part, y, scratch in work_chunks(matrix):
        _divide(matrix[part], at, part, y)
        values, zero = _with_zero(y, at, part)
        codec(at.element).round_(values, at.element, scratch, zero)
        _multiply(y, at, part)
        out[part] = y
    return out


def multiply_(rows: Tensor, scale: Tensor, size: int) -> None:
    """Multiplies `rows` (float32 [n, cols]) by their scales [n, groups], in place."""
    values, factors = by_group(rows, scale, size)
    values.mul_(factors)


def _multiply(values: Tensor, at: Grid, part: slice) -> None:
    """Multiplies values of some rows by their scales, in place; a cast has none."""
    if at.element.kind != "cast":
        multiply_(values, at.scale[part], at.size)


def _divide(rows: Tensor, at: Grid, part: slice, out: Tensor) -> None:
    """Writes `rows` divided by their scales to `out` (float32)."""
    out.copy_(rows)
    if at.element.kind == "cast":
        return
    values, divisors = by_group(out, at.scale[part], at.size)
    if at.element.sub_block and bool((divisors < _SEES_SUBNORMALS).any()):  # these formats know no float32 subnormals
        values.masked_fill_(values.abs() < torch.finfo(torch.float32).tiny, 0.0)
    values.div_(divisors)


def _with_zero(y: Tensor, at: Grid, part: slice) -> tuple[Tensor, Tensor | None]:
    """Returns `y` [n, cols] shaped so that its zero points broadcast against it, and these."""
    return (y, None) if at.zero is None else by_group(y, at.zero[part], at.size)


def without_chain(spec: TensorSpec) -> TensorSpec:
    """Returns the spec of the first stage alone."""
    return replace(spec, then=None, stored="first")


def is_whole(spec: TensorSpec) -> bool:
    """True when one scale covers the tensor."""
    return isinstance(spec.granularity, PerTensor)
