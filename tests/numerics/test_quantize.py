"""Tensors and specs: whole-chain references, properties, degenerate input, refusals, error on Gaussian data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarkcli.errors import DataError, ModelError
from quarkcli.numerics import chunks
from quarkcli.numerics.quantize import (
    decode,
    dequantize,
    effective_scale,
    encode,
    encode_grid,
    fake_quantize,
    fixed_scale,
    make_qparams,
    quantize,
    round_to_grid,
    tensor_amax,
)
from quarkcli.spec import ELEMENTS, PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

from . import reference

F32 = ScaleSpec("f32")
NVFP4 = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32))
MXFP4 = TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even"))
MXFP6 = TensorSpec("fp6_e3m2", PerGroup(32), ScaleSpec("e8m0", "even"))
MXFP8 = TensorSpec("fp8_e4m3", PerGroup(32), ScaleSpec("e8m0", "rceil"))
INT4 = TensorSpec("int4", PerGroup(64), ScaleSpec("f32", "half_range"))
INT4_MODEL = TensorSpec("int4", PerGroup(64), ScaleSpec("model", "half_range"))
INT8 = TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "absmax"))
FP8 = TensorSpec("fp8_e4m3", PerTensor(), F32)
FP8_CHANNEL = TensorSpec("fp8_e4m3", PerChannel(0), F32)
FP8_TILE = TensorSpec("fp8_e4m3", PerTile(3, 64), F32)
SPECS = {
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "mxfp6": MXFP6,
    "mxfp8": MXFP8,
    "int4": INT4,
    "int4_model": INT4_MODEL,
    "int8": INT8,
    "fp8": FP8,
    "fp8_channel": FP8_CHANNEL,
    "fp8_tile": FP8_TILE,
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def awkward(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different magnitude, zeros, negative zeros, one outlier."""
    x = gaussian(rows, cols, seed=seed)
    x *= torch.exp2(torch.linspace(-18, 6, rows)).unsqueeze(1)
    x[0, : cols // 2] = 0.0
    x[1] *= -0.0
    x[2, 5] = 300.0
    return x


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x.view(torch.int32)


# --- the whole chain against numpy in float64 ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_equals_the_reference(dtype: torch.dtype) -> None:
    x = awkward(48, 128).to(dtype)
    codes, inner, outer, values = reference.nvfp4(x.float().numpy())
    result = quantize(x, NVFP4)
    assert result.params.global_scale is not None
    assert result.params.global_scale.numpy() == outer
    assert np.array_equal(bits(result.params.scale).numpy(), inner)
    assert np.array_equal(result.codes.numpy(), codes)
    assert np.array_equal(dequantize(result, NVFP4).numpy(), values.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_equals_the_reference(dtype: torch.dtype) -> None:
    x = awkward(48, 128).to(dtype)
    codes, scale, values = reference.mxfp4_even(x.float().numpy())
    result = quantize(x, MXFP4)
    assert np.array_equal(result.params.scale.numpy(), scale)
    assert np.array_equal(result.codes.numpy(), codes)
    assert np.array_equal(dequantize(result, MXFP4).numpy().astype(np.float64), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_equals_the_reference(dtype: torch.dtype) -> None:
    x = awkward(48, 128).to(dtype)
    codes, scale, values = reference.int4_half_range(x.float().numpy(), 64)
    result = quantize(x, INT4)
    assert np.array_equal(result.params.scale.numpy(), scale)
    assert np.array_equal(result.codes.numpy(), codes)
    assert np.array_equal(dequantize(result, INT4).numpy(), values.astype(np.float32))


def test_fp8_per_channel_equals_ml_dtypes() -> None:
    x = awkward(16, 96)
    result = quantize(x, FP8_CHANNEL)
    amax = x.abs().amax(1, keepdim=True).numpy()
    scale = np.where(amax == 0, np.float32(2**-23), amax / np.float32(448))
    assert np.array_equal(result.params.scale.numpy(), scale)
    want = np.clip(x.numpy() / scale, -448, 448).astype(reference.ML_DTYPES["fp8_e4m3"])
    assert np.array_equal(bits(result.codes).numpy(), want.view(np.uint8))


def test_tiles_equal_a_loop_over_tiles() -> None:
    x = gaussian(8, 150)  # ragged in both directions
    result = quantize(x, FP8_TILE)
    values = dequantize(result, FP8_TILE)
    assert result.params.scale.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            tile = x[3 * i : 3 * i + 3, 64 * j : 64 * j + 64]
            alone = quantize(tile.contiguous(), FP8)
            assert result.params.scale[i, j] == alone.params.scale
            assert torch.equal(values[3 * i : 3 * i + 3, 64 * j : 64 * j + 64], dequantize(alone, FP8))


# --- shapes and dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        (FP8, (), torch.float32),
        (FP8_CHANNEL, (6, 1), torch.float32),
        (FP8_TILE, (2, 2), torch.float32),
        (INT4_MODEL, (6, 2), torch.bfloat16),
        (MXFP4, (6, 4), torch.uint8),
        (NVFP4, (6, 8), torch.float8_e4m3fn),
    ],
)
def test_scales_have_their_stored_shape_and_dtype(spec: TensorSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    params = make_qparams(gaussian(6, 128, dtype=torch.bfloat16), spec)
    assert params.scale.shape == shape
    assert params.scale.dtype == dtype
    assert (params.global_scale is not None) == (spec is NVFP4)


@every_spec
def test_effective_scale_times_unit_values_is_the_dequantized_weight(spec: TensorSpec) -> None:
    x = awkward(9, 128)
    result = quantize(x, spec)
    scale = effective_scale(result.params, spec, x.shape)
    group = torch.arange(128) // (spec.group_size or 128)
    grid = round_to_grid(x / scale[:, group], spec.format)
    assert torch.equal(grid * scale[:, group], dequantize(result, spec))
    assert torch.equal(bits(encode_grid(grid, spec.format)), bits(result.codes))


@every_spec
def test_chunks_do_not_change_the_result(spec: TensorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    x = awkward(10, 128).bfloat16()
    whole, fake = quantize(x, spec), fake_quantize(x, spec)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 300)
    parts = quantize(x, spec)
    assert torch.equal(bits(whole.codes), bits(parts.codes))
    assert torch.equal(whole.params.scale.float(), parts.params.scale.float())
    assert torch.equal(fake, fake_quantize(x, spec))
    assert torch.equal(dequantize(whole, spec), dequantize(parts, spec))


@every_spec
def test_strided_weights_are_coded_by_value(spec: TensorSpec) -> None:
    x = awkward(12, 128)
    strided = x.t().contiguous().t()
    assert torch.equal(bits(quantize(strided, spec).codes), bits(quantize(x, spec).codes))


# --- properties ---------------------------------------------------------------------------------------------------


@every_spec
def test_fake_quantization_is_dequantized_quantization(spec: TensorSpec) -> None:
    x = awkward(12, 128)
    assert torch.equal(fake_quantize(x, spec), dequantize(quantize(x, spec), spec))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(["mxfp4", "mxfp6", "mxfp8", "fp8", "fp8_channel", "fp8_tile"]))
def test_fake_quantization_is_idempotent(seed: int, name: str) -> None:
    """With power-of-two scales, and with plain ones when the scale is kept."""
    x = gaussian(6, 128, seed=seed)
    spec = SPECS[name]
    if spec.scale.dtype == "e8m0":
        once = fake_quantize(x, spec)
        assert torch.equal(fake_quantize(once, spec), once)
        return
    params = make_qparams(x, spec)
    once = decode(encode(x, spec, params), spec, params)
    assert torch.equal(decode(encode(once, spec, params), spec, params), once)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-20, 20), name=st.sampled_from(sorted(SPECS)))
