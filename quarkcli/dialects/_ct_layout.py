"""Lays out the tensors of one module as the compressors of compressed-tensors 0.20 do (`compressors/*`).

Facts are torch-free. Along the input, integers below 8 bits and those without quantized inputs fill 32-bit words as
one stream of bits, zero points the same along the output; fp4 and fp6 fill bytes; 8 bits stay as they are. Integers
with quantized inputs, and their zero points, may have a signed byte each as well (`UNPACKED`): llm-compressor does so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects._ct_kinds import UNPACKED, WORD_BITS
from quarkcli.dialects._kinds import Pair
from quarkcli.dialects.base import TensorInfo
from quarkcli.family import HeaderLike
from quarkcli.plan.model import QuantizedTarget
from quarkcli.spec import PerGroup, PerTensor, PerTile, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import QParams, Quantized

_NIBBLE, _BYTE = 4, 8
_WORDS = "pack-quantized"
_WHOLE = ("float-quantized", UNPACKED, "naive-quantized", "mxfp8-quantized")  # a byte for each value
_MX = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}


def format_of(pair: Pair) -> str:
    """Returns the compressor's name for a pair that the dialect holds."""
    spec, source = pair
    assert spec.scale is not None
    if spec.format.kind == "integer":
        grouped = isinstance(spec.granularity, PerGroup)
        whole = isinstance(spec.granularity, PerTensor) or (source is not None and not grouped)
        return UNPACKED if whole and spec.format.bits == _BYTE and spec.symmetric else _WORDS
    if spec.is_two_level:
        return "nvfp4-pack-quantized"
    return _MX[spec.format.bits] if spec.scale.dtype == "e8m0" else "float-quantized"


def names_of(format_: str) -> tuple[str, ...]:
    """Returns the names by which the library finds the same tensors: `format_`, and for whole bytes all such names."""
    return tuple(dict.fromkeys([format_, *(_WHOLE if format_ in _WHOLE else ())]))


def keeps_shape(pair: Pair) -> bool:
    """True when the stored weight is [out, in] as it was, in 8 bits."""
    return pair[0].format.bits == _BYTE and format_of(pair) != _WORDS


def layout(target: QuantizedTarget) -> list[TensorInfo]:
    """Returns the tensors of a target, in the order in which they are written."""
    return tensors_of(target.name, (target.weight, target.input), target.output, target.shape, target.dtype)


