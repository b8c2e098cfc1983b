"""Scale rules against exact arithmetic (math.frexp, fractions) and ml_dtypes."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from quarkcli.errors import ConfigError
from quarkcli.numerics import scales
from quarkcli.spec import ELEMENTS, PerGroup, ScaleSpec, TensorSpec

INT4 = TensorSpec("int4", PerGroup(32), ScaleSpec("model", "half_range"))
BLOCKS = ScaleSpec("e4m3", "absmax", global_scale=ScaleSpec("f32"))

FLOATS = ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"]


def exact_byte(amax: float, name: str, rule: str) -> int:
    """The e8m0 byte from exact rational arithmetic (rceil: on the float32 quotient, as defined)."""
    if amax == 0:
        return 0
    element = ELEMENTS[name]
    if rule == "rceil":
        quotient = float(np.float32(amax) / np.float32(element.maximum))
        return 0 if quotient == 0 else clamp(ceil_log2(Fraction(quotient)))
    value = Fraction(amax)
    floor = math.frexp(amax)[1] - 1
    if rule == "floor":
        exponent = floor
    elif rule == "ceil":
        exponent = ceil_log2(value)
    else:
        significand = value / Fraction(2) ** floor
        exponent = floor + (significand >= 2 - Fraction(1, 2 ** (element.mantissa + 1)))
    return clamp(exponent - element.max_exponent)


def ceil_log2(value: Fraction) -> int:
    exponent = math.frexp(float(value))[1] - 1
    return exponent if Fraction(2) ** exponent == value else exponent + 1


def clamp(exponent: int) -> int:
    return max(-127, min(127, exponent)) + 127


def awkward_amax() -> np.ndarray:
    """Powers of two and significands at every threshold with their float32 neighbours, over the whole range."""
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64))
    base = np.concatenate([powers * s for s in (1, 1.5, 1.75, 1.875, 1.9375)]).astype(np.float32)
    base = np.concatenate([base, powers.astype(np.float32) * np.float32(6), powers.astype(np.float32) * np.float32(7)])
    base = base[np.isfinite(base)]
    near = np.concatenate([base, np.nextafter(base, np.float32(0)), np.nextafter(base, np.float32(3e38)), [0.0]])
    return near[near >= 0].astype(np.float32)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("rule", ["even", "floor", "ceil", "rceil"])
@pytest.mark.parametrize("name", FLOATS)
def test_exponent_bytes_are_exact(name: str, rule: str) -> None:
    amax = awkward_amax()
    got = scales.e8m0_scale(scales.Range(torch.from_numpy(amax)), ELEMENTS[name], rule).numpy()
    want = np.array([exact_byte(float(a), name, rule) for a in amax])
    wrong = np.nonzero(got != want)[0]
    assert wrong.size == 0, (amax[wrong[:5]], got[wrong[:5]], want[wrong[:5]])


def test_log2_traps_of_other_tools() -> None:
    """Largest float below a power of two, just above one, and a quotient just above one: all off by one with log2."""
    fp4 = ELEMENTS["fp4_e2m1"]
    assert scales.e8m0_scale(scales.Range(torch.tensor(7.5231634e-37)), fp4, "floor") == 4
    assert scales.e8m0_scale(scales.Range(torch.tensor(7.523165e-37)), fp4, "ceil") == 6
    assert scales.e8m0_scale(scales.Range(torch.tensor(3072.00024)), fp4, "rceil") == 137
    assert scales.e8m0_scale(scales.Range(torch.tensor(3e38)), fp4, "even") == 253


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_scales_are_rounded_once_and_never_zero(dtype: torch.dtype) -> None:
    amax = torch.tensor([0.0, 1e-45, 0.75, 3.0, 3.4e38])
    got = scales.plain_scale(scales.Range(amax), INT4, dtype)
    assert got.dtype == dtype
    assert bool((got > 0).all())
    assert bool(got.isfinite().all())
    assert got[0] == 2.0**-23
    assert got[2] == torch.tensor(np.float32(0.75) / np.float32(7.5)).to(dtype)


def test_divisors() -> None:
    assert scales.divisor(ELEMENTS["int4"], "half_range") == 7.5
    assert scales.divisor(ELEMENTS["int8"], "half_range") == 127.5
    assert scales.divisor(ELEMENTS["int4"], "absmax") == 7
    assert scales.divisor(ELEMENTS["fp8_e4m3"], "absmax") == 448


def test_block_scales_equal_ml_dtypes() -> None:
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(1)).pow(8) * 3
    outer = scales.global_scale(amax.max(), ELEMENTS["fp4_e2m1"], BLOCKS)
    got = scales.e4m3_scale(amax, ELEMENTS["fp4_e2m1"], "absmax", outer).view(torch.uint8).numpy()
    raw = amax.numpy() / (np.float32(6) * outer.numpy())
    want = np.clip(raw, np.float32(2**-9), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(got, want)
    assert (got == 1).any(), "the smallest scale should be tested"


def test_zero_conventions_of_two_level_scales() -> None:
    fp4 = ELEMENTS["fp4_e2m1"]
    zero = torch.zeros(2)
    assert scales.global_scale(zero.max(), fp4, BLOCKS) == 1
    assert scales.e4m3_scale(zero, fp4, "absmax", torch.tensor(1.0)).view(torch.uint8).tolist() == [0x38, 0x38]
    tiny = scales.global_scale(torch.tensor(1e-44), fp4, BLOCKS)
    assert tiny * 2.0**-9 > 0


def test_rules_that_do_not_fit_the_scale_dtype_are_refused() -> None:
    with pytest.raises(ConfigError, match="even"):
        scales.plain_scale(scales.Range(torch.ones(1)), replace(INT4, scale=ScaleSpec("f32", "even")), torch.float32)
    with pytest.raises(ConfigError, match="absmax"):
        scales.e8m0_scale(scales.Range(torch.ones(1)), ELEMENTS["fp4_e2m1"], "absmax")
