"""Searches against brute force and numpy: e4m3 block scales, clipped ranges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from quarkcli.errors import ConfigError
from quarkcli.numerics.quantize import dequantize, make_qparams, quantize, tensor_amax
from quarkcli.numerics.search import nearest_rank
from quarkcli.spec import ObserverSpec, PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

from . import grids, reference

F32 = ScaleSpec("f32")
SEEDS = st.integers(0, 2**31)
CODES = np.array([float(value) for value in grids.magnitudes("fp8_e4m3")], dtype=np.float32)


def nvfp4(rule: str) -> TensorSpec:
    return TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", rule, global_scale=F32))  # type: ignore[arg-type]


def blocks(seed: int) -> Tensor:
    """Blocks of many shapes: Gaussian, heavy tails, one outlier, few levels, tiny, zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 64, generator=g)
    x[4:8] = x[4:8].sign() * x[4:8].abs().pow(4)
    x[8, ::16] = 60.0
    x[12:16] = (x[12:16] * 2).round() / 2
    x[16:20] *= torch.exp2(torch.randint(-14, 1, (4, 64), generator=g).float())
    x[20:22] *= 1e-4  # block scales among the subnormal codes
    x[22] *= 1e-6  # and at their lower end
    x[23, :16] = 0.0
    return x


def exact_errors(x: Tensor, outer: float) -> NDArray[np.float64]:
    """Squared error of every block under each of the 126 codes, float64 [rows, blocks, 126]."""
    runs = x.numpy().reshape(x.shape[0], -1, 16)
    errors = np.empty((*runs.shape[:2], 126))
    for code in range(1, 127):
        scale = CODES[code] * np.float32(outer)
        values = reference.float_values(runs / scale, "fp4_e2m1").astype(np.float32) * scale  # as it is decoded
        errors[..., code - 1] = ((runs - values).astype(np.float64) ** 2).sum(-1)
    return errors


def _under(errors: NDArray[np.float64], codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The error of each block under its own code."""
    return np.take_along_axis(errors, codes[..., None].astype(int) - 1, -1)[..., 0]


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_the_sweep_finds_the_least_error_of_all_126_codes(seed: int) -> None:
    x = blocks(seed)
    result = quantize(x, nvfp4("sweep"))
    assert result.params.global_scale is not None
    errors = exact_errors(x, float(result.params.global_scale))
    got = _under(errors, result.params.scale.view(torch.uint8).numpy())
    assert np.allclose(got, errors.min(-1), rtol=1e-5, atol=0)
    stored = (x - dequantize(result, nvfp4("sweep"))).double().square().unflatten(1, (-1, 16)).sum(-1)
    assert np.allclose(stored.numpy(), got, rtol=1e-4, atol=1e-30)
    assert result.params.scale.view(torch.uint8)[23, 0] == 0x38  # a zero block keeps the scale of the rule


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_four_over_six_takes_the_better_of_two(seed: int) -> None:
    x = blocks(seed)
    spec = nvfp4("four_over_six")
    result = quantize(x, spec)
    outer = result.params.global_scale
    assert outer is not None
    assert outer == x.abs().max() / (6 * 256)  # so that 1.5 times a block scale still fits
    errors = exact_errors(x, float(outer))
    amax = x.unflatten(1, (-1, 16)).abs().amax(-1).numpy()
    six = np.clip(amax / (np.float32(6) * outer.numpy()), CODES[1], np.float32(256))
    six = six.astype(reference.ML_DTYPES["fp8_e4m3"])
    four = np.clip(six.astype(np.float32) * np.float32(1.5), CODES[1], CODES[-1]).astype(six.dtype)
    both = [_under(errors, code.view(np.uint8)) for code in (six, four)]
    chosen = result.params.scale.view(torch.uint8).numpy()
    got = _under(errors, chosen)
    live = amax > 0
    assert bool(((chosen == six.view(np.uint8)) | (chosen == four.view(np.uint8)))[live].all())
    assert np.allclose(got[live], np.minimum(*both)[live], rtol=1e-5, atol=0)
    assert bool((got <= both[0] * (1 + 1e-5))[live].all())


def test_the_sweep_beats_both_other_rules_per_block() -> None:
    x = blocks(1)
    absmax, sweep = quantize(x, nvfp4("absmax")), quantize(x, nvfp4("sweep"))
    assert absmax.params.global_scale == sweep.params.global_scale
    by_rule = [
        (x - dequantize(each, nvfp4("absmax"))).double().square().unflatten(1, (-1, 16)).sum(-1)
        for each in (absmax, sweep)
    ]
    assert bool((by_rule[1] <= by_rule[0] * (1 + 1e-6)).all())
    assert by_rule[1].sum() < 0.9 * by_rule[0].sum()


# --- clipped ranges --------------------------------------------------------------------------------------------------

BASES = {
    "int4 group": TensorSpec("int4", PerGroup(32), ScaleSpec("f32", "half_range")),
    "int8 tensor": TensorSpec("int8", PerTensor(), ScaleSpec("f32", "half_range")),
    "int4 absmax row": TensorSpec("int4", PerChannel(0), ScaleSpec("f32", "absmax")),
    "int8 column": TensorSpec("int8", PerChannel(1), ScaleSpec("f32", "half_range")),
    "int4 tile": TensorSpec("int4", PerTile(5, 24), ScaleSpec("f32", "half_range")),
    "uint4 group": TensorSpec("uint4", PerGroup(32), ScaleSpec("f32", "half_range"), "int"),
    "uint4 float zero": TensorSpec("uint4", PerGroup(32), ScaleSpec("f32", "half_range"), "float"),
    "fp8 row": TensorSpec("fp8_e4m3", PerChannel(0), F32),
    "fp4 e4m3": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32)),
    "mxfp4": TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "floor")),
}
MSE = ObserverSpec("mse", (("steps", 16), ("shrink", 0.5)))


def heavy(seed: int = 0, rows: int = 20, cols: int = 96) -> Tensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return x.sign() * x.abs().pow(2)


def group_errors(x: Tensor, values: Tensor, spec: TensorSpec) -> Tensor:
    """Squared error behind every scale, float64."""
    error = (x - values).double().square()
    match spec.granularity:
        case PerTensor():
            return error.sum()
        case PerChannel(axis):
            return error.sum(1 - axis)
        case PerTile(rows, cols):
            return error.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).sum((1, 3))
        case PerGroup(size):
            return error.unflatten(1, (-1, size)).sum(-1)
    raise AssertionError


@pytest.mark.parametrize("spec", BASES.values(), ids=BASES)
def test_least_error_ranges_are_never_worse(spec: TensorSpec) -> None:
    x = heavy()
    clipped = replace(spec, observer=MSE)
    base = group_errors(x, dequantize(quantize(x, spec), spec), spec)
    best = group_errors(x, dequantize(quantize(x, clipped), clipped), clipped)
    assert bool((best <= base * (1 + 1e-5)).all())
    if spec.format.bits == 4 and spec.scale is not None and spec.scale.dtype != "e8m0":
        assert best.sum() < 0.99 * base.sum()


@pytest.mark.parametrize("name", ["int4 group", "int4 absmax row", "fp8 row"])
def test_least_error_ranges_equal_brute_force(name: str) -> None:
    """Every step's range as the given amax of a tensor, group by group."""
    spec, x = BASES[name], heavy(3, 6)
    clipped = replace(spec, observer=MSE)
    got = (dequantize(quantize(x, clipped), clipped) - x).double().square()
    size = spec.group_size or x.shape[1]
    whole = replace(spec, granularity=PerTensor())
    for run, error in zip(x.reshape(-1, 1, size), got.reshape(-1, size), strict=True):
        amax = [tensor_amax(run) * (1 - 0.5 * step / 15) for step in range(16)]
        trials = [dequantize(quantize(run, whole, amax=each), whole) for each in amax]
        least = min(float((trial - run).double().square().sum()) for trial in trials)
        assert float(error.sum()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.99, 100.0])
