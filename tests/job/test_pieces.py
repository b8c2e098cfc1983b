"""The error of weights, one by one and together, against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quarkcli.job.pieces import weight_errors
from quarkcli.numerics.quantize import Quantized, dequantize, quantize
from quarkcli.spec import PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

F32 = ScaleSpec("f32")
SPECS = (
    TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32)),
    TensorSpec("uint4", PerGroup(32), ScaleSpec("f32", "half_range"), zero_point="int"),
    TensorSpec("fp8_e4m3", PerTensor(), F32),
    TensorSpec("fp8_e4m3", PerTile(16, 32), F32),
)


def rows(spec: TensorSpec, shape: tuple[int, int], count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).bfloat16() * 3**power for power in range(count)]
    return [(SimpleNamespace(weight=spec), weight, quantize(weight, spec)) for weight in weights]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_error_of_small_weights_is_of_all_their_values(spec: TensorSpec, count: int) -> None:
    every = rows(spec, (48, 96), count)
    for found, (_, weight, quantized) in zip(weight_errors(every), every, strict=True):
        exact = weight.double()
        wanted = (exact - dequantize(quantized, spec).double()).norm() / exact.norm()
        assert found == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_error_of_large_weights_is_near_that_of_all_values(spec: TensorSpec) -> None:
    every = rows(spec, (512, 256), 2)
    alone = [error for row in every for error in weight_errors([row])]
    assert weight_errors(every) == pytest.approx(alone, rel=1e-5)
    for found, (_, weight, quantized) in zip(alone, every, strict=True):
        exact = weight.double()
        wanted = (exact - dequantize(quantized, spec).double()).norm() / exact.norm()
        assert found == pytest.approx(float(wanted), rel=0.02)


def test_codes_in_another_order_of_columns_count_where_they_belong() -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    every = rows(SPECS[1], (48, 96), 2)
    moved = []
    for target, weight, _ in every:
        codes = quantize(weight[:, order], SPECS[1])
        moved.append((target, weight, Quantized(codes.codes, codes.params, order)))
    for found, (_, weight, quantized) in zip(weight_errors(moved), moved, strict=True):
        exact = weight.double()
        wanted = (exact - dequantize(quantized, SPECS[1]).double()).norm() / exact.norm()
        assert found == pytest.approx(float(wanted), rel=1e-5) and found < 0.2


def test_a_weight_of_zeros_has_no_error() -> None:
    zeros = [(target, weight * 0, quantize(weight * 0, SPECS[0])) for target, weight, _ in rows(SPECS[0], (8, 64), 2)]
    assert weight_errors(zeros) == [0.0, 0.0]


@pytest.mark.parametrize("spec", [SPECS[2], TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even"))], ids=str)
@pytest.mark.parametrize("power", [-85, 100])
def test_the_size_of_a_weight_changes_no_error(spec: TensorSpec, power: int) -> None:
    """Squares of its values are no float32 numbers."""
    for count in (1, 3):
        every = rows(spec, (48, 96), count)
        moved = [(t, w * 2.0**power, quantize(w * 2.0**power, spec)) for t, w, _ in every]
        assert weight_errors(moved) == pytest.approx(weight_errors(every), rel=1e-5)
