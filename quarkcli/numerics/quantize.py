"""A tensor and a TensorSpec -> scales and codes, and back; fake quantization of activations.

real value = code * scale (* global scale), all in float32 whatever the dtype of the tensor. Tensors are walked in
cache-sized pieces, so a bfloat16 weight is never held as float32 as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quarkcli.errors import ConfigError, DataError
from quarkcli.numerics import scales
from quarkcli.numerics.formats import codec
from quarkcli.numerics.pieces import (
    as_matrix,
    by_group,
    group_amax,
    require_divisible,
    require_finite,
    row_pieces,
    work_pieces,
)
from quarkcli.spec import Element, PerChannel, PerGroup, PerTensor, PerTile, TensorSpec


@dataclass
class QParams:
    """Scales as stored.

    scale         float32 / float16 / bfloat16, float8_e4m3fn, or uint8 for e8m0 (exponent + 127). Shape for a matrix
                  [out, in]: PerTensor [], PerChannel(0) and PerToken [out, 1], PerGroup(g) [out, in / g],
                  PerTile(r, c) [ceil(out / r), ceil(in / c)]
    global_scale  float32 [] multiplier over `scale`, or None
    """

    scale: Tensor
    global_scale: Tensor | None = None


@dataclass
class Quantized:
    """Codes, unpacked and of the shape of the tensor, with their scales.

    codes: int8 / uint8 values for integers, uint8 bit patterns for fp4 and fp6, torch's float8 dtypes for fp8.
    """

    codes: Tensor
    params: QParams


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude of `x`, float32 []; 0 when empty. DataError naming the first non-finite position."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    matrix = as_matrix(x)
    amax = group_amax(matrix, matrix.shape[1])
    require_finite(amax, matrix)
    return amax.max()


def make_qparams(weight: Tensor, spec: TensorSpec, *, amax: Tensor | None = None) -> QParams:
    """Scales of `weight` [out, in].

    `amax` (float32 []) is that of the whole scale group, for PerTensor and for global scales; None: this tensor's own.
    ModelError when the last dimension does not hold whole groups, DataError for NaN or inf.
    """
    matrix = as_matrix(weight)
    groups = _amax(matrix, spec)
    require_finite(groups, matrix)
    return _params(groups, matrix, spec, amax)


def encode(weight: Tensor, spec: TensorSpec, params: QParams) -> Tensor:
    """Codes of a finite `weight` under `params`: nearest, ties to the even code, saturating. Same shape."""
    matrix = as_matrix(weight)
    element, size = spec.format, _size(matrix, spec)
    codec_ = codec(element)
    scale = effective_scale(params, spec, matrix.shape)
    codes = torch.empty(matrix.shape, dtype=codec_.code_dtype(element), device=weight.device)
    for part, y, scratch in work_pieces(matrix):
        _divide(matrix[part], scale[part], size, y)
        codec_.encode_(y, element, codes[part], scratch)
    return codes.view(weight.shape)


def decode(codes: Tensor, spec: TensorSpec, params: QParams) -> Tensor:
    """Real values (float32) of `codes`, same shape."""
    matrix = as_matrix(codes)
    element, size = spec.format, _size(matrix, spec)
    scale = effective_scale(params, spec, matrix.shape)
    out = torch.empty(matrix.shape, dtype=torch.float32, device=codes.device)
    for part in row_pieces(matrix):
        codec(element).decode_(matrix[part], element, out[part])
        _multiply(out[part], scale[part], size)
    return out.view(codes.shape)


def quantize(weight: Tensor, spec: TensorSpec, *, amax: Tensor | None = None) -> Quantized:
    """Codes and scales of `weight` [out, in] by rounding to nearest. Errors and `amax` as in `make_qparams`."""
    params = make_qparams(weight, spec, amax=amax)
    return Quantized(encode(weight, spec, params), params)


def dequantize(quantized: Quantized, spec: TensorSpec) -> Tensor:
    """Real values (float32) of a quantized tensor."""
    return decode(quantized.codes, spec, quantized.params)


def static_scale(amax: Tensor, spec: TensorSpec) -> Tensor:
    """The scale (float32 []) of an activation that is fixed before the model runs, from its measured amax (float32 []).

    Two-level specs: the global multiplier. Otherwise the one scale of the tensor, rounded to its stored dtype
    (`model` counts as float32, the caller knows the dtype). amax 0 gives 2^-23, 1 for a global scale.
    """
    amax = amax.to(torch.float32)
    if not bool(torch.isfinite(amax)):
        raise DataError(f"the largest activation {amax.item()} is not finite", hint="look for inf or NaN in the model")
    if spec.scale.over:
        return scales.global_scale(amax, spec.format, spec.scale.rule)
    return scales.decode_scale(scales.stored_scale(amax, spec.format, spec.scale, torch.float32, None))


def fake_quantize(x: Tensor, spec: TensorSpec, static: Tensor | None = None) -> Tensor:
    """`x` [..., features] quantized and dequantized: same shape and dtype, computed in float32.

    `static` is the value of `static_scale`; without it the scale comes from the spec's constant amax or from `x`.
    Non-finite values are not refused: NaN stays NaN, infinities saturate where the scale is static.
    """
    if x.numel() == 0:
        return x.clone()
    matrix = as_matrix(x)
    element, size = spec.format, _size(matrix, spec)
    scale = _activation_scale(matrix, spec, static)
    out = torch.empty(matrix.shape, dtype=x.dtype, device=x.device)
    for part, y, scratch in work_pieces(matrix):
        _divide(matrix[part], scale[part], size, y)
        codec(element).round_(y, element, scratch)
        _multiply(y, scale[part], size)
        out[part] = y
    return out.view(x.shape)


def effective_scale(params: QParams, spec: TensorSpec, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The real float32 multiplier of every group: [rows, groups] for a matrix of `shape` [rows, cols].

    Column j belongs to group j // group size; groups is 1 when a scale spans the row or more. Rows that share a scale
    are expanded, without memory where possible.
    """
    scale = scales.decode_scale(params.scale)
    if params.global_scale is not None:
        scale = scale * params.global_scale
    if isinstance(spec.granularity, PerTile):
        return scale.repeat_interleave(spec.granularity.rows, 0)[: shape[0]]
    return scale.expand(shape[0], 1) if scale.dim() == 0 else scale


