"""Launches the kernels for tensors and a TensorSpec. Imported only where Triton runs, see `kernels.find`."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from quarkcli.numerics import scales
from quarkcli.numerics.chunks import as_matrix, require_finite
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import QParams, is_whole, scale_size
from quarkcli.numerics.kernels import device
from quarkcli.numerics.quantize import activation_params, fixed_scale, make_qparams, params_of
from quarkcli.numerics.ranges import amax_per_row, needs_ends, range_of
from quarkcli.numerics.scales import Range
from quarkcli.spec import MIN_MAX, Element, PerChannel, PerGroup, PerTile, TensorSpec

# Values that one program works on.
_TILE = 2048
_LARGEST_GROUP = 1024
_INFINITY = 0x7F800000
_LOADED = (torch.float32, torch.float16, torch.bfloat16)
_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _STORED.items()}
_EXPONENT_RULES = ("even", "floor", "ceil", "rceil")
_DIVISOR_RULES = ("half_range", "absmax")
_FUSED_RULES = {"e8m0": _EXPONENT_RULES} | dict.fromkeys((*_STORED, "model", "e4m3", "e5m3"), _DIVISOR_RULES)


def quantize_packed(weight: Tensor, spec: TensorSpec, amax: Tensor | None) -> tuple[Tensor, QParams]:
    """Returns packed codes and scales of `weight` [out, in], as `packed.quantize_packed` gives them."""
    matrix = _readable(weight)
    if _is_fused(spec, matrix.dtype):
        return _fused_codes(matrix, spec, amax)
    params = _params(matrix, spec, amax)
    return _codes_under(matrix, spec, params), params


def dequantize_packed(
    data: Tensor, params: QParams, spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Returns values in `dtype` of packed codes of a matrix of `shape`."""
    assert spec.scale is not None and params.scale is not None
    rows, cols, span, row_span, scale_cols = _walk(spec, shape)
    bytes_of_scale = spec.scale.dtype in ("e8m0", "e4m3", "e5m3")
    stored = params.scale.view(torch.uint8) if bytes_of_scale else params.scale.float()
    out = torch.empty(shape, dtype=dtype, device=data.device)
    _launch(
        device.decode, _chunks(rows, cols), out,
        data.contiguous().view(torch.uint8), _raw(out), stored.contiguous(), _contiguous(params.zero_point),
        params.global_scale, cols, row_span, scale_cols,
        **_steps(span, cols), DTYPE=spec.scale.dtype if bytes_of_scale else "f32",
        **{key: value for key, value in _element(spec.format).items() if key != "HIGH"},
    )  # fmt: skip
    return out


def fake_quantize(x: Tensor, spec: TensorSpec, static: Tensor | None) -> Tensor:
    """Returns a matrix [tokens, features] quantized and dequantized by one stage.

    `static` is a scale as `quantize.static_scale` gives it.
    """
    assert spec.scale is not None
    matrix = _readable(x)
    scale_size(spec, matrix.shape[1])
    out = torch.empty_like(matrix)
    static = fixed_scale(spec, static, x.device)
    if static is not None and spec.scale.global_scale is None:
        _given(matrix, spec, static.to(torch.float32), None, out, fake=True)
        return out.to(x.dtype)
    if not _is_fused(spec, matrix.dtype):
        range_ = _range(matrix, spec, finite=False)
        params = activation_params(matrix, spec, range_, static)
        _given(matrix, spec, _multipliers(params, spec), params.zero_point, out, fake=True)
        return out.to(x.dtype)
    if spec.scale.global_scale is not None and static is None:
        static = scales.global_scale(_peaks(matrix, matrix.shape[1]).amax(), spec.format, spec.scale)
    _fused(matrix, spec, out, None, None, static, None)
    return out.to(x.dtype)


# ---- scale and codes in one pass


def _is_fused(spec: TensorSpec, dtype: torch.dtype) -> bool:
    """True when a kernel knows the scales too: groups that fit a program, without a search."""
    scale, where = spec.scale, spec.granularity
    assert scale is not None
    if not isinstance(where, PerGroup) or not 4 <= where.size <= _LARGEST_GROUP or where.size & (where.size - 1):
        return False
    if scale.rule not in _FUSED_RULES.get(scale.dtype, ()) or spec.observer != MIN_MAX or scale.minimum is not None:
        return False
    return scale.dtype != "model" or dtype in _NAMES


