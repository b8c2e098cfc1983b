"""Relative mean squared error on 2^20 Gaussian samples: what a format costs, within 1 % of separately found values."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from quarkcli.numerics.quantize import dequantize, quantize
from quarkcli.spec import PerChannel, PerGroup, ScaleSpec, TensorSpec

F32, HALF = ScaleSpec("f32"), ScaleSpec("f32", "half_range")


def nvfp4(rule: str) -> TensorSpec:
    return TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", rule, global_scale=F32))  # type: ignore[arg-type]


EXPECTED = {
    "mxfp4 even": (TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even")), 0.01249),
    "nvfp4 absmax": (nvfp4("absmax"), 0.00905),
    "int4": (TensorSpec("int4", PerGroup(128), HALF), 0.01227),
    "uint4": (TensorSpec("uint4", PerGroup(128), HALF, "int"), 0.01011),
    "mxfp6_e2m3": (TensorSpec("fp6_e2m3", PerGroup(32), ScaleSpec("e8m0", "even")), 0.000798),
    "fp8 row": (TensorSpec("fp8_e4m3", PerChannel(0), F32), 0.000701),
    "mx6": (TensorSpec("mx6", PerGroup(16), ScaleSpec("e8m0", "floor")), 0.00148),
    "mx9": (TensorSpec("mx9", PerGroup(16), ScaleSpec("e8m0", "floor")), 2.228e-5),
    "bfp16": (TensorSpec("bfp16", PerGroup(8), ScaleSpec("e8m0", "fit")), 3.89e-5),
}


@cache
def samples() -> torch.Tensor:
    return torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))


def relative(spec: TensorSpec) -> float:
    x = samples()
    error = (dequantize(quantize(x, spec), spec) - x).double().square().mean()
    return float(error / x.double().square().mean())


@pytest.mark.parametrize(("spec", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_relative_error(spec: TensorSpec, expected: float) -> None:
    assert relative(spec) == pytest.approx(expected, rel=0.01)


def test_searched_block_scales_err_less() -> None:
    assert relative(nvfp4("sweep")) <= 0.00668
    assert relative(nvfp4("sweep")) < relative(nvfp4("four_over_six")) < relative(nvfp4("absmax"))
