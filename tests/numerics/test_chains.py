"""Chains and zero points against float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from quarkcli.errors import ConfigError
from quarkcli.numerics.quantize import (
    decode,
    dequantize,
    encode,
    fake_quantize,
    grid,
    make_qparams,
    quantize,
    static_scale,
    tensor_amax,
)
from quarkcli.numerics.solve import factorize
from quarkcli.spec import PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec
from tests.numerics.columns import solve

from . import specs

F32, HALF = specs.F32, specs.HALF
INT4_FP8 = specs.SCHEMES["int4_fp8"]


def weight(seed: int = 0, rows: int = 24, cols: int = 128) -> Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return x * torch.exp2(torch.linspace(-3, 3, rows))[:, None]


def e4m3(y: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(y, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def int4_codes(x: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """The quotient is float32, as in every tool; the rest is exact."""
    return np.clip(np.rint((x / scale).astype(np.float64)), -8, 7)


def int4_fp8(x: NDArray[np.float32]) -> tuple[np.float32, NDArray[np.float32], NDArray[np.float64]]:
    """AMD Quark's int4_fp8: both scales and the codes."""
    first = np.abs(x).max() / np.float32(448)
    y = e4m3(x / first)
    second = np.abs(y).max(1, keepdims=True) / np.float32(7.5)
    return first, second, int4_codes(y, second)


def test_last_stored_equals_the_formula() -> None:
    x = weight()
    first, second, codes = int4_fp8(x.numpy())
    result = quantize(x, INT4_FP8)
    assert result.codes.dtype == torch.int8
    assert np.array_equal(result.codes.numpy(), codes)
    assert result.params.scale == float(first)
    assert result.params.then is not None
    assert np.array_equal(result.params.then.scale.numpy(), second)
    values = codes * second.astype(np.float64) * np.float64(first)
    assert np.allclose(dequantize(result, INT4_FP8).numpy(), values, rtol=1e-6, atol=0)


def test_last_stored_with_the_amax_of_a_scale_group() -> None:
    x = weight()
    amax = tensor_amax(x) * 4
    result = quantize(x, INT4_FP8, amax=amax)
    assert result.params.scale == amax / 448
    y = e4m3((x / (amax / 448)).numpy())
    assert result.params.then is not None
    assert np.array_equal(result.params.then.scale.numpy(), np.abs(y).max(1, keepdims=True) / np.float32(7.5))


def test_both_stages_of_a_scale_group_agree() -> None:
    """Where the second stage too has one scale, it follows from the amax of the group, whoever has it."""
    spec = replace(INT4_FP8, then=replace(INT4_FP8.then, granularity=PerTensor()))
    x, y = weight(1), weight(2) / 5
    amax = torch.maximum(tensor_amax(x), tensor_amax(y))
    of_x, of_y = (make_qparams(each, spec, amax=amax) for each in (x, y))
    assert of_x.scale == of_y.scale
    assert of_x.then is not None
    assert of_y.then is not None
    assert of_x.then.scale == of_y.then.scale
    alone = make_qparams(x, spec)  # x has the largest value
    assert alone.then is not None
    assert alone.then.scale == of_x.then.scale == torch.tensor(448 / 7.5)


def w4a8(x: NDArray[np.float32]) -> tuple[NDArray, NDArray, np.float32, NDArray]:
    """ModelOpt's list of quantizers: int4 groups of 32, then e4m3 per tensor of what they give."""
    runs = x.reshape(x.shape[0], -1, 32)
    scale = np.abs(runs).max(-1, keepdims=True) / np.float32(7.5)
    codes = int4_codes(runs, scale)
    values = (codes.astype(np.float32) * scale).reshape(x.shape)
    second = np.abs(values).max() / np.float32(448)
    return codes.reshape(x.shape), scale[..., 0], second, e4m3(values / second) * second


def test_first_stored_equals_the_formula() -> None:
    x = weight()
    codes, scale, second, values = w4a8(x.numpy())
    result = quantize(x, specs.W4A8)
    assert np.array_equal(result.codes.numpy(), codes)
    assert np.array_equal(result.params.scale.numpy(), scale)
    assert result.params.then is not None
    assert result.params.then.scale == float(second)
    assert np.array_equal(dequantize(result, specs.W4A8).numpy(), values)


