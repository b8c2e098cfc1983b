"""Exact grids of the element formats, as fractions, from their published definitions and not from our tables."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# exponent bits, mantissa bits, bias, number of finite non-negative codes (OCP MX v1.0, OFP8; e5m3: AMD Quark)
FLOATS = {
    "fp4_e2m1": (2, 1, 1, 8),
    "fp6_e2m3": (2, 3, 1, 32),
    "fp6_e3m2": (3, 2, 3, 32),
    "fp8_e4m3": (4, 3, 7, 127),
    "fp8_e5m2": (5, 2, 15, 124),
}
UNSIGNED_FLOATS = {"e5m3": (5, 3, 15, 255)}
# smallest code, largest code, denominator
INTEGERS = {
    "int2": (-2, 1, 1),
    "int3": (-4, 3, 1),
    "int4": (-8, 7, 1),
    "int8": (-128, 127, 1),
    "uint2": (0, 3, 1),
    "uint3": (0, 7, 1),
    "uint4": (0, 15, 1),
    "uint8": (0, 255, 1),
    "mxint8": (-127, 127, 64),
    "mx6": (-15, 15, 8),
    "mx9": (-127, 127, 64),
    "bfp16": (-128, 127, 64),
}


def magnitudes(name: str) -> list[Fraction]:
    """Values of the finite non-negative codes of a float, by code."""
    _, mantissa, bias, count = (FLOATS | UNSIGNED_FLOATS)[name]
    values = []
    for code in range(count):
        exponent, fraction = code >> mantissa, Fraction(code & ((1 << mantissa) - 1), 1 << mantissa)
        values.append((fraction if exponent == 0 else 1 + fraction) * Fraction(2) ** (max(exponent, 1) - bias))
    return values


def values(name: str) -> dict[int, Fraction]:
    """Code -> value of an integer; of a float without its negative half."""
    if name in INTEGERS:
        low, high, denominator = INTEGERS[name]
        return {code: Fraction(code, denominator) for code in range(low, high + 1)}
    return dict(enumerate(magnitudes(name)))


def nearest(value: Fraction, grid: list[Fraction], codes: list[int]) -> int:
    """The code of ascending `grid` nearest to `value`; of two equally near ones the even one."""
    above = bisect_left(grid, value)
    if above == 0:
        return codes[0]
    if above == len(grid):
        return codes[-1]
    down, up = value - grid[above - 1], grid[above] - value
    if down == up:
        return codes[above] if codes[above] % 2 == 0 else codes[above - 1]
    return codes[above] if up < down else codes[above - 1]


def code(value: float, name: str, rounding: str = "half_even", narrow: bool = False) -> int:
    """Exact code of a float: nearest, ties to the even code, or as `rounding` says; saturating; -0.0 keeps its sign."""
    if name in INTEGERS:
        low, high, denominator = INTEGERS[name]
        low = -high if narrow else low
        scaled = Fraction(value) * denominator
        whole = {
            "half_even": lambda: round(scaled),
            "floor": lambda: math.floor(scaled),
            "round": lambda: math.copysign(math.floor(abs(scaled) + Fraction(1, 2)), scaled),
        }[rounding]()
        return int(min(max(whole, low), high))
    grid = magnitudes(name)
    own = nearest(abs(Fraction(value)), grid, list(range(len(grid))))
    exponent, mantissa, _, _ = FLOATS[name]
    return own | (math.copysign(1.0, value) < 0) << (exponent + mantissa)


def probes(grid: list[Fraction]) -> NDArray[np.float32]:
    """Every value of an ascending grid, every midpoint, what lies beyond both ends, and their float32 neighbours."""
    middles = [(a + b) / 2 for a, b in pairwise(grid)]
    step = grid[-1] - grid[-2]
    ends = [grid[-1] + step / 2, grid[-1] + step, grid[-1] * 2, grid[0] - step, grid[0] * 2]
    exact = np.array([float(value) for value in (*grid, *middles, *ends)], dtype=np.float64).astype(np.float32)
    below, above = np.nextafter(exact, np.float32(-np.inf)), np.nextafter(exact, np.float32(np.inf))
    return np.concatenate([exact, below, above, np.float32([0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38])])
