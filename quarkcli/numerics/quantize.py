"""Turns a tensor into scales and codes, and back, and fake-quantizes activations.

real value = (code - zero point) * scale (* global scale), all in float32 whatever the dtype of the tensor. A chain
quantizes what its first stage gives once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import ConfigError, DataError
from quarkcli.numerics import kernels, scales, search
from quarkcli.numerics.chunks import as_matrix, group_amax, require_finite
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import (
    Grid,
    QParams,
    decode_matrix,
    effective_scale,
    encode_matrix,
    grid,
    is_whole,
    multiply_,
    round_matrix,
    scale_size,
    without_chain,
)
from quarkcli.numerics.packing import pack_bits
from quarkcli.numerics.ranges import amax_per_row, known_range_of, range_of
from quarkcli.numerics.scales import Range
from quarkcli.spec import Element, TensorSpec

__all__ = [
    "Grid", "QParams", "Quantized", "decode", "decode_grid", "dequantize", "effective_scale", "encode",
    "encode_grid", "fake_quantize", "grid", "make_qparams", "quantize", "round_to_grid", "static_scale",
    "tensor_amax",
]  # fmt: skip


@dataclass
class Quantized:
    """Codes, unpacked and of the shape of the tensor, with their scales.

    codes: int8 / uint8 values for integers, uint8 bit patterns for fp4 and fp6, torch's own dtypes for fp8 and casts.
    order: the column of the tensor that each column of the codes is, None where they are in the tensor's order: groups
    of stored weights may be of columns that lie apart
    """

    codes: Tensor
    params: QParams
    order: Tensor | None = None

    def stream(self, bits: int) -> Tensor:
        """Returns the codes of `bits` bits as `packing.pack_bits` packs them."""
        return pack_bits(self.codes, bits)

    def some(self, rows: slice) -> Quantized:
        """Returns some rows of a matrix."""
        return Quantized(self.codes[rows], self.params.rows(rows, self.codes.shape[0]), self.order)

    def values(self, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
        """Returns real values in the order of the codes: computed in float32, rounded to `dtype`."""
        return decode(self.codes, spec, self.params, dtype)


def tensor_amax(x: Tensor) -> Tensor:
    """Returns the largest magnitude of `x`, float32 []; 0 when empty.

    Raises DataError that names the first non-finite position.
    """
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    matrix = as_matrix(x)
    amax = group_amax(matrix, matrix.shape[1])
    require_finite(amax, matrix)
    return amax.max()


def make_qparams(
    weight: Tensor, spec: TensorSpec, *, amax: Tensor | None = None, known: Tensor | None = None
) -> QParams:
    """Returns scales and zero points of `weight` [out, in].

    `amax` (float32 []) is that of the whole scale group, for PerTensor and for global scales; None: this tensor's own.
    `known` is what `known_range` returned for it, so that the weight is not read again.
    ModelError when the last dimension does not hold whole groups, DataError for NaN or inf.
    """
    matrix = as_matrix(weight)
    first = _stage_params(matrix, without_chain(spec), amax, known)
    if spec.then is None:
        return first
    shared = None if amax is None or not is_whole(spec.then) else _reach(amax, spec)
    first.then = _stage_params(_handed_on(matrix, spec, first), spec.then, shared)
    return first


def encode(weight: Tensor, spec: TensorSpec, params: QParams) -> Tensor:
    """Returns codes of a finite `weight` under `params`: nearest, ties to the even code, saturating. Same shape."""
    matrix = as_matrix(weight)
    if spec.codes is spec:
        return encode_matrix(matrix, grid(params, without_chain(spec), matrix.shape)).view(weight.shape)
    assert spec.then is not None and params.then is not None
    values = _handed_on(matrix, spec, params)
    return encode_matrix(values, grid(params.then, spec.then, matrix.shape)).view(weight.shape)


def decode(codes: Tensor, spec: TensorSpec, params: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns real values of `codes`, same shape: computed in float32, rounded to `dtype`."""
    matrix = as_matrix(codes)
    first = without_chain(spec)
    if spec.then is None or params.then is None:
        return decode_matrix(matrix, grid(params, first, matrix.shape), dtype).view(codes.shape)
    second = grid(params.then, spec.then, matrix.shape)
    if spec.codes is spec:  # what the second stage makes of the values is what a server multiplies with
        values = decode_matrix(matrix, grid(params, first, matrix.shape))
        return round_matrix(values, second, dtype).view(codes.shape)
    values = decode_matrix(matrix, second)
    multiply_(values, effective_scale(params, first, matrix.shape), scale_size(first, matrix.shape[1]))
    return values.view(codes.shape).to(dtype)