def test_first_stored_with_a_scale_group_reaches_as_far_as_a_half_range_does() -> None:
    """amax / 7.5 sends -amax to code -8, 8 / 7.5 of amax."""
    x = -weight().abs()
    amax = tensor_amax(x)
    shared, own = make_qparams(x, specs.W4A8, amax=amax), make_qparams(x, specs.W4A8)
    assert shared.then is not None
    assert own.then is not None
    assert torch.allclose(shared.then.scale, own.then.scale, rtol=1e-6)
    assert shared.then.scale == amax * (8 / 7.5) / 448


@pytest.mark.parametrize("name", specs.CHAINS)
def test_chains_fake_quantize_one_stage_after_the_other(name: str) -> None:
    spec = specs.CHAINS[name]
    assert spec.then is not None
    x = weight()
    first = dequantize(quantize(x, replace(spec, then=None, stored="first")), replace(spec, then=None, stored="first"))
    assert torch.equal(fake_quantize(x, spec), dequantize(quantize(first, spec.then), spec.then))


def test_a_static_scale_is_that_of_the_static_stage() -> None:
    token = TensorSpec("int4", PerChannel(0), ScaleSpec("f32", "half_range", "dynamic"))
    spec = TensorSpec("fp8_e4m3", PerTensor(), F32, then=token)
    x, scale = weight(), static_scale(torch.tensor(4.0), TensorSpec("fp8_e4m3", PerTensor(), F32))
    first = e4m3(x.numpy() / scale.numpy()) * scale.numpy()
    second = np.abs(first).max(1, keepdims=True) / np.float32(7.5)
    assert np.array_equal(
        fake_quantize(x, spec, scale).numpy(), (int4_codes(first, second) * second).astype(np.float32)
    )


@pytest.mark.parametrize("name", specs.CHAINS)
def test_solving_without_error_feedback_is_rounding(name: str) -> None:
    """The grid of a chain is that of its stored codes; a first stage below contributes its scale."""
    spec, x = specs.CHAINS[name], weight()
    params = make_qparams(x, spec)
    factor = factorize(torch.eye(x.shape[1]))
    assert factor is not None
    codes = solve(x, factor, grid(params, spec, x.shape)).codes
    if spec.codes is spec:
        assert torch.equal(codes, encode(x, spec, params))
    else:  # the rounding of the first stage is left out, which can only help
        error = (decode(codes, spec, params) - x).square().sum()
        assert error <= (decode(encode(x, spec, params), spec, params) - x).square().sum()


# --- zero points -----------------------------------------------------------------------------------------------------


def asymmetric(element: str, zero: str, **more: object) -> TensorSpec:
    return TensorSpec(element, PerGroup(32), HALF, zero, **more)  # type: ignore[arg-type]


def shifted() -> Tensor:
    """Groups that contain zero, lie above it, lie below it, and are constant."""
    x = weight()
    x[4:8] = x[4:8].abs() + 1
    x[8:12] = -x[8:12].abs() - 1
    x[12] = 3.0
    x[13] = -3.0
    return x


def codes_range(element: str) -> tuple[int, int]:
    return {"uint2": (0, 3), "uint4": (0, 15), "uint8": (0, 255), "int4": (-8, 7), "int8": (-128, 127)}[element]


@pytest.mark.parametrize("element", ["uint2", "uint4", "uint8", "int4", "int8"])
def test_whole_zero_points_equal_the_formula(element: str) -> None:
    x = shifted()
    low, high = codes_range(element)
    runs = x.numpy().reshape(24, -1, 32)
    least, most = np.minimum(runs.min(-1, keepdims=True), 0), np.maximum(runs.max(-1, keepdims=True), 0)
    scale = (most - least) / np.float32(high - low)
    zero = np.clip(low - np.rint(least / scale), low, high)
    codes = np.clip(np.rint(runs / scale) + zero, low, high)
    values = (codes - zero) * scale.astype(np.float64)
    spec = asymmetric(element, "int")
    result = quantize(x, spec)
    assert result.params.zero_point is not None
    assert result.params.zero_point.dtype == result.codes.dtype
    assert np.array_equal(result.params.zero_point.numpy(), zero[..., 0])
    assert np.array_equal(result.codes.numpy(), codes.reshape(x.shape))
    assert np.allclose(dequantize(result, spec).numpy(), values.reshape(x.shape), rtol=1e-6, atol=0)
    assert np.abs(values - runs).max() <= scale.max()
    x[:, 3] = 0.0
    assert bool((dequantize(quantize(x, spec), spec)[:, 3] == 0).all())  # zero is always a value


