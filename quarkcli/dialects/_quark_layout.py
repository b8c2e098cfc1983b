"""Lays out the tensors of a quantized weight or bias, or of a static scale: names, dtypes, shapes, bytes.

AMD Quark 0.13 packs these, and they lie here as they do there (tensors of its exports, decoded):

    int4, uint4    int32, eight codes to a word along the last axis; in groups [in, out / 8], transposed, else
                   [out, in / 8]; a negative code is its two's complement
    int8, uint8    one byte each; in groups [in, out]
    uint2          four to a byte, the first in the top bits; in groups [in, out / 4]
    int3           eight in three bytes, the lowest bits first, [out, in * 3 / 8]
    fp8            torch's own floats
    fp4, fp6       a stream of bits, the lowest first: [out, in / 2] and [out, in * 3 / 4] bytes
    scale          one number []; [out] or [in]; groups [out, groups], transposed where integers are; tiles [rows, cols]
    zero_point     stored for every integer of 4 and 8 bits, zero when symmetric; packed like the codes
    scale_2        the second stage of a chain (with its zero_point_2), or the one scale over 8-bit scales

Quark cannot pack the rest; this layout is our own:

    int2           as uint2
    mx6            the same stream of bits, 5 to a code; mx9, bfp16 and mxint8 one byte each
    shift          a bit for each pair of mx6 and mx9, eight to a byte, the lowest first
    fp16, bf16     the numbers themselves, without a scale
    zero_point     of tiles and of int3: one byte each

A bias is one row: its tensors lack the first dimension and are never transposed. Torch-free to import.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from quarkcli.dialects._kinds import scale_text
from quarkcli.dialects.base import TensorInfo
from quarkcli.spec import Element, PerChannel, PerGroup, PerTensor, PerTile, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quarkcli.numerics.quantize import QParams, Quantized

Shape = tuple[int, ...]
_NATIVE = {"fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Matrix:
    """A quantized tensor of a module, [rows, cols]: `slot` is weight or bias, of which the latter is [1, out]."""

    slot: Literal["weight", "bias"]
    spec: TensorSpec
    shape: tuple[int, int]

    @property
    def flat(self) -> bool:
        return self.slot == "bias"


class Cells(NamedTuple):
    """The place of codes in a stored tensor: `codes` of them fill `number` cells of a safetensors dtype."""

    dtype: str
    codes: int = 1
    number: int = 1
    order: Literal["plain", "words", "high first", "low first"] = "plain"


def cells(element: Element) -> Cells:
    """Returns the cells that hold the codes of an element."""
    bits = element.bits
    if element.name in _NATIVE or bits == 8:
        return Cells(_NATIVE.get(element.name, "I8" if element.minimum < 0 else "U8"))
    if _is_whole(element) and bits == 4:
        return Cells("I32", 8, 1, "words")
    if _is_whole(element) and bits == 2:
        return Cells("U8", 4, 1, "high first")
    whole = math.lcm(8, bits)
    return Cells("U8", whole // bits, whole // 8, "low first")


def _is_whole(element: Element) -> bool:
    """True for Quark's integers, whose groups it transposes."""
    return element.kind == "integer" and not element.fraction


def _zero_cells(stage: TensorSpec) -> Cells | None:
    """Returns the cells that hold zero points, None when there are none."""
    if stage.zero_point == "float":
        return Cells("F32")
    element, own = stage.format, cells(stage.format)
    stored = _is_whole(element) and element.bits in (4, 8) and not isinstance(stage.granularity, PerTile)
    if stage.symmetric and not stored:
        return None
    if element.bits in (2, 4) and isinstance(stage.granularity, PerChannel | PerGroup):
        return own
    if element.bits == 4 and isinstance(stage.granularity, PerTensor):
        return Cells(own.dtype)
    return Cells("I8" if element.minimum < 0 else "U8")


# --- names and shapes ------------------------------------------------------------------------------------------------


class Names(NamedTuple):
    """The file names of one stage; `outer` is that of the scale over its scales."""

    scale: str
    zero: str
    shift: str
    outer: str