def round_to_grid(y: Tensor, element: Element) -> Tensor:
    """Values of `element` nearest to `y` (float32, already divided by its scale): ties to the even code, saturating."""
    result: Tensor = codec(element).round_(y.clone(), element)
    return result


def encode_grid(values: Tensor, element: Element) -> Tensor:
    """Codes of float32 values on a unit scale, such as `round_to_grid` returns; any shape."""
    codec_ = codec(element)
    codes = torch.empty(values.shape, dtype=codec_.code_dtype(element), device=values.device)
    codec_.encode_(values.clone(), element, codes)
    return codes


def decode_grid(codes: Tensor, element: Element) -> Tensor:
    """Values (float32, unit scale) of codes, any shape; the inverse of `encode_grid` on grid values."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    codec(element).decode_(codes, element, out)
    return out


def _size(matrix: Tensor, spec: TensorSpec) -> int:
    """Elements per scale along the columns; checks that groups fit."""
    cols = int(matrix.shape[1])
    match spec.granularity:
        case PerGroup(size):
            require_divisible(cols, size)
            return size
        case PerTile(_, size):
            return size
        case PerChannel(axis) if axis != 0:
            raise ConfigError(f"a scale per index of axis {axis} is not supported", hint="use axis 0, the output rows")
    return cols


def _divide(rows: Tensor, scale: Tensor, size: int, out: Tensor) -> None:
    """Write `rows` divided by their scales to `out` (float32)."""
    values, divisors = by_group(out.copy_(rows), scale, size)
    values.div_(divisors)


def _multiply(rows: Tensor, scale: Tensor, size: int) -> None:
    """Multiply `rows` (float32) by their scales, in place."""
    values, factors = by_group(rows, scale, size)
    values.mul_(factors)


def _amax(matrix: Tensor, spec: TensorSpec) -> Tensor:
    """Largest magnitude per scale along the columns, for every row: float32 [rows, groups]."""
    return group_amax(matrix, _size(matrix, spec))


def _params(groups: Tensor, matrix: Tensor, spec: TensorSpec, amax: Tensor | None) -> QParams:
    """Scales from the amax of every row and group; `amax` replaces that of the whole tensor."""
    element, scale = spec.format, spec.scale
    whole = groups.max() if amax is None else amax.to(torch.float32)
    outer = None
    if scale.over:
        outer = scales.global_scale(whole, element, scale.rule)
    stored = scales.stored_scale(_per_scale(groups, whole, spec), element, scale, matrix.dtype, outer)
    return QParams(stored, outer)


def _per_scale(groups: Tensor, whole: Tensor, spec: TensorSpec) -> Tensor:
    """The amax of every stored scale, from that of every row and group and of the whole tensor."""
    match spec.granularity:
        case PerTensor():
            return whole
        case PerTile(rows, _):
            missing = -groups.shape[0] % rows
            padded = torch.nn.functional.pad(groups, (0, 0, 0, missing))
            return padded.view(-1, rows, groups.shape[1]).amax(1)
    return groups


def _activation_scale(matrix: Tensor, spec: TensorSpec, static: Tensor | None) -> Tensor:
    """Effective scale [rows, groups] of an activation."""
    outermost = spec.scale.over or spec.scale
    if static is None and outermost.constant_amax is not None:
        static = static_scale(torch.tensor(outermost.constant_amax, device=matrix.device), spec)
    if static is not None and spec.scale.over is None:
        return static.to(torch.float32).expand(matrix.shape[0], -(-matrix.shape[1] // _size(matrix, spec)))
    groups = _amax(matrix, spec)
    if static is None:
        return effective_scale(_params(groups, matrix, spec, None), spec, matrix.shape)
    stored = scales.stored_scale(_per_scale(groups, groups.max(), spec), spec.format, spec.scale, matrix.dtype, static)
    return effective_scale(QParams(stored, static), spec, matrix.shape)
