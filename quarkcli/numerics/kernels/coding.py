"""Loads, scales, rounds and packs values in registers, with the arithmetic of formats/ and scales.py.

Constants of an element: FLOAT, BITS, MANTISSA, and LOW, HIGH, which are the float32 bits of the smallest normal and of
the largest value for a float, the smallest and largest code for an integer.

bfloat16 is passed as int16 and converted here: the interpreter's own conversion truncates.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-(1 << 31))
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
# Adding it to a magnitude up to 2^22 rounds to a whole number, ties to even.
_WHOLE = tl.constexpr(8388608.0)
_WHOLE_LIMIT = tl.constexpr(4194304.0)
_ZERO_GROUP_SCALE = tl.constexpr(2.0**-23)
_ZERO_GROUP_BITS = tl.constexpr((127 - 23) << 7)  # as bfloat16
_E4M3_FIRST = tl.constexpr((128 - 7) << 23)
_E4M3_MAX = tl.constexpr(0x43E00000)
_E5M3_FIRST = tl.constexpr((128 - 15) << 23)
_E5M3_MAX = tl.constexpr(0x47E00000)
_E5M3_ONE = tl.constexpr(15 << 3)


@triton.jit
def load_values(pointer, offsets, mask):
    """Returns float32 values; zero where masked."""
    values = tl.load(pointer + offsets, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = values.to(tl.float32)
    return values


@triton.jit
def bfloat16_bits(values):
    """Returns int32 of the nearest bfloat16, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & _MAGNITUDE) > _INFINITY, 0x7FC0, rounded)


@triton.jit
def store_values(pointer, offsets, values, mask):
    """Stores float32 values in the dtype of `pointer`, ties to even."""
    if pointer.dtype.element_ty == tl.int16:
        tl.store(pointer + offsets, bfloat16_bits(values).to(tl.int16), mask=mask)
    else:
        tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def peak_bits(values):
    """Returns bits of the largest magnitude of every row; as integers NaN is above infinity, and nothing is flushed."""
    return tl.minimum(tl.max(values.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1), _NAN)


# ---- elements


@triton.jit
def float_code(y, BITS: tl.constexpr, MANTISSA: tl.constexpr, FIRST: tl.constexpr, LARGEST: tl.constexpr):
    """Returns codes (int32) of a small float: nearest, ties to the even code, saturating.

    See minifloat.encode_bits_.
    """
    drop: tl.constexpr = 23 - MANTISSA
    shift: tl.constexpr = (drop << 23) + ((-(FIRST >> drop)) & 0xFF)
    bits = y.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & _MAGNITUDE, LARGEST)
    binade = tl.maximum(magnitude & _INFINITY, FIRST)
    moved = magnitude.to(tl.float32, bitcast=True) + (binade + shift).to(tl.float32, bitcast=True)
    code = (moved.to(tl.int32, bitcast=True) + (binade >> drop)) & 0xFF
    return code | ((bits >> (32 - BITS)) & (1 << (BITS - 1)))


@triton.jit
def unsigned_value(code, MANTISSA: tl.constexpr, FIRST: tl.constexpr):
    """Returns float32 of the magnitude part of a small float's code."""
    drop: tl.constexpr = 23 - MANTISSA
    one: tl.constexpr = 1 << MANTISSA
    bits = (code << drop) + FIRST
    # A code below the first binade is that many steps: exact as the difference of two neighbours of FIRST.
    first = tl.full(code.shape, FIRST, tl.int32).to(tl.float32, bitcast=True)
    below = bits.to(tl.float32, bitcast=True) - first
    return tl.where(code < one, below, (bits - (1 << 23)).to(tl.float32, bitcast=True))


@triton.jit
def float_value(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, FIRST: tl.constexpr):
    """Returns float32 values of the codes (int32) of a small float."""
    if BITS == 8 and MANTISSA == 2:  # e5m2 is the upper half of a float16
        values = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        magnitude = code & ((1 << (BITS - 1)) - 1)
        bits = unsigned_value(magnitude, MANTISSA, FIRST).to(tl.int32, bitcast=True)
        if BITS == 8:  # e4m3 has one NaN
            bits = tl.where(magnitude == 0x7F, _NAN, bits)
        values = (bits | ((code << (32 - BITS)) & _SIGN)).to(tl.float32, bitcast=True)
    return values


