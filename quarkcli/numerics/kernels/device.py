"""Defines the kernels. Matrices are contiguous, one scale spans a run, and where runs are groups rows do not matter."""

from __future__ import annotations

import triton
import triton.language as tl

from quarkcli.numerics.kernels.coding import (
    codes_of,
    divided,
    ends,
    exponent_byte,
    float_stored,
    load_codes,
    load_values,
    nearest_whole,
    peak_bits,
    plain_stored,
    rounded,
    span_scale,
    store_codes,
    store_values,
    stored_value,
    values_of,
)


@triton.jit
def ranges(x, peaks, lows, highs, runs, size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Writes bits of the largest magnitude (int32 [runs]) of runs of `size` values to `peaks`.

    It writes their ends to `lows` and `highs` (float32) unless they are None.
    """
    run = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    peak = tl.zeros([ROWS], tl.int32)
    low = tl.full([ROWS], float("inf"), tl.float32)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, size, COLS):
        col = start + tl.arange(0, COLS)
        mask = (run < runs)[:, None] & (col < size)[None, :]
        values = load_values(x, run[:, None] * size + col[None, :], mask)
        peak = tl.maximum(peak, peak_bits(values))
        if lows is not None:
            low = tl.minimum(low, tl.min(tl.where(mask, values, float("inf")), axis=1))
            high = tl.maximum(high, tl.max(tl.where(mask, values, float("-inf")), axis=1))
    tl.store(peaks + run, peak, mask=run < runs)
    if lows is not None:
        tl.store(lows + run, low, mask=run < runs)
        tl.store(highs + run, high, mask=run < runs)


@triton.jit
def group_scale(values, peak, outer, DTYPE: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr,
                MAX_EXPONENT: tl.constexpr, HALF_STEP: tl.constexpr, LARGEST: tl.constexpr, ASYMMETRIC: tl.constexpr,
                LOW: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """Returns scales of groups: (as stored, float32 value, zero point); without ASYMMETRIC the last means nothing."""
    if DTYPE == "e8m0":
        stored = exponent_byte(peak, RULE, DIVISOR, MAX_EXPONENT, HALF_STEP)
        scale = stored_value(stored, DTYPE)
    elif DTYPE == "e4m3" or DTYPE == "e5m3":
        stored = float_stored(peak, outer, DTYPE, DIVISOR)
        scale = stored_value(stored, DTYPE)
        if outer is not None:
            scale = scale * outer
    elif ASYMMETRIC:
        low, high = ends(values, HIGH - LOW)
        stored, scale = plain_stored(span_scale(low, high, HIGH - LOW), LARGEST, DTYPE)
        zero = LOW * 1.0 - nearest_whole(tl.div_rn(low, scale))
    else:
        amax = peak.to(tl.float32, bitcast=True)
        stored, scale = plain_stored(tl.div_rn(amax, tl.full(peak.shape, DIVISOR, tl.float32)), LARGEST, DTYPE)
    if not ASYMMETRIC:
        zero = scale
    return stored, scale, tl.maximum(tl.minimum(zero, HIGH * 1.0), LOW * 1.0)


@triton.jit
def groups(x, out, scales, zeros, outer, peaks, runs,
           SIZE: tl.constexpr, BLOCK: tl.constexpr, FAKE: tl.constexpr,
           FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
           DTYPE: tl.constexpr, RULE: tl.constexpr, DIVISOR: tl.constexpr, MAX_EXPONENT: tl.constexpr,
           HALF_STEP: tl.constexpr, LARGEST: tl.constexpr, ASYMMETRIC: tl.constexpr):  # fmt: skip
    """Writes scales of BLOCK groups of SIZE values and their codes in one pass. FAKE writes their values instead.

    `peaks` (int32 [programs]): bits of the largest magnitude that each program saw, for the refusal of NaN and inf.
    """
    pid = tl.program_id(0).to(tl.int64)
    run = pid * BLOCK + tl.arange(0, BLOCK)
    offsets = run[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = run[:, None] < runs
    values = load_values(x, offsets, mask)
    peak = peak_bits(values)
    factor = None if outer is None else tl.load(outer)
    stored, scale, zero = group_scale(
        values, peak, factor, DTYPE, RULE, DIVISOR, MAX_EXPONENT, HALF_STEP, LARGEST, ASYMMETRIC, LOW, HIGH
    )
    y = divided(values, scale, stored, DTYPE)
    shift = tl.broadcast_to(zero[:, None], [BLOCK, SIZE]) if ASYMMETRIC else None
    if FAKE:
        if DTYPE != "e8m0":  # a NaN leaves its group no scale
            scale = tl.where(peak > 0x7F800000, float("nan"), scale)
        values = rounded(y, shift, FLOAT, BITS, MANTISSA, LOW, HIGH) * scale[:, None]
        store_values(out, offsets, values, mask)
    else:
        codes = codes_of(y, shift, FLOAT, BITS, MANTISSA, LOW, HIGH)
        store_codes(out, pid * BLOCK * SIZE, codes, (runs - pid * BLOCK) * SIZE, BITS, BLOCK * SIZE)
        tl.store(scales + run, stored.to(scales.dtype.element_ty), mask=run < runs)
        if ASYMMETRIC:
            tl.store(zeros + run, zero.to(tl.int32).to(zeros.dtype.element_ty), mask=run < runs)
        tl.store(peaks + pid, tl.max(peak, axis=0))


@triton.jit
def _place(cols, COUNT: tl.constexpr):
    """Returns (row, first column) of a program's chunk in a matrix that is cut into chunks of COUNT columns."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = (cols - 1) // COUNT + 1  # cdiv could overflow
    return pid // blocks, (pid % blocks) * COUNT


@triton.jit
def _scale_index(row, first, row_span, scale_cols, SPAN: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Returns the index of the scale of every STEP-th column of a chunk, and that column.

    A scale spans `row_span` rows and SPAN columns (0: all).
    """
    col = first + tl.arange(0, COUNT // STEP) * STEP
    return (row // row_span) * scale_cols + (col // SPAN if SPAN else col * 0), col


@triton.jit
def _spread(values, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Returns COUNT / STEP values, each repeated STEP times."""
    return tl.reshape(tl.broadcast_to(values[:, None], [COUNT // STEP, STEP]), [COUNT])


@triton.jit
def given(x, out, scales, zeros, cols, row_span, scale_cols,
          SPAN: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, FAKE: tl.constexpr,
          FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr,
          HIGH: tl.constexpr):  # fmt: skip
    """Writes codes under known scales (float32), each of `row_span` rows and SPAN columns (0: all).

    With FAKE it writes values instead.
    """
    row, first = _place(cols, COUNT)
    index, scale_col = _scale_index(row, first, row_span, scale_cols, SPAN, STEP, COUNT)
    scale = _spread(tl.load(scales + index, mask=scale_col < cols, other=1), STEP, COUNT)
    zero = None
    if zeros is not None:
        zero = _spread(tl.load(zeros + index, mask=scale_col < cols, other=0).to(tl.float32), STEP, COUNT)
    col = first + tl.arange(0, COUNT)
    offsets = row * cols + col
    mask = col < cols
    values = load_values(x, offsets, mask)
    y = tl.div_rn(values, scale)
    if FAKE:
        values = rounded(y, zero, FLOAT, BITS, MANTISSA, LOW, HIGH) * scale
        store_values(out, offsets, values, mask)
    else:
        codes = codes_of(y, zero, FLOAT, BITS, MANTISSA, LOW, HIGH)
        store_codes(out, row * cols + first, codes, cols - first, BITS, COUNT)


@triton.jit
def decode(packed, out, scales, zeros, outer, cols, row_span, scale_cols,
           SPAN: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr,
           FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr):  # fmt: skip
    """Writes the values of packed codes under their stored scales."""
    row, first = _place(cols, COUNT)
    index, scale_col = _scale_index(row, first, row_span, scale_cols, SPAN, STEP, COUNT)
    stored = tl.load(scales + index, mask=scale_col < cols, other=0)
    scale = stored_value(stored if DTYPE == "f32" else stored.to(tl.int32), DTYPE)
    if outer is not None:
        scale = scale * tl.load(outer)
    zero = None
    if zeros is not None:
        zero = _spread(tl.load(zeros + index, mask=scale_col < cols, other=0).to(tl.float32), STEP, COUNT)
    codes = load_codes(packed, row * cols + first, cols - first, BITS, COUNT)
    values = values_of(codes, zero, FLOAT, BITS, MANTISSA, LOW) * _spread(scale, STEP, COUNT)
    col = first + tl.arange(0, COUNT)
    store_values(out, row * cols + col, values, col < cols)