def test_powers_of_two_pass_through(seed: int, power: int, name: str) -> None:
    x = gaussian(6, 128, seed=seed)
    scaled = quantize(x * 2.0**power, SPECS[name])
    assert torch.equal(bits(scaled.codes), bits(quantize(x, SPECS[name]).codes))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), start=st.integers(0, 3), name=st.sampled_from(sorted(SPECS)))
def test_slices_equal_the_whole(seed: int, start: int, name: str) -> None:
    """Rows coded alone, with the amax of the whole tensor, are the same rows."""
    x = gaussian(9, 128, seed=seed)
    whole = quantize(x, SPECS[name])
    part = slice(3 * (start % 3), 3 * (start % 3) + 3)  # whole tiles of three rows
    alone = quantize(x[part], SPECS[name], amax=tensor_amax(x))
    assert torch.equal(bits(alone.codes), bits(whole.codes[part]))


@every_spec
def test_values_keep_their_order_within_a_group(spec: TensorSpec) -> None:
    x = gaussian(4, 16, seed=2).sort(1).values.repeat_interleave(8, 1)
    values = fake_quantize(x, spec)
    assert bool((values[:, 1:16] >= values[:, :15]).all())


@every_spec
def test_a_larger_scale_group_only_changes_tensor_scales(spec: TensorSpec) -> None:
    x = gaussian(6, 128)
    shared = make_qparams(x, spec, amax=tensor_amax(x) * 3)
    own = make_qparams(x, spec)
    assert torch.equal(shared.scale.float(), own.scale.float()) == (not spec.has_tensor_scale)