def _fused_codes(matrix: Tensor, spec: TensorSpec, amax: Tensor | None) -> tuple[Tensor, QParams]:
    assert spec.scale is not None and isinstance(spec.granularity, PerGroup)
    rows, cols = matrix.shape
    count = cols // scale_size(spec, cols)
    outer = None
    if spec.scale.global_scale is not None:
        outer = scales.global_scale(_whole(matrix, amax), spec.format, spec.scale)
    name = _plain_name(spec, matrix.dtype)
    stored = torch.empty(rows, count, dtype=_STORED.get(name, torch.uint8), device=matrix.device)
    zero = None
    if not spec.symmetric:
        zero = torch.empty(rows, count, dtype=codec(spec.format).code_dtype(spec.format), device=matrix.device)
    data = torch.empty(rows, cols * spec.format.bits // 8, dtype=torch.uint8, device=matrix.device)
    peaks = torch.empty(_programs(spec, matrix), dtype=torch.int32, device=matrix.device)
    _fused(matrix, spec, data, stored, zero, outer, peaks)
    _refuse_non_finite(peaks, matrix)
    scale = stored.view(torch.float8_e4m3fn) if name == "e4m3" else stored
    return _typed(data, spec.format), QParams(scale, outer, zero)


def _whole(matrix: Tensor, amax: Tensor | None) -> Tensor:
    """Returns the amax of the scale group: the given one, or that of the matrix."""
    if amax is not None:
        return amax.to(torch.float32)
    peaks = _peaks(matrix, matrix.shape[1])
    _refuse_non_finite(peaks, matrix)
    return peaks.amax()


def _fused(
    matrix: Tensor, spec: TensorSpec, out: Tensor, stored: Tensor | None, zero: Tensor | None, outer: Tensor | None,
    peaks: Tensor | None,
) -> None:  # fmt: skip
    """Launches `device.groups`; without `stored` it writes values."""
    assert spec.scale is not None and isinstance(spec.granularity, PerGroup)
    element, scale, size = spec.format, spec.scale, spec.granularity.size
    bits = element.mantissa if element.kind == "float" else 8
    name = _plain_name(spec, matrix.dtype)
    _launch(
        device.groups, _programs(spec, matrix), matrix,
        _raw(matrix), _raw(out), None if stored is None else _raw(stored), zero, outer, peaks, matrix.numel() // size,
        SIZE=size, BLOCK=_block(size), FAKE=stored is None, **_element(element),
        DTYPE=name, RULE=scale.rule, ASYMMETRIC=not spec.symmetric,
        DIVISOR=scales.divisor(element, scale.rule), MAX_EXPONENT=element.max_exponent, HALF_STEP=1 << (22 - bits),
        LARGEST=scales.largest_scale(element, _STORED.get(name, torch.float32)),
    )  # fmt: skip


def _programs(spec: TensorSpec, matrix: Tensor) -> int:
    assert isinstance(spec.granularity, PerGroup)
    return math.ceil(matrix.numel() / (spec.granularity.size * _block(spec.granularity.size)))


def _block(size: int) -> int:
    return max(1, _TILE // size)


def _plain_name(spec: TensorSpec, dtype: torch.dtype) -> str:
    """Returns the stored dtype of a scale; `model` is that of the matrix."""
    assert spec.scale is not None
    return _NAMES[dtype] if spec.scale.dtype == "model" else spec.scale.dtype


# ---- codes under known scales


def _params(matrix: Tensor, spec: TensorSpec, amax: Tensor | None) -> QParams:
    assert spec.scale is not None
    if spec.searches:
        return make_qparams(matrix, spec, amax=amax)
    if amax is not None and is_whole(spec):
        amax = amax.to(torch.float32)
        _refuse_non_finite(_peaks(matrix, matrix.shape[1]), matrix)
        return params_of(matrix, spec, Range(amax, -amax, amax), amax)
    range_ = _range(matrix, spec, finite=True)
    return params_of(matrix, spec, range_, range_.amax.max() if amax is None else amax.to(torch.float32))


def _range(matrix: Tensor, spec: TensorSpec, *, finite: bool) -> Range:
    """Returns `ranges.range_of` of the matrix' own range."""
    size = scale_size(spec, matrix.shape[1])
    if isinstance(spec.granularity, PerTile) or spec.granularity == PerChannel(1):
        return range_of(matrix, spec, None, finite=finite)
    ends = [torch.empty(matrix.shape[0], matrix.shape[1] // size, device=matrix.device) for _ in range(2)]
    low, high = ends if needs_ends(spec) else (None, None)
    peaks = _peaks(matrix, size, low, high)
    if finite:
        _refuse_non_finite(peaks, matrix)
    if not is_whole(spec):
        return Range(peaks, low, high)
    return Range(peaks.amax(), None if low is None else low.amin(), None if high is None else high.amax())


def _peaks(matrix: Tensor, size: int, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Returns the largest magnitudes of runs of `size` values, float32 [rows, cols / size].

    It writes the ends of the runs to `low` and `high`.
    """
    rows, cols = matrix.shape
    runs = rows * cols // size
    width = min(_piece(size), _TILE)
    height = max(1, min(_TILE // width, triton.next_power_of_2(runs)))
    peaks = torch.empty(rows, cols // size, dtype=torch.int32, device=matrix.device)
    _launch(
        device.ranges, math.ceil(runs / height), matrix, _raw(matrix), peaks, low, high, runs, size,
        ROWS=height, COLS=width,
    )  # fmt: skip
    return peaks.view(torch.float32)


def _codes_under(matrix: Tensor, spec: TensorSpec, params: QParams) -> Tensor:
    rows, cols = matrix.shape
    data = torch.empty(rows, cols * spec.format.bits // 8, dtype=torch.uint8, device=matrix.device)
    _given(matrix, spec, _multipliers(params, spec), params.zero_point, data, fake=False)
    return _typed(data, spec.format)


def _multipliers(params: QParams, spec: TensorSpec) -> Tensor:
    """Returns the float32 multipliers, in the shape of the stored scales."""
    assert spec.scale is not None and params.scale is not None
    scale = scales.decode_scale(params.scale, spec.scale.dtype)
    return scale if params.global_scale is None else scale * params.global_scale


def _given(matrix: Tensor, spec: TensorSpec, scale: Tensor, zero: Tensor | None, out: Tensor, *, fake: bool) -> None:
    """Launches `device.given`: codes, or with `fake` values, under known multipliers; a single one holds everywhere."""
    rows, cols, span, row_span, scale_cols = _walk(spec, (matrix.shape[0], matrix.shape[1]))
    if scale.dim() == 0:
        rows, cols, span, row_span, scale_cols = (*matrix.shape, 0, matrix.shape[0], 1)
    _launch(
        device.given, _chunks(rows, cols), matrix,
        _raw(matrix), _raw(out), scale.contiguous(), _contiguous(zero), cols, row_span, scale_cols,
        **_steps(span, cols), FAKE=fake, **_element(spec.format),
    )  # fmt: skip


def _walk(spec: TensorSpec, shape: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """Returns a matrix walk: (rows, cols, columns of a scale or 0 for all, rows of a scale, scales of a row)."""
    rows, cols = shape
    match spec.granularity:
        case PerGroup(size):
            scale_size(spec, cols)
            return 1, rows * cols, size, 1, 1
        case PerTile(tall, wide):
            return rows, cols, wide, tall, -(-cols // wide)
        case PerChannel(1):
            return rows, cols, 1, rows, cols
    return rows, cols, 0, rows if is_whole(spec) else 1, 1


# ---- launching


def _element(element: Element) -> dict[str, Any]:
    """Returns the constants of an element, see `coding`."""
    if element.kind == "float":
        largest = struct.unpack("<i", struct.pack("<f", element.maximum))[0]
        return {
            "FLOAT": True, "BITS": element.bits, "MANTISSA": element.mantissa,
            "LOW": (128 - element.bias) << 23, "HIGH": largest,
        }  # fmt: skip
    low, high = int(element.minimum), int(element.maximum)
    return {"FLOAT": False, "BITS": element.bits, "MANTISSA": 0, "LOW": low, "HIGH": high}


def _launch(kernel: Any, programs: int, on: Tensor, *arguments: Any, **constants: Any) -> None:
    here = torch.cuda.device(on.device) if on.device.type == "cuda" else contextlib.nullcontext()
    with here:
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False, num_warps=4)


def _piece(cols: int) -> int:
    """Returns the number of columns that a program takes of a row."""
    return int(min(_TILE, max(8, triton.next_power_of_2(cols))))


def _steps(span: int, cols: int) -> dict[str, int]:
    """Returns SPAN, STEP and COUNT: a scale spans `span` columns, a chunk has COUNT, STEP neighbours share a scale."""
    count = _piece(cols)
    step = count if span == 0 else span if span & (span - 1) == 0 and span <= count else 1
    return {"SPAN": span, "STEP": step, "COUNT": count}


def _chunks(rows: int, cols: int) -> int:
    return rows * math.ceil(cols / _piece(cols))


def _readable(x: Tensor) -> Tensor:
    """Returns `x` as a contiguous matrix of a dtype the kernels load; others become float32, as in the reference."""
    matrix = as_matrix(x)
    return (matrix if matrix.dtype in _LOADED else matrix.float()).contiguous()


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _typed(data: Tensor, element: Element) -> Tensor:
    """Returns bytes of whole codes in the dtype of the codes."""
    return data.view(codec(element).code_dtype(element)) if element.bits == 8 else data


def _refuse_non_finite(peaks: Tensor, matrix: Tensor) -> None:
    """Raises DataError with the first position where a largest magnitude (float32, or its bits) is NaN or inf."""
    if peaks.numel() and int(peaks.view(torch.int32).amax()) >= _INFINITY:
        require_finite(amax_per_row(matrix), matrix)