@triton.jit
def nearest_whole(y):
    """Returns `y` rounded to a whole number, ties to even, its sign kept; magnitudes above 2^22 become 2^22."""
    whole = tl.minimum(tl.abs(y), _WHOLE_LIMIT) + _WHOLE
    whole = whole - _WHOLE
    return (whole.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def integer_code(y, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Returns integer codes as float32; rounded before the zero point is added: a tie must not depend on it."""
    code = nearest_whole(y)
    if zero is not None:
        code = code + zero
    return tl.maximum(tl.minimum(code, HIGH * 1.0), LOW * 1.0)


@triton.jit
def codes_of(y, zero, FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr,
             HIGH: tl.constexpr):  # fmt: skip
    """Returns codes (int32, BITS wide) of values on a unit scale."""
    if FLOAT:
        codes = float_code(y, BITS, MANTISSA, LOW, HIGH)
    else:
        codes = integer_code(y, zero, LOW, HIGH).to(tl.int32) & ((1 << BITS) - 1)
    return codes


@triton.jit
def values_of(codes, zero, FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr):
    """Returns values on a unit scale (float32) of codes (int32)."""
    if FLOAT:
        values = float_value(codes, BITS, MANTISSA, LOW)
    else:
        top: tl.constexpr = 1 << (BITS - 1)
        values = ((codes ^ top) - top if LOW < 0 else codes).to(tl.float32)
        if zero is not None:
            values = values - zero
    return values


@triton.jit
def rounded(y, zero, FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr,
            HIGH: tl.constexpr):  # fmt: skip
    """Returns the nearest values on a unit scale; NaN stays NaN, the sign of zero is kept."""
    if FLOAT:
        values = float_value(float_code(y, BITS, MANTISSA, LOW, HIGH), BITS, MANTISSA, LOW)
    else:
        values = integer_code(y, zero, LOW, HIGH)
        if zero is not None:
            values = values - zero
    return tl.where(y != y, y, values)


# ---- bytes: the dense little-endian stream of the codes


@triton.jit
def store_codes(out, start, codes, left, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Writes COUNT codes, of which `left` exist, at position `start` (in values) of the stream."""
    if BITS == 4:
        low, high = tl.split(tl.reshape(codes, [COUNT // 2, 2]))
        index = tl.arange(0, COUNT // 2)
        tl.store(out + start // 2 + index, (low | (high << 4)).to(tl.uint8), mask=index * 2 < left)
    elif BITS == 6:
        even, odd = tl.split(tl.reshape(codes, [COUNT // 4, 2, 2]))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        index = tl.arange(0, COUNT // 4)
        word = c0 | (c1 << 6) | (c2 << 12) | (c3 << 18)
        at = out + start // 4 * 3 + index * 3
        tl.store(at, word.to(tl.uint8), mask=index * 4 < left)
        tl.store(at + 1, (word >> 8).to(tl.uint8), mask=index * 4 < left)
        tl.store(at + 2, (word >> 16).to(tl.uint8), mask=index * 4 < left)
    else:
        index = tl.arange(0, COUNT)
        tl.store(out + start + index, tl.reshape(codes, [COUNT]).to(tl.uint8), mask=index < left)


@triton.jit
def load_codes(packed, start, left, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Returns COUNT codes (int32) from position `start` (in values), of which `left` exist."""
    if BITS == 4:
        index = tl.arange(0, COUNT // 2)
        byte = tl.load(packed + start // 2 + index, mask=index * 2 < left, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(byte & 15, byte >> 4), [COUNT])
    elif BITS == 6:
        index = tl.arange(0, COUNT // 4)
        at = packed + start // 4 * 3 + index * 3
        word = tl.load(at, mask=index * 4 < left, other=0).to(tl.int32)
        word = word | (tl.load(at + 1, mask=index * 4 < left, other=0).to(tl.int32) << 8)
        word = word | (tl.load(at + 2, mask=index * 4 < left, other=0).to(tl.int32) << 16)
        even = tl.join(word & 63, (word >> 12) & 63)
        odd = tl.join((word >> 6) & 63, word >> 18)
        codes = tl.reshape(tl.join(even, odd), [COUNT])
    else:
        index = tl.arange(0, COUNT)
        codes = tl.load(packed + start + index, mask=index < left, other=0).to(tl.int32)
    return codes


# ---- scales


@triton.jit
def exponent_byte(peak, RULE: tl.constexpr, MAXIMUM: tl.constexpr, MAX_EXPONENT: tl.constexpr,
                  HALF_STEP: tl.constexpr):  # fmt: skip
    """Returns e8m0 bytes (int32) of the bits of the largest magnitudes, see scales._EXPONENT_RULES."""
    if RULE == "even":
        byte = ((peak + HALF_STEP) >> 23) - MAX_EXPONENT
    elif RULE == "floor":
        byte = (peak >> 23) - MAX_EXPONENT
    else:
        bits = peak
        less: tl.constexpr = 0 if RULE == "rceil" else MAX_EXPONENT
        if RULE == "rceil":
            largest = tl.full(peak.shape, MAXIMUM, tl.float32)
            bits = tl.div_rn(peak.to(tl.float32, bitcast=True), largest).to(tl.int32, bitcast=True)
        exact = tl.where(bits >> 23 == 0, 1 << 22, 0)
        byte = (bits >> 23) + ((bits & 0x7FFFFF) > exact).to(tl.int32) - less
    return tl.minimum(tl.maximum(byte, 0), 254)


@triton.jit
def power(byte):
    """Returns 2^(byte - 127) as float32; byte 0 is a subnormal, byte 255 NaN."""
    bits = tl.where(byte == 0, 1 << 22, byte << 23)
    return tl.where(byte == 255, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def plain_stored(scale, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """Returns a positive float32 scale rounded to a plain dtype.

    The result is (the stored value, as bits for bfloat16; its float32 value).
    """
    scale = tl.minimum(scale, LARGEST)
    if DTYPE == "bf16":
        bits = bfloat16_bits(scale)
        bits = tl.where(bits == 0, _ZERO_GROUP_BITS, bits)
        stored = bits.to(tl.int16)
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "f16":
        value = scale.to(tl.float16).to(tl.float32)
        value = tl.where(value == 0, _ZERO_GROUP_SCALE, value)
        stored = value.to(tl.float16)
    else:
        value = tl.where(scale == 0, _ZERO_GROUP_SCALE, scale)
        stored = value
    return stored, value


@triton.jit
def ends(values, CODES: tl.constexpr):
    """Returns both ends of the range of every row, zero in it; codes half a step beyond them stay finite float32."""
    most: tl.constexpr = 3.4028234663852886e38 * CODES / (CODES + 2)
    low = tl.minimum(tl.maximum(tl.min(values, axis=1), -most), 0.0)
    high = tl.maximum(tl.minimum(tl.max(values, axis=1), most), 0.0)
    return low, high


@triton.jit
def span_scale(low, high, CODES: tl.constexpr):
    """Returns the range over all codes; divided first where it does not fit a float32."""
    codes = tl.full(low.shape, CODES, tl.float32)
    width = high - low
    apart = tl.div_rn(high, codes) - tl.div_rn(low, codes)
    return tl.where(width < float("inf"), tl.div_rn(width, codes), apart)


@triton.jit
def float_stored(peak, outer, DTYPE: tl.constexpr, DIVISOR: tl.constexpr):
    """Returns e4m3 or e5m3 codes (int32) of the bits of the largest magnitudes. See scales.e4m3_scale, e5m3_scale."""
    amax = peak.to(tl.float32, bitcast=True)
    unit = tl.full(peak.shape, DIVISOR, tl.float32)
    if DTYPE == "e4m3":
        if outer is not None:
            unit = unit * outer
        scale = tl.maximum(tl.minimum(tl.div_rn(amax, unit), 448.0), 2.0**-9)
        code = float_code(tl.where(peak == 0, 1.0, scale), 8, 3, _E4M3_FIRST, _E4M3_MAX)
    else:
        scale = tl.div_rn(amax, unit)
        if outer is not None:
            scale = tl.div_rn(scale, tl.full(peak.shape, 1.0, tl.float32) * outer)
        code = tl.maximum(float_code(scale, 8, 3, _E5M3_FIRST, _E5M3_MAX), 1)
        code = tl.where(peak == 0, _E5M3_ONE, code)
    return code


@triton.jit
def stored_value(stored, DTYPE: tl.constexpr):
    """Returns float32 of stored scales, bytes as int32."""
    if DTYPE == "e8m0":
        value = power(stored)
    elif DTYPE == "e4m3":
        value = float_value(stored, 8, 3, _E4M3_FIRST)
    elif DTYPE == "e5m3":
        value = tl.where(stored == 255, float("nan"), unsigned_value(stored, 3, _E5M3_FIRST))
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def divided(values, scale, stored, DTYPE: tl.constexpr):
    """Returns `values` [n, size] divided by their scales [n]."""
    if DTYPE == "e8m0":  # exact, and cheaper than a division
        inverse = power(254 - stored)
        y = values * inverse[:, None]
    else:
        y = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    return y
