"""Turns a matrix into packed codes and scales in one step, and back, by a kernel where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quarkcli.numerics import kernels
from quarkcli.numerics import quantize as reference
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import QParams
from quarkcli.numerics.packing import pack_bits, unpack_bits
from quarkcli.numerics.quantize import Quantized, decode, encode, make_qparams
from quarkcli.spec import Element, TensorSpec


@dataclass
class Packed:
    """The codes of a matrix [out, in] as stored, with their scales.

    data: below 8 bits uint8 [out, ceil(in * bits / 8)], the dense little-endian stream of the codes of a row (two's
    complement; the low nibble is the even column); else the codes themselves: int8, uint8, float8, float16, bfloat16.
    """

    data: Tensor
    params: QParams


def quantize_packed(weight: Tensor, spec: TensorSpec, *, amax: Tensor | None = None) -> Packed:
    """Returns packed codes and scales of `weight` [out, in]. Errors and `amax` as in `quantize.make_qparams`."""
    kernel = kernels.find(spec, weight.device)
    if kernel is not None and _kernel_takes(tuple(weight.shape), spec.format):
        return Packed(*kernel.quantize_packed(weight, spec, amax))
    params = make_qparams(weight, spec, amax=amax)
    codes = encode(weight, spec, params)
    bits = spec.codes.format.bits
    return Packed(codes if bits >= 8 else pack_bits(codes, bits), params)


def dequantize_packed(packed: Packed, spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns values of packed codes of a matrix of `shape` [out, in]: computed in float32, rounded to `dtype`."""
    kernel = kernels.find(spec, packed.data.device)
    if kernel is not None and _kernel_takes(shape, spec.format) and _is_real(dtype):
        values: Tensor = kernel.dequantize_packed(packed.data, packed.params, spec, shape, dtype)
        return values
    return decode(_codes(packed, spec, shape[1]), spec, packed.params, dtype)


def quantize(weight: Tensor, spec: TensorSpec, *, amax: Tensor | None = None, known: Tensor | None = None) -> Quantized:
    """Does `numerics.quantize.quantize` by a kernel where there is one. The bits are the same."""
    if kernels.find(spec, weight.device) is None or not _kernel_takes(tuple(weight.shape), spec.format):
        return reference.quantize(weight, spec, amax=amax, known=known)
    return Streamed(quantize_packed(weight, spec, amax=amax), spec, weight.shape[1])


class Streamed(Quantized):
    """A quantized matrix whose codes lie packed, as a kernel or a file has them; unpacked where somebody asks.

    cols   of the matrix
    """

    def __init__(self, packed: Packed, spec: TensorSpec, cols: int) -> None:
        self.packed, self.spec, self.cols = packed, spec, cols
        self.params, self.order = packed.params, None

    @cached_property
    def codes(self) -> Tensor:  # type: ignore[override]  # made when it is asked for
        return _codes(self.packed, self.spec, self.cols)

    def stream(self, bits: int) -> Tensor:
        return self.packed.data if bits < 8 else self.packed.data.view(torch.uint8)

    def some(self, rows: slice) -> Quantized:
        count = len(self.packed.data)
        return Streamed(Packed(self.packed.data[rows], self.params.rows(rows, count)), self.spec, self.cols)

    def values(self, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
        return dequantize_packed(self.packed, spec, (len(self.packed.data), self.cols), dtype)


def _codes(packed: Packed, spec: TensorSpec, cols: int) -> Tensor:
    element = spec.codes.format
    if element.bits >= 8:
        return packed.data
    return unpack_bits(packed.data, element.bits, cols, codec(element).code_dtype(element) == torch.int8)


def _kernel_takes(shape: tuple[int, ...], element: Element) -> bool:
    """True when no row ends within a byte; an empty or odd-shaped tensor is left to the reference."""
    return len(shape) == 2 and shape[0] * shape[1] > 0 and shape[1] * element.bits % 8 == 0


def _is_real(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float16, torch.bfloat16)