def quantize(weight: Tensor, spec: TensorSpec, *, amax: Tensor | None = None, known: Tensor | None = None) -> Quantized:
    """Returns codes and scales of `weight` [out, in] by rounding to nearest. Arguments as in `make_qparams`."""
    params = make_qparams(weight, spec, amax=amax, known=known)
    return Quantized(encode(weight, spec, params), params)


def dequantize(quantized: Quantized, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns real values of a quantized tensor: computed in float32, rounded to `dtype`."""
    values = quantized.values(spec, dtype)
    if quantized.order is None:
        return values
    back = torch.empty_like(values)
    back[:, quantized.order] = values
    return back


def static_scale(amax: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the fixed scale (float32 []) of an activation from its measured amax (float32 []).

    Two-level specs: the global multiplier. Otherwise the one scale of the tensor, rounded to its stored dtype
    (`model` counts as float32, the caller knows the dtype). amax 0 gives 2^-23, 1 for a global scale.
    """
    assert spec.scale is not None
    amax = amax.to(torch.float32)
    if not bool(torch.isfinite(amax)):
        raise DataError(
            f"the largest activation {amax.item()} is not finite",
            hint="look for inf or NaN in the model",
            kind="E-NONFINITE-ACTIVATION",
        )
    if spec.scale.global_scale:
        return scales.global_scale(amax, spec.format, spec.scale)
    return scales.decode_scale(scales.stored_scale(Range(amax), spec, torch.float32, None), spec.scale.dtype)


def fake_quantize(x: Tensor, spec: TensorSpec, static: Tensor | None = None) -> Tensor:
    """Returns `x` [..., features] quantized and dequantized: same shape and dtype, computed in float32.

    `static` is the value of `static_scale`, for the stages that are static; without it the scale comes from the spec's
    constant amax or from `x`. The stages of a chain follow one another.
    Non-finite values are not refused: NaN stays NaN, infinities saturate where the scale is static.
    Gradients pass straight through to `x`, as if nothing were rounded.
    """
    if x.requires_grad and torch.is_grad_enabled():
        passed: Tensor = _StraightThrough.apply(x, spec, static)
        return passed
    if x.numel() == 0:
        return x.clone()
    matrix = as_matrix(x)
    for stage in spec.stages:
        stage = without_chain(stage)
        own = static if stage.is_static else None
        kernel = kernels.find(stage, x.device)
        if kernel is not None:
            matrix = kernel.fake_quantize(matrix, stage, own)
            continue
        matrix = round_matrix(matrix, grid(_activation_params(matrix, stage, own), stage, matrix.shape), x.dtype)
    return matrix.view(x.shape)


class _StraightThrough(torch.autograd.Function):
    """`fake_quantize` with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: TensorSpec, static: Tensor | None) -> Tensor:
        return fake_quantize(x.detach(), spec, static)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def round_to_grid(y: Tensor, element: Element) -> Tensor:
    """Returns values of `element` nearest to `y` (float32, already divided by its scale).

    Ties go to the even code, and values saturate.
    """
    result: Tensor = codec(element).round_(y.clone(), element)
    return result


def encode_grid(values: Tensor, element: Element) -> Tensor:
    """Returns codes of float32 values on a unit scale, such as `round_to_grid` returns; any shape."""
    codec_ = codec(element)
    codes = torch.empty(values.shape, dtype=codec_.code_dtype(element), device=values.device)
    codec_.encode_(values.clone(), element, codes)
    return codes


def decode_grid(codes: Tensor, element: Element) -> Tensor:
    """Returns values (float32, unit scale) of codes, any shape; the inverse of `encode_grid` on grid values."""
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    codec(element).decode_(codes, element, out)
    return out


# --- one stage -------------------------------------------------------------------------------------------------------


def _stage_params(matrix: Tensor, spec: TensorSpec, amax: Tensor | None, known: Tensor | None = None) -> QParams:
    """Returns scales of one stage, searched where its rule or its observer says so."""
    if spec.scale is None:
        require_finite(amax_per_row(matrix), matrix)
        return QParams(None)
    full = range_of(matrix, spec, amax) if known is None else known_range_of(known, spec, amax)
    whole = _largest(full) if amax is None else amax.to(torch.float32)
    if amax is None or not is_whole(spec):  # else the scale group fixes the range
        full = search.clipped(matrix, spec, full, whole)
    return search.best_codes(matrix, spec, params_of(matrix, spec, full, whole))


def params_of(matrix: Tensor, spec: TensorSpec, range_: Range, amax: Tensor) -> QParams:
    """Returns stored scales of ranges; `amax` is that of the whole scale group, for a global scale."""
    assert spec.scale is not None
    outer = scales.global_scale(amax, spec.format, spec.scale) if spec.scale.global_scale is not None else None
    stored = scales.stored_scale(range_, spec, matrix.dtype, outer)
    zero = scales.zero_points(range_, scales.decode_scale(stored, spec.scale.dtype), spec)
    shift = None
    if spec.format.sub_block:
        shift = scales.shift_bits(group_amax(matrix, spec.format.sub_block), stored)
    return QParams(stored, outer, zero, shift)


def _largest(range_: Range) -> Tensor:
    """Returns the amax of the whole, float32 []; 0 when empty."""
    return range_.amax.max() if range_.amax.numel() else range_.amax.new_zeros(())


def _handed_on(matrix: Tensor, spec: TensorSpec, params: QParams) -> Tensor:
    """Returns the values (float32) that the first stage of a chain gives the second.

    They are still divided by the first scale when the codes of the last stage are stored.

    AMD Quark's int4_fp8: the fp8 numbers without their scale.
    """
    first = without_chain(spec)
    at = grid(params, first, matrix.shape)
    if spec.codes is spec:
        return round_matrix(matrix, at, torch.float32)
    return decode_grid(encode_matrix(matrix, at), at.element)


def _reach(amax: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the largest magnitude that a stage hands on, for an input amax. A half range ends between two codes."""
    assert spec.scale is not None
    divisor = scales.divisor(spec.format, spec.scale.rule)
    return amax * (round(divisor) / divisor) if spec.codes is spec else (amax > 0) * float(round(divisor))


def _activation_params(matrix: Tensor, spec: TensorSpec, static: Tensor | None) -> QParams:
    """Returns scales of an activation [tokens, features]: the static one, the spec's constant, or from its values."""
    if spec.scale is None:
        return QParams(None)
    static = fixed_scale(spec, static, matrix.device)
    if static is not None and spec.scale.global_scale is None:
        return QParams(static.to(torch.float32))
    return activation_params(matrix, spec, range_of(matrix, spec, None, finite=False), static)


def fixed_scale(spec: TensorSpec, static: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns the `static_scale` of an activation: the given one, else that of the spec's constant amax, else None."""
    assert spec.scale is not None
    constant = spec.scale.outermost.constant_amax
    if static is None and constant is not None:
        static = static_scale(torch.tensor(constant, device=device), spec)
    if static is not None and not spec.symmetric:
        raise ConfigError(
            "a static scale of an activation cannot have a zero point",
            hint="write when: dynamic, or use a symmetric element",
            kind="E-FORMAT-IMPOSSIBLE",
        )
    return None if static is None else static.to(device)  # one that was stored comes from a file


def activation_params(matrix: Tensor, spec: TensorSpec, range_: Range, outer: Tensor | None) -> QParams:
    """Returns scales from the ranges of an activation; `outer` is a fixed global scale."""
    if outer is None:
        return params_of(matrix, spec, range_, _largest(range_))
    return QParams(scales.stored_scale(range_, spec, matrix.dtype, outer), outer)