# --- degenerate input ---------------------------------------------------------------------------------------------


@every_spec
def test_all_zero_weights(spec: TensorSpec) -> None:
    x = torch.zeros(6, 128)
    x[3] = -0.0
    result = quantize(x, spec)
    values = dequantize(result, spec)
    assert torch.equal(values, torch.zeros(6, 128))
    scale = result.params.scale
    expected = {"e8m0": 0, "e4m3": 0x38}
    if spec.scale.dtype in expected:
        assert bool((bits(scale) == expected[spec.scale.dtype]).all())
    else:
        assert bool((scale == 2.0**-23).all())
    if spec.scale.global_scale:
        assert result.params.global_scale == 1
    if spec.format.kind == "float":
        assert bool(values[3].signbit().all())
        assert not bool(values[0].signbit().any())


@every_spec
@pytest.mark.parametrize("value", [1e-45, 1e-40, 2.0**-126, 1e38], ids=["min", "sub", "tiny", "big"])
def test_extreme_magnitudes_stay_finite(spec: TensorSpec, value: float) -> None:
    x = torch.full((6, 128), value)
    x[:, ::3] *= -0.5
    values = dequantize(quantize(x, spec), spec)
    assert bool(values.isfinite().all())
    assert bool((values.abs() <= x.abs().max() * 1.15).all())
    if value > 1e-30:
        assert torch.allclose(values, x, rtol=0.15)


def test_codes_of_float_max_are_ordinary() -> None:
    """Its decoded value may round up to 2^128 and so overflow float32; codes and scales are still the right ones."""
    x = torch.full((1, 32), torch.finfo(torch.float32).max)
    result = quantize(x, MXFP4)
    assert result.params.scale.tolist() == [[253]]
    assert result.codes.unique().tolist() == [6]  # 4 * 2^126


@every_spec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_by_position(spec: TensorSpec, value: float) -> None:
    x = gaussian(6, 128, dtype=torch.bfloat16)
    x[4, 77] = value
    with pytest.raises(DataError, match=r"\[4, 77\]"):
        quantize(x, spec)
    with pytest.raises(DataError, match=r"\[4, 77\]"):
        quantize(x, spec, amax=torch.tensor(1.0))
    with pytest.raises(DataError, match=r"\[4, 77\]"):
        tensor_amax(x)


@pytest.mark.parametrize("spec", [NVFP4, MXFP4, INT4])
def test_rows_that_do_not_hold_whole_groups_are_refused(spec: TensorSpec) -> None:
    with pytest.raises(ModelError, match="40 is not divisible"):
        quantize(torch.ones(2, 40), spec)
    with pytest.raises(ModelError, match="40 is not divisible"):
        fake_quantize(torch.ones(2, 40), spec)


def test_amax() -> None:
    assert tensor_amax(torch.tensor([[1.0, -3.0], [2.0, 0.5]])) == 3
    assert tensor_amax(torch.tensor(-2.0)) == 2
    assert tensor_amax(torch.zeros(0, 4)) == 0
    assert tensor_amax(gaussian(2, 3, 5)).dtype == torch.float32


def test_round_to_grid_leaves_its_argument_alone() -> None:
    y = torch.tensor([2.5, -0.2, 100.0])
    assert round_to_grid(y, ELEMENTS["fp4_e2m1"]).tolist() == [2.0, -0.0, 6.0]
    assert y.tolist() == [2.5, pytest.approx(-0.2), 100.0]


def test_a_stored_scale_goes_to_the_device_of_the_activation() -> None:
    """Scales of a source come from files, while activations are where the model runs."""
    spec = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32"))
    found = fixed_scale(spec, torch.tensor(0.5), torch.device("meta"))
    assert found is not None and found.device.type == "meta"
