"""Independent numpy references: codes by table search in float64, scales by numpy and ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# (exponent bits, mantissa bits, bias, number of finite non-negative codes), from the OCP MX and OFP8 documents.
FLOATS = {
    "fp4_e2m1": (2, 1, 1, 8),
    "fp6_e2m3": (2, 3, 1, 32),
    "fp6_e3m2": (3, 2, 3, 32),
    "fp8_e4m3": (4, 3, 7, 127),
    "fp8_e5m2": (5, 2, 15, 124),
}
ML_DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


def table(name: str) -> NDArray[np.float64]:
    """Values of the finite non-negative codes."""
    _, mantissa, bias, count = FLOATS[name]
    code = np.arange(count)
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    subnormal = np.ldexp(fraction.astype(np.float64), 1 - bias - mantissa)
    normal = np.ldexp(1 + fraction / (1 << mantissa), exponent - bias)
    return np.where(exponent == 0, subnormal, normal)


def nearest_code(y: NDArray, name: str) -> NDArray[np.int64]:
    """Non-negative code nearest to |y|; at a midpoint the even one."""
    values = table(name)
    magnitude = np.minimum(np.abs(y.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = magnitude - values[above - 1], values[above] - magnitude
    tie = np.where((above - 1) % 2 == 0, above - 1, above)
    return np.where(low == high, tie, np.where(low < high, above - 1, above))


def float_codes(y: NDArray, name: str) -> NDArray[np.uint8]:
    """Bit patterns with the sign of `y`."""
    exponent, mantissa, _, _ = FLOATS[name]
    sign = np.signbit(y).astype(np.int64) << (exponent + mantissa)
    return (nearest_code(y, name) | sign).astype(np.uint8)


def float_values(y: NDArray, name: str) -> NDArray[np.float64]:
    return np.copysign(table(name)[nearest_code(y, name)], y)


def ties(name: str) -> NDArray[np.float32]:
    """Midpoints between neighbouring values with both float32 neighbours, both signs."""
    values = table(name)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
    return np.concatenate([near, -near])


def grouped(x: NDArray, size: int) -> NDArray:
    return x.reshape(x.shape[0], -1, size)


def nvfp4(x: NDArray[np.float32]) -> tuple[NDArray, NDArray, np.float32, NDArray[np.float64]]:
    """Codes, e4m3 bytes, global scale, exact values."""
    outer = np.float32(np.abs(x).max() / np.float32(2688))
    blocks = grouped(x, 16)
    amax = np.abs(blocks).max(-1)
    inner = np.clip(amax / (np.float32(6) * outer), np.float32(2**-9), np.float32(448))
    inner = np.where(amax == 0, np.float32(1), inner).astype(ml_dtypes.float8_e4m3fn)
    scale = (inner.astype(np.float32) * outer)[..., None]
    y = blocks / scale
    values = float_values(y, "fp4_e2m1") * scale.astype(np.float64)
    return float_codes(y, "fp4_e2m1").reshape(x.shape), inner.view(np.uint8), outer, values.reshape(x.shape)


def mxfp4_even(x: NDArray[np.float32]) -> tuple[NDArray, NDArray, NDArray[np.float64]]:
    """Codes, e8m0 bytes, exact values: the exponent goes up when the significand of amax is at least 1.75."""
    blocks = grouped(x, 32).astype(np.float64)
    significand, exponent = np.frexp(np.abs(blocks).max(-1))  # amax = significand * 2^exponent, significand in [.5, 1)
    power = np.clip(exponent - 1 + (2 * significand >= 1.75) - 2, -127, 127)
    power = np.where(significand == 0, -127, power)
    y = np.ldexp(blocks, -power[..., None])
    values = np.ldexp(float_values(y, "fp4_e2m1"), power[..., None])
    return float_codes(y, "fp4_e2m1").reshape(x.shape), (power + 127).astype(np.uint8), values.reshape(x.shape)


def int4_half_range(x: NDArray[np.float32], size: int) -> tuple[NDArray, NDArray, NDArray[np.float64]]:
    """Codes, float32 scales, exact values."""
    blocks = grouped(x, size)
    scale = np.abs(blocks).max(-1) / np.float32(7.5)
    scale = np.where(scale == 0, np.float32(2**-23), scale)
    codes = np.clip(np.rint((blocks / scale[..., None]).astype(np.float64)), -8, 7)
    values = codes * scale[..., None].astype(np.float64)
    return codes.reshape(x.shape), scale, values.reshape(x.shape)