def tensors_of(
    name: str, pair: Pair, output: TensorSpec | None, shape: tuple[int, int], model: str, format_: str | None = None
) -> list[TensorInfo]:
    """Returns the tensors of a module of `shape` [out, in]; `model` is the dtype of a scale in the model's dtype.

    format_   the compressor's name, None: that of `format_of`
    """
    spec, source = pair
    format_ = format_ or format_of(pair)
    scale = _scale_shape(spec, *shape)
    found = [_weight(spec, format_, *shape), TensorInfo("weight_scale", kinds.scale_text(spec, model), scale)]
    if format_ == _WORDS:
        found.append(TensorInfo("weight_shape", "I64", (2,)))
    if not spec.symmetric and format_ == UNPACKED:
        found.append(TensorInfo("weight_zero_point", "I8", scale))
    elif not spec.symmetric:
        words = -(-shape[0] * spec.format.bits // WORD_BITS)
        found.append(TensorInfo("weight_zero_point", "I32", (words, scale[1])))
    if spec.is_two_level:
        found.append(TensorInfo("weight_global_scale", "F32", (1,)))
    for side, activation in (("input", source), ("output", output)):
        suffix = static_suffix(side, activation)
        if suffix is not None:
            found.append(TensorInfo(suffix, "F32", (1,)))
    return [TensorInfo(f"{name}.{info.name}", info.dtype, info.shape) for info in found]


def _weight(spec: TensorSpec, format_: str, rows: int, cols: int) -> TensorInfo:
    bits = spec.format.bits
    if format_ == _WORDS:
        return TensorInfo("weight_packed", "I32", (rows, -(-cols * bits // WORD_BITS)))
    if format_ == UNPACKED or bits == _BYTE:
        return TensorInfo("weight", "I8" if format_ == UNPACKED else "F8_E4M3", (rows, cols))
    return TensorInfo("weight_packed", "U8", (rows, cols * bits // _BYTE))


def _scale_shape(spec: TensorSpec, rows: int, cols: int) -> tuple[int, ...]:
    match spec.granularity:
        case PerTensor():
            return (1,)
        case PerTile(height, width):
            return (-(-rows // height), -(-cols // width))
        case PerGroup(size):
            return (rows, cols // size)
    return (rows, 1)


def static_suffix(side: str, spec: TensorSpec | None) -> str | None:
    """Returns the name of the stored scale of an `input` or `output`; global scales are stored as divisors."""
    if spec is None or not spec.is_static:
        return None
    assert spec.scale is not None
    return f"{side}_scale" if spec.scale.global_scale is None else f"{side}_global_scale"


def stored_shape(spec: TensorSpec, weight: HeaderLike, scale: HeaderLike) -> tuple[int, int]:
    """Returns the (out, in) of a stored weight, from its header and that of its scale."""
    rows, cols = weight.shape
    if weight.dtype == "I32":
        # The last word of a row of groups may be part empty.
        cols = cols * WORD_BITS // spec.format.bits if spec.group_size is None else scale.shape[1] * spec.group_size
    elif weight.dtype == "U8":
        cols = cols * _BYTE // spec.format.bits
    return rows, cols


def pack(quantized: Quantized, format_: str, spec: TensorSpec) -> Tensor:
    """Returns the codes of a weight [out, in] as they are stored."""
    from quarkcli.numerics.packing import pack_int32, words_of

    bits = spec.format.bits
    if format_ == _WORDS and bits == _NIBBLE:
        return words_of(quantized.stream(bits), bits, spec.symmetric)
    if format_ == _WORDS:
        return pack_int32(quantized.codes, bits)
    return quantized.codes.contiguous() if bits == _BYTE else quantized.stream(bits)


def unpack(stored: Tensor, format_: str, spec: TensorSpec, cols: int, params: QParams) -> Quantized:
    """Returns a stored weight: the inverse of `pack`."""
    from quarkcli.numerics.packed import Packed, Streamed
    from quarkcli.numerics.packing import stream_of, unpack_int32
    from quarkcli.numerics.quantize import Quantized

    bits = spec.format.bits
    if format_ == _WORDS and bits == _NIBBLE:
        return Streamed(Packed(stream_of(stored, bits, cols, spec.symmetric), params), spec, cols)
    if format_ == _WORDS:
        return Quantized(unpack_int32(stored, bits, cols, signed=spec.symmetric), params)
    if format_ == UNPACKED:
        return Quantized(stored if spec.symmetric else _unsigned(stored, bits), params)
    return Quantized(stored, params) if bits == _BYTE else Streamed(Packed(stored, params), spec, cols)


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Packs uint8 zero points [out, groups] into int32 [ceil(out * bits / 32), groups]."""
    from quarkcli.numerics.packing import pack_int32

    return pack_int32(zero_points.T.contiguous(), bits).T.contiguous()


def unpack_zero_points(stored: Tensor, format_: str, bits: int, rows: int) -> Tensor:
    """Returns the zero points of a stored tensor: the inverse of `pack_zero_points`, or of signed bytes."""
    from quarkcli.numerics.packing import unpack_int32

    if format_ == UNPACKED:
        return _unsigned(stored, bits)
    return unpack_int32(stored.T.contiguous(), bits, rows, signed=False).T.contiguous()


def _unsigned(stored: Tensor, bits: int) -> Tensor:
    """Returns signed integers of so many bits with half their range added, uint8."""
    import torch

    return (stored.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