@pytest.mark.parametrize("element", ["uint2", "uint4", "uint8", "int4"])
def test_real_zero_points_equal_the_formula(element: str) -> None:
    """Both ends are values: better than whole zero points for a range far from zero, but zero is no value any more."""
    x = shifted()
    low, high = codes_range(element)
    runs = x.numpy().reshape(24, -1, 32)
    least, most = runs.min(-1, keepdims=True), runs.max(-1, keepdims=True)
    scale = (most - least) / np.float32(high - low)
    scale = np.where(scale <= 2.0**-23, np.float32(1), scale)
    zero = np.float32(low) - least / scale
    codes = np.clip(np.rint(runs / scale + zero), low, high)
    spec = asymmetric(element, "float")
    result = quantize(x, spec)
    assert result.params.zero_point is not None
    assert result.params.zero_point.dtype == torch.float32
    assert np.array_equal(result.params.zero_point.numpy(), zero[..., 0])
    assert np.array_equal(result.codes.numpy(), codes.reshape(x.shape))
    values = dequantize(result, spec).numpy().reshape(runs.shape)
    assert np.allclose(values, (codes - zero.astype(np.float64)) * scale, rtol=1e-5, atol=1e-5)
    assert np.allclose(values.min(-1), runs.min(-1), rtol=1e-5)
    assert np.allclose(values.max(-1), runs.max(-1), rtol=1e-5)
    assert torch.allclose(dequantize(result, spec)[12:14], x[12:14])  # constant groups are exact


EXACT_ROUNDINGS = {"floor": np.floor, "round": lambda y: np.trunc(y + np.copysign(0.5, y))}


@pytest.mark.parametrize(("rounding", "exact"), EXACT_ROUNDINGS.items())
def test_roundings_reach_the_codes(rounding: str, exact: object) -> None:
    spec = TensorSpec("int4", PerGroup(32), HALF, rounding=rounding)  # type: ignore[arg-type]
    x = weight()
    runs = x.numpy().reshape(24, -1, 32)
    scale = np.abs(runs).max(-1, keepdims=True) / np.float32(7.5)
    want = np.clip(exact((runs / scale).astype(np.float64)), -8, 7)  # type: ignore[operator]
    assert np.array_equal(quantize(x, spec).codes.numpy(), want.reshape(x.shape))


def test_narrow_ranges_leave_the_lowest_code_out() -> None:
    x = -weight().abs()
    wide = TensorSpec("int8", PerChannel(0), HALF)
    narrow = replace(wide, narrow=True)
    assert quantize(x, wide).codes.min() == -128
    assert quantize(x, narrow).codes.min() == -127
    assert torch.equal(make_qparams(x, narrow).scale, x.abs().amax(1, keepdim=True) / 127)


def test_a_static_activation_has_no_zero_point() -> None:
    spec = TensorSpec("uint8", PerTensor(), F32, "int")
    with pytest.raises(ConfigError, match="cannot have a zero point"):
        fake_quantize(weight(), spec, torch.tensor(0.1))


def test_solving_with_real_zero_points_and_rounding_down() -> None:
    """A value less its zero point may lie an ulp below its code; the code must not fall."""
    spec = asymmetric("uint4", "float", rounding="floor")
    x = shifted()
    factor = factorize(torch.eye(x.shape[1]))
    assert factor is not None
    params = make_qparams(x, spec)
    assert torch.equal(solve(x, factor, grid(params, spec, x.shape)).codes, encode(x, spec, params))
