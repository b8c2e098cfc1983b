"""Fake quantization of activations: static, dynamic and constant scales, odd input."""

from __future__ import annotations

import pytest
import torch

from quarkcli.errors import DataError
from quarkcli.numerics.quantize import dequantize, fake_quantize, quantize, static_scale
from quarkcli.spec import PerGroup, PerTensor, PerToken, ScaleSpec, TensorSpec

F32 = ScaleSpec("f32")
NVFP4 = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32))
MXFP4 = TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even"))
FP8 = TensorSpec("fp8_e4m3", PerTensor(), F32)
TOKEN = TensorSpec("fp8_e4m3", PerToken(), ScaleSpec("f32", when="dynamic"))
NVFP4_INPUT = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", when="dynamic", global_scale=F32))


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_per_token(dtype: torch.dtype) -> None:
    x = gaussian(2, 5, 64).to(dtype)
    got = fake_quantize(x, TOKEN)
    assert got.dtype == dtype
    assert got.shape == x.shape
    for row, result in zip(x.reshape(-1, 64), got.reshape(-1, 64), strict=True):
        alone = dequantize(quantize(row.float()[None], FP8), FP8)
        assert torch.equal(alone[0].to(dtype), result)


def test_static_fp8() -> None:
    x = gaussian(3, 4, 32)
    scale = static_scale(torch.tensor(2.0), FP8)
    assert scale == torch.tensor(2.0) / 448
    got = fake_quantize(x, FP8, scale)
    want = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(got, want)
    assert got.abs().max() <= 2.0


def test_static_nvfp4_takes_block_scales_from_the_activation() -> None:
    x = gaussian(3, 4, 32)
    amax = torch.tensor(8.0)
    static = static_scale(amax, NVFP4_INPUT)
    assert static == amax / 2688
    weight = quantize(x.view(12, 32), NVFP4, amax=amax)
    assert torch.equal(fake_quantize(x, NVFP4_INPUT, static).view(12, 32), dequantize(weight, NVFP4))


def test_constant_amax_needs_no_data() -> None:
    spec = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", constant_amax=448.0))
    x = gaussian(4, 32) * 100
    assert torch.equal(fake_quantize(x, spec), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_static_scale_of_silence_and_of_nonsense() -> None:
    assert static_scale(torch.tensor(0.0), FP8) == 2.0**-23
    assert static_scale(torch.tensor(0.0), NVFP4_INPUT) == 1
    with pytest.raises(DataError, match="nan"):
        static_scale(torch.tensor(float("nan")), FP8)


def test_nan_activations_stay_nan() -> None:
    x = gaussian(2, 32)
    x[1, 3] = float("nan")
    got = fake_quantize(x, FP8, torch.tensor(0.01))
    assert got.isnan().nonzero().tolist() == [[1, 3]]
    assert fake_quantize(x, TOKEN)[1].isnan().all()
    assert fake_quantize(x, MXFP4)[1, 3].isnan()


def test_an_empty_batch_passes_through() -> None:
    assert fake_quantize(torch.zeros(0, 7, 64, dtype=torch.bfloat16), TOKEN).shape == (0, 7, 64)


def test_unsigned_integers_hold_probabilities() -> None:
    """Softmax outputs: no negative values, the whole range of codes in use."""
    spec = TensorSpec("uint8", PerTensor(), ScaleSpec("f32", "absmax"))
    x = torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    result = quantize(x, spec)
    assert result.codes.dtype == torch.uint8
    assert result.codes.max() == 255
    assert torch.allclose(dequantize(result, spec), x, atol=0.002)