def _stages(spec: TensorSpec, slot: str) -> Iterator[tuple[TensorSpec, Names]]:
    """Yields every stage with its names: the dictionaries of the config are counted, from the second on."""
    number = 1
    for stage in spec.stages:
        own, after = ("" if n == 1 else f"_{n}" for n in (number, number + 1))
        names = Names(f"{slot}_scale{own}", f"{slot}_zero_point{own}", f"{slot}_shift{own}", f"{slot}_scale{after}")
        yield stage, names
        number += 2 if stage.is_two_level else 1


def layout(matrix: Matrix, model: str) -> list[TensorInfo]:
    """Returns the tensors of a matrix, named without their module; `model` is the dtype of a scale in the model's."""
    stage = matrix.spec.codes
    found = [TensorInfo(matrix.slot, cells(stage.format).dtype, _code_shape(matrix))]
    for stage, names in _stages(matrix.spec, matrix.slot):
        if stage.scale is None:
            continue
        text = scale_text(stage, model if stage is matrix.spec else "F32")  # a second stage reads float32 values
        found.append(TensorInfo(names.scale, text, _stored_shape(matrix, stage)))
        zeros = _zero_cells(stage)
        if zeros is not None:
            found.append(TensorInfo(names.zero, zeros.dtype, _packed(_stored_shape(matrix, stage), zeros)))
        if stage.format.sub_block:
            found.append(TensorInfo(names.shift, "U8", _shift_shape(matrix, stage)))
        if stage.is_two_level:
            found.append(TensorInfo(names.outer, "F32", ()))
    return found


def static_layout(slot: str, spec: TensorSpec | None) -> list[TensorInfo]:
    """Returns the tensors of an activation: none when its scales are dynamic, else the scale and an integer's zero."""
    for stage, names in _stages(spec, slot) if spec is not None else ():
        if stage.scale is None:
            continue
        if stage.scale.global_scale is not None and stage.scale.global_scale.when == "static":
            return [TensorInfo(names.outer, "F32", ())]
        if stage.scale.when == "static":
            whole = _is_whole(stage.format)
            dtype = "I32" if stage.format.bits == 4 else "I8"
            return [TensorInfo(names.scale, "F32", ()), *([TensorInfo(names.zero, dtype, ())] if whole else [])]
    return []


def problems(matrix: Matrix) -> Iterator[str]:
    """Yields the reasons a matrix cannot be packed; one sentence each."""
    stage = matrix.spec.codes
    own = cells(stage.format)
    axis = 0 if _codes_are_transposed(matrix, stage) else 1
    if matrix.shape[axis] % own.codes:
        name = "output" if matrix.flat or axis == 0 else "input"
        yield f"{matrix.shape[axis]} {name} features are not a multiple of {_filled(own, stage)}"
    for stage in matrix.spec.stages:
        yield from _scale_problems(matrix, stage)
        zeros = _zero_cells(stage)
        count = math.prod(_stored_shape(matrix, stage)[-1:])
        if zeros is not None and count % zeros.codes and count != matrix.shape[axis]:
            yield f"{count} zero points in a row are not a multiple of {_filled(zeros, stage)}"


def _scale_problems(matrix: Matrix, stage: TensorSpec) -> Iterator[str]:
    scale, what = stage.scale, stage.describe()
    if scale is not None and "dynamic" in (scale.when, scale.outermost.when):
        yield f"the scales of a stored {matrix.slot} are fixed ({what}), so it cannot be coded"
    if isinstance(stage.granularity, PerGroup) and matrix.shape[1] % stage.granularity.size:
        name = "output" if matrix.flat else "input"
        yield f"{matrix.shape[1]} {name} features are not a multiple of the group of {stage.granularity.size} of {what}"


def _filled(own: Cells, stage: TensorSpec) -> str:
    """Returns the end of a refusal: `8, and quark packs 8 of them into a word (int4 ...)`."""
    into = "a word" if own.order == "words" else "a byte" if own.number == 1 else f"{own.number} bytes"
    return f"{own.codes}, and quark packs {own.codes} of them into {into} ({stage.describe()})"