def test_percentiles_equal_numpy(percentile: float) -> None:
    """Nearest rank: the smallest value that at least the given share does not exceed."""
    x = heavy(5)
    observer = ObserverSpec("percentile", (("percentile", percentile),))
    for name, runs in (
        ("int4 group", x.unflatten(1, (-1, 32))),
        ("int4 absmax row", x[:, None]),
        ("int8 tensor", x.reshape(1, 1, -1)),
        ("int8 column", x.t()[None]),
    ):
        spec = replace(BASES[name], observer=observer)
        want = np.percentile(runs.abs().numpy(), percentile, axis=-1, method="inverted_cdf")
        divisor = {"int4 absmax row": 7.0}.get(name, 127.5 if spec.element == "int8" else 7.5)
        got = make_qparams(x, spec).scale.numpy()
        assert np.array_equal(got.reshape(want.shape), want.astype(np.float32) / np.float32(divisor)), name


@pytest.mark.parametrize("percentile", [90.0, 100.0])
def test_percentiles_of_both_ends_equal_numpy(percentile: float) -> None:
    x = heavy(6) + 0.2
    spec = replace(BASES["uint4 group"], observer=ObserverSpec("percentile", (("percentile", percentile),)))
    runs = x.unflatten(1, (-1, 32)).numpy()
    high = np.maximum(np.percentile(runs, percentile, axis=-1, method="inverted_cdf"), np.float32(0))
    low = np.minimum(-np.percentile(-runs, percentile, axis=-1, method="inverted_cdf"), np.float32(0))
    params = make_qparams(x, spec)
    scale = (high - low) / np.float32(15)
    assert np.array_equal(params.scale.numpy(), scale)
    assert params.zero_point is not None
    assert np.array_equal(params.zero_point.numpy(), np.clip(-np.rint(low / scale), 0, 15))


def test_ranks_of_percentiles_are_not_rounded() -> None:
    """In floats 99.9 per cent of 41,000 are more than 40,959."""
    assert [nearest_rank(99.9, count) for count in (1, 1000, 41_000, 8_000_000)] == [1, 999, 40_959, 7_992_000]


def test_a_percentile_clips_what_lies_beyond() -> None:
    x = torch.linspace(-1, 1, 200)[None]
    x[0, 0] = -100.0
    spec = replace(BASES["int8 tensor"], observer=ObserverSpec("percentile", (("percentile", 99.0),)))
    values = dequantize(quantize(x, spec), spec)
    assert values.abs().max() <= 1.01
    assert torch.allclose(values[0, 3:-3], x[0, 3:-3], atol=0.01)


def test_what_does_not_fit_is_refused() -> None:
    x = heavy()
    with pytest.raises(ConfigError, match="observer 'percentile' does not work with tiles"):
        quantize(x, replace(BASES["int4 tile"], observer=ObserverSpec("percentile", (("percentile", 99.0),))))
    with pytest.raises(ConfigError, match="works only for activations"):
        quantize(x, replace(BASES["int4 group"], observer=ObserverSpec("histogram")))


def test_a_scale_group_fixes_the_range() -> None:
    """With the amax of fused linears given, no tensor clips for itself."""
    x = heavy()
    spec = BASES["int8 tensor"]
    amax = torch.tensor(2.0)
    assert torch.equal(make_qparams(x, replace(spec, observer=MSE), amax=amax).scale, amax / 127.5)
