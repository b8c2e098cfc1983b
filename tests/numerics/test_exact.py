"""Codes times powers of two in a two-level format: every value while exponents of blocks span at most 17."""

from __future__ import annotations

import pytest
import torch

from quarkcli.numerics import exact
from quarkcli.numerics.quantize import dequantize, quantize
from quarkcli.recipe.attributes import native
from quarkcli.recipe.catalog import files
from quarkcli.recipe.recipe import scheme_model
from quarkcli.spec import TensorSpec


def spec(scheme: str) -> TensorSpec:
    return native.to_spec(scheme_model(scheme).weight)


NVFP4, MXFP4 = spec("nvfp4"), spec("mxfp4")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def made(span: int, top: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random codes of blocks of 32 whose exponents lie between top - span and top, both taken."""
    random = torch.Generator().manual_seed(span)
    codes = E2M1[torch.randint(0, 8, (24, 256), generator=random)] * (torch.randint(0, 2, (24, 256)) * 2 - 1)
    exponents = torch.randint(top - span, top + 1, (24, 8), generator=random)
    exponents[0, :2] = torch.tensor([top, top - span])
    codes[0, [0, 33]] = 6.0
    return (codes * torch.exp2(exponents.float()).repeat_interleave(32, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 9, -60])
@pytest.mark.parametrize("span", [0, 3, 17])
def test_every_value_is_kept(span, top, dtype):
    weight = made(span, top, dtype)
    assert exact.exponent(weight, NVFP4) == top
    quantized, rounded = exact.quantize(weight, NVFP4, top)
    assert rounded == 0
    assert torch.equal(dequantize(quantized, NVFP4), weight.float())
    assert quantized.params.global_scale.log2() == top - 8
    usual = dequantize(quantize(weight, NVFP4), NVFP4)
    assert not torch.equal(usual.to(dtype), weight)  # so it is needed


@pytest.mark.parametrize("span", [18, 20])
def test_blocks_beyond_the_span_are_counted(span):
    weight = made(span)
    quantized, rounded = exact.quantize(weight, NVFP4, 0)
    wrong = (dequantize(quantized, NVFP4) != weight).view(24, -1, 16).any(-1)
    assert 0 < rounded == int(wrong.sum())
    assert float((dequantize(quantized, NVFP4) - weight).abs().max()) <= 6 * 2.0 ** (8 - 8 - 17)


def test_a_global_scale_that_is_shared():
    low, high = made(5), made(5, 9)
    largest = max(exact.exponent(weight, NVFP4) for weight in (low, high))
    for weight in (low, high):
        quantized, rounded = exact.quantize(weight, NVFP4, largest)
        assert rounded == 0
        assert torch.equal(dequantize(quantized, NVFP4), weight)


def test_what_mxfp4_decodes_to():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    decoded = dequantize(quantize(weight, MXFP4), MXFP4)
    largest = exact.exponent(decoded, NVFP4)
    assert torch.equal(dequantize(exact.quantize(decoded, NVFP4, largest)[0], NVFP4), decoded)


@pytest.mark.parametrize("change", [lambda w: torch.randn_like(w), lambda w: w * 1.25, lambda w: w * 0, "one"])
def test_other_weights_are_none(change):
    weight = made(3)
    if change == "one":
        weight[20, 200] = 5 * 2.0**-3
        weight[20, 201] = 6 * 2.0**-3
    assert exact.exponent(weight if change == "one" else change(weight), NVFP4) is None


def test_blocks_of_too_many_binades_are_none():
    """Two values that no power of two makes codes of."""
    weight = torch.zeros(1, 16)
    weight[0, 0], weight[0, 1] = 6.0, 0.25
    assert exact.exponent(weight, NVFP4) is None


def test_schemes_that_may_hold_them():
    held = [name for name in files("schemes") if exact.may_hold(spec(name))]
    assert {"nvfp4", "nvfp4_fp8", "nvfp4_weight_only"} <= set(held)
    assert all(spec(name).format.bits == 4 and spec(name).scale.global_scale for name in held)