def _scales_are_transposed(matrix: Matrix, stage: TensorSpec) -> bool:
    """True when the scales of a stage are stored transposed."""
    return isinstance(stage.granularity, PerGroup) and _is_whole(stage.format) and not matrix.flat


def _codes_are_transposed(matrix: Matrix, stage: TensorSpec) -> bool:
    """True when the codes are stored transposed: Quark's packer of int3 is the one that does not."""
    return _scales_are_transposed(matrix, stage) and stage.format.bits != 3


def _packed(shape: Shape, own: Cells) -> Shape:
    return (*shape[:-1], shape[-1] // own.codes * own.number) if shape else shape


def _flattened(matrix: Matrix, shape: Shape) -> Shape:
    return shape[1:] if matrix.flat and len(shape) == 2 else shape


def _code_shape(matrix: Matrix) -> Shape:
    shape = matrix.shape[::-1] if _codes_are_transposed(matrix, matrix.spec.codes) else matrix.shape
    return _flattened(matrix, _packed(shape, cells(matrix.spec.codes.format)))


def matrix_shape(spec: TensorSpec, stored: Shape) -> tuple[int, int]:
    """Returns (out, in) of a weight from the shape of its stored codes, which is a matrix."""
    own = cells(spec.codes.format)
    rows, cols = stored[0], stored[1] // own.number * own.codes
    return (cols, rows) if _codes_are_transposed(Matrix("weight", spec, (rows, cols)), spec.codes) else (rows, cols)


def _shape(matrix: Matrix, stage: TensorSpec) -> Shape:
    """Returns the shape of a stage's scales in memory, see QParams."""
    rows, cols = matrix.shape
    match stage.granularity:
        case PerTensor():
            return ()
        case PerChannel(1):
            return (1, cols)
        case PerGroup(size):
            return (rows, cols // size)
        case PerTile(tile_rows, tile_cols):
            return (-(-rows // tile_rows), -(-cols // tile_cols))
    return (rows, 1)


def _stored_shape(matrix: Matrix, stage: TensorSpec) -> Shape:
    """Returns the shape of a stage's scales in the file, and of its zero points before they are packed."""
    shape = _shape(matrix, stage)
    if isinstance(stage.granularity, PerTensor):
        return ()
    if isinstance(stage.granularity, PerChannel):
        return (math.prod(shape),)
    return _flattened(matrix, shape[::-1] if _scales_are_transposed(matrix, stage) else shape)


def _shift_shape(matrix: Matrix, stage: TensorSpec) -> Shape:
    rows, cols = matrix.shape
    return _flattened(matrix, (rows, -(-cols // stage.format.sub_block // 8)))


# --- bytes -----------------------------------------------------------------------------------------------------------


def pack(matrix: Matrix, quantized: Quantized) -> dict[str, Tensor]:
    """Returns the tensors of `layout`, in its order."""
    stage = matrix.spec.codes
    codes = quantized.codes.T if _codes_are_transposed(matrix, stage) else quantized.codes
    out: dict[str, Tensor] = {matrix.slot: _fill(codes, cells(stage.format), stage).reshape(_code_shape(matrix))}
    params: QParams | None = quantized.params
    for stage, names in _stages(matrix.spec, matrix.slot):
        assert params is not None
        out |= _pack_stage(matrix, stage, names, params)
        params = params.then
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _pack_stage(matrix: Matrix, stage: TensorSpec, names: Names, params: QParams) -> dict[str, Tensor]:
    import torch

    from quarkcli.numerics.packing import pack_bits

    if params.scale is None:
        return {}
    shape = _stored_shape(matrix, stage)

    def to_file(tensor: Tensor) -> Tensor:
        return (tensor.T if _scales_are_transposed(matrix, stage) else tensor).reshape(shape)

    out = {names.scale: to_file(params.scale)}
    zeros = _zero_cells(stage)
    if zeros is not None and params.zero_point is not None:
        out[names.zero] = _fill(to_file(params.zero_point), zeros, stage)
    elif zeros is not None:
        out[names.zero] = torch.zeros(_packed(shape, zeros), dtype=_dtype(zeros))
    if params.shift is not None:
        out[names.shift] = pack_bits(params.shift, 1).reshape(_shift_shape(matrix, stage))
    if params.global_scale is not None:
        out[names.outer] = params.global_scale.clone()
    return out


def unpack(matrix: Matrix, tensors: Mapping[str, Tensor], *, in_order: bool = False) -> Quantized:
    """Returns the codes and scales of stored tensors: the inverse of `pack`.

    in_order   the words hold their codes in plain order (Quark's pack_method `order`)
    """
    from quarkcli.numerics.quantize import Quantized

    stage = matrix.spec.codes
    transposed = _codes_are_transposed(matrix, stage)
    shape = matrix.shape[::-1] if transposed else matrix.shape
    stored = tensors[matrix.slot].reshape(_packed(shape, cells(stage.format)))
    codes = _take(stored, cells(stage.format), stage, shape, in_order)
    params: QParams | None = None
    for stage, names in reversed([*_stages(matrix.spec, matrix.slot)]):
        then = params
        params = _unpack_stage(matrix, stage, names, tensors, in_order)
        params.then = then
    assert params is not None
    return Quantized(codes.T.contiguous() if transposed else codes, params)


def _unpack_stage(
    matrix: Matrix, stage: TensorSpec, names: Names, tensors: Mapping[str, Tensor], in_order: bool
) -> QParams:
    from quarkcli.numerics.packing import unpack_bits
    from quarkcli.numerics.quantize import QParams

    if stage.scale is None:
        return QParams(None)
    shape, stored = _shape(matrix, stage), _stored_shape(matrix, stage)

    def from_file(tensor: Tensor) -> Tensor:
        return (tensor.T if _scales_are_transposed(matrix, stage) else tensor).reshape(shape).contiguous()

    params = QParams(from_file(tensors[names.scale]))
    zeros = _zero_cells(stage)
    if zeros is not None and not stage.symmetric:
        params.zero_point = from_file(_take(tensors[names.zero], zeros, stage, stored, in_order))
    if stage.format.sub_block:
        pairs = matrix.shape[1] // stage.format.sub_block
        params.shift = unpack_bits(tensors[names.shift].reshape(matrix.shape[0], -1), 1, pairs)
    if stage.is_two_level:
        params.global_scale = tensors[names.outer].float().reshape(())
    return params


def _fill(codes: Tensor, own: Cells, stage: TensorSpec) -> Tensor:
    """Puts codes, or zero points, into their cells along the last axis."""
    from quarkcli.numerics.packing import pack_awq, pack_bits, pack_msb

    bits = stage.format.bits
    match own.order:
        case "words":
            return pack_awq(codes)
        case "high first":
            return pack_msb(codes, bits)
        case "low first":
            return pack_bits(codes.contiguous(), bits)
    return codes.to(_dtype(own))


def _take(stored: Tensor, own: Cells, stage: TensorSpec, shape: Shape, in_order: bool) -> Tensor:
    """Returns the codes in stored cells: the inverse of `_fill`. `shape` is that of the codes."""
    from quarkcli.numerics.formats import codec
    from quarkcli.numerics.packing import unpack_awq, unpack_bits, unpack_msb, unpack_order

    element = stage.format
    signed = element.kind == "integer" and element.minimum < 0
    match own.order:
        case "words":
            return unpack_order(stored, signed) if in_order else unpack_awq(stored, signed)
        case "high first":
            return unpack_msb(stored, element.bits, shape[-1], signed)
        case "low first":
            return unpack_bits(stored, element.bits, shape[-1], signed)
    plain = stored.to(codec(element).code_dtype(element)) if own.dtype == "I32" else stored
    return plain.reshape(shape)


def _dtype(own: Cells) -> torch.dtype:
    import torch

    return {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
    }[own.dtype]  # fmt: skip
