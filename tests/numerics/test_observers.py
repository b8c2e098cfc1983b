"""Observers against numpy in float64, on data with heavy tails; halves against the whole, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarkcli.errors import ConfigError, DataError
from quarkcli.numerics import observers
from quarkcli.numerics.observers import STATISTICS, Histogram, MinMax, amax_of, weight_amax
from quarkcli.numerics.quantize import static_scale
from quarkcli.spec import (
    Granularity,
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)

F32 = ScaleSpec("f32")
BLOCKS = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", when="dynamic", global_scale=F32))
MSE = {"steps": 40, "shrink": 0.4}
BOUND = 2.0**-11

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
parts = st.lists(st.lists(floats, max_size=20), min_size=1, max_size=6)


def fp8(name: str = "min_max", **parameters: float) -> TensorSpec:
    return TensorSpec("fp8_e4m3", PerTensor(), F32, observer=ObserverSpec(name, tuple(parameters.items())))


def int8(name: str, **parameters: float) -> TensorSpec:
    scale = ScaleSpec("f32", "half_range")
    return TensorSpec("int8", PerTensor(), scale, observer=ObserverSpec(name, tuple(parameters.items())))


def heavy(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Student's t with two degrees of freedom, and one spike a thousand times as large."""
    random = np.random.default_rng(seed)
    x = random.standard_t(2, shape).astype(np.float32)
    x.flat[random.integers(x.size)] = 1000 * np.abs(x).max()
    return torch.from_numpy(x).to(dtype)


def headroom(anchor: float = 1.0, upper: float = 99.99, rho: float = 16384.0) -> TensorSpec:
    parameters = (("anchor", anchor), ("upper", upper), ("rho", rho))
    return replace(BLOCKS, observer=ObserverSpec("headroom", parameters))


def seen(spec: TensorSpec, *tensors: torch.Tensor) -> Histogram | MinMax:
    out = STATISTICS[spec.observer.statistic]()
    for x in tensors:
        out.observe(x)
    return out


def merged(ranks: Sequence[Any]) -> Any:
    """One that has taken in all, in order."""
    out = deepcopy(ranks[0])
    for rank in ranks[1:]:
        out.merge(rank)
    return out


def same(one: Histogram, other: Histogram) -> bool:
    if one.counts is None or other.counts is None:
        return one.counts is other.counts
    return torch.equal(one.counts, other.counts) and torch.equal(one.amax, other.amax)


# ---- mergeable


@given(parts, st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_histogram_of_parts_is_that_of_the_whole(values: list[list[float]], random) -> None:
    chunks = [torch.tensor(part, dtype=torch.float32) for part in values]
    whole = Histogram()
    whole.observe(torch.cat(chunks))
    ranks = []
    for chunk in chunks:
        ranks.append(Histogram())
        ranks[-1].observe(chunk)
    random.shuffle(ranks)
    before = [rank.counts.clone() if rank.counts is not None else None for rank in ranks]
    assert same(merged(ranks), whole)
    left, right = merged(ranks[: len(ranks) // 2 or 1]), merged(ranks[len(ranks) // 2 or 1 :] or [Histogram()])
    assert same(merged([left, right]), whole)
    assert same(merged([right, left]), whole)
    for rank, counts in zip(ranks, before, strict=True):  # reducing leaves the ranks alone
        assert rank.counts is counts is None or torch.equal(rank.counts, counts)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(8)])
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, 12), max_size=3))
@settings(max_examples=25, deadline=None)
def test_ranges_of_parts_are_those_of_the_whole(granularity: Granularity, seed: int, cuts: list[int]) -> None:
    x = heavy(seed, torch.float32, 12, 24)
    rows = granularity == PerChannel(0)  # one range per row: the data come in columns
    edges = [0, *sorted(cuts), 12]
    chunks = [x[:, 2 * a : 2 * b] if rows else x[a:b] for a, b in pairwise(edges)]
    ranks = []
    for chunk in chunks:
        ranks.append(MinMax(granularity))
        ranks[-1].observe(chunk)
    got = merged(ranks[::-1])
    matrix = x.numpy().astype(np.float64)
    axis = {PerTensor(): None, PerChannel(0): 1, PerChannel(1): 0}.get(granularity, 0)
    if isinstance(granularity, PerGroup):
        matrix = np.moveaxis(matrix.reshape(12, 3, 8), 1, 2).reshape(-1, 3)
    assert np.array_equal(got.low.numpy(), matrix.min(axis))
    assert np.array_equal(got.high.numpy(), matrix.max(axis))
    assert np.array_equal(got.amax.numpy(), np.abs(matrix).max(axis))


@given(parts)
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_numpy(values: list[list[float]]) -> None:
    found = Histogram()
    for part in values:
        found.observe(torch.tensor(part, dtype=torch.float32))
    flat = np.abs(np.concatenate([np.asarray(part, np.float32) for part in values]))
    if not flat.size:
        with pytest.raises(DataError, match="no calibration token"):
            found.percentile(99.0)
        return
    starts, counts = found.occupied()
    edges = np.append(starts.numpy(), np.float32(np.inf))
    assert int(counts.sum()) == flat.size
    assert np.array_equal(np.histogram(flat.astype(np.float64), edges.astype(np.float64))[0], counts.numpy())
    width = np.maximum(starts.numpy().astype(np.float64) * BOUND, 2.0**-137)
    inside = np.repeat(starts.numpy().astype(np.float64) + width, counts.numpy())
    assert (np.sort(flat) < inside).all()  # no bin is wider than stated


def test_more_values_than_are_counted_at_once() -> None:
    x = heavy(3, torch.bfloat16, 1030, 1021)
    found = seen(fp8("histogram"), x)
    bits = x.view(torch.int16).numpy().astype(np.int64) & 0x7FFF
    counts = np.bincount(bits.ravel(), minlength=1 << 15)
    kept = counts.nonzero()[0]
    starts, got = found.occupied()
    assert np.array_equal(starts.numpy(), kept.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(got.numpy(), counts[kept])


# ---- what they choose


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 99.99, 99.9999, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_percentiles_of_heavy_tails(percentile: float, seed: int) -> None:
    spec = fp8("percentile", percentile=percentile)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = heavy(seed, torch.float32, 300, 101).clamp(-60000, 60000).to(dtype)
        magnitudes = np.sort(np.abs(x.float().numpy().astype(np.float64)), axis=None)
        wanted = magnitudes[-(-round(percentile * 10**4) * x.numel() // 10**6) - 1]
        got = float(amax_of(seen(spec, x[:77], x[77:]), spec))
        exact = dtype != torch.float32 or percentile in (99.9999, 100.0)  # 16 bits, or the largest of all
        assert wanted * (1 - (0 if exact else BOUND)) <= got <= wanted


def reference(x: np.ndarray, amax: np.float32, element: str) -> float:
    """Squared error in float64 of magnitudes rounded on the scale of `amax`, by numpy and ml_dtypes."""
    if element == "int8":
        scale = np.float32(amax / np.float32(127.5))
        rounded = np.clip(np.rint(x / scale), -128, 127).astype(np.float32) * scale
    else:
        scale = np.float32(amax / np.float32(448))
        rounded = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return float(np.sum((rounded.astype(np.float64) - x.astype(np.float64)) ** 2))


def magnitudes(x: torch.Tensor) -> np.ndarray:
    return np.abs(x.float().numpy())


@pytest.mark.parametrize("element", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("largest", [12.0, 1000.0])
def test_least_squared_error_among_steps(element: str, largest: float) -> None:
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3, 5] = -largest
    spec = int8("mse", **MSE) if element == "int8" else fp8("mse", **MSE)
    values = magnitudes(x)
    candidates = [np.float32(largest) * np.float32(1 - 0.6 * step / 39) for step in range(40)]
    errors = [reference(values, candidate, element) for candidate in candidates]
    got = np.float32(amax_of(seen(spec, x), spec))
    assert got == candidates[int(np.argmin(errors))]
    assert (got < largest) == (largest == 12)  # clipping the larger spike costs more than all the others together


@pytest.mark.parametrize("element", ["int8", "fp8_e4m3"])
def test_least_squared_error_of_all_ranges(element: str) -> None:
    spec = int8("histogram") if element == "int8" else fp8("histogram")
    x = heavy(6, torch.bfloat16, 64, 96)
    values = magnitudes(x)
    amax = values.max()
    below = np.arange(amax.view(np.int32) // (1 << 19) - 1, amax.view(np.int32) // (1 << 19) - 400, -1)
    candidates = [amax, *(below * (1 << 19)).astype(np.int32).view(np.float32)]
    errors = [reference(values, candidate, element) for candidate in candidates]
    got = np.float32(amax_of(seen(spec, x), spec))
    assert reference(values, got, element) == pytest.approx(min(errors), rel=1e-9)


def test_all_ranges_reach_below_the_steps_where_many_values_are_small() -> None:
    """Clipping few spikes costs less than rounding all of a million small values to zero."""
    x = torch.cat([torch.full((1 << 20,), 0.25), torch.linspace(0, 1, 1001), torch.full((2,), 100.0)]).bfloat16()
    steps, ranges = int8("mse", **MSE), int8("histogram")
    found = seen(ranges, x)
    assert amax_of(found, steps) >= 40
    best = float(amax_of(found, ranges))
    assert best < 40
    values = magnitudes(x)
    assert reference(values, np.float32(best), "int8") < 0.5 * reference(values, np.float32(100), "int8")


def test_among_equals_the_larger() -> None:
    """All powers of two are exact on fp8 whatever power of two the range is."""
    x = torch.tensor([0.25, 0.5, 1.0, -2.0, 448.0])
    for name, parameters in (("mse", {"steps": 2, "shrink": 0.5}), ("histogram", {})):
        spec = fp8(name, **parameters)
        assert amax_of(seen(spec, x), spec) == 448
    spec = fp8("mse", steps=2, shrink=0.5)
    assert amax_of(seen(spec, torch.zeros(4)), spec) == 0
    assert amax_of(seen(fp8("histogram"), torch.zeros(4)), fp8("histogram")) == 0


@pytest.mark.parametrize("amax", [1e-40, 0.0007, 0.9, 1.4, 127.5, 180.0, 181.0, 3e30])
def test_power_of_two_is_a_scale_over_any_range(amax: float) -> None:
    for name, parameters in (("min_max", {}), ("percentile", {"percentile": 100.0})):
        observed = ObserverSpec(name, tuple(parameters.items()))
        spec = TensorSpec("int8", PerTensor(), ScaleSpec("pow2", "half_range"), observer=observed)
        got = float(static_scale(amax_of(seen(spec, torch.tensor([amax, -amax / 3, 0.0])), spec), spec))
        wanted = 2.0 ** max(round(np.log2(float(np.float32(amax)) / 127.5)), -126)
        assert got == wanted


# ---- odd input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["min_max", "percentile", "mse", "histogram"])
def test_what_is_not_finite_is_not_hidden(bad: float, name: str) -> None:
    parameters = {"percentile": {"percentile": 50.0}, "mse": MSE}.get(name, {})
    spec = fp8(name, **parameters)
    x = torch.ones(1000)
    x[17] = bad
    found = merged([seen(spec, torch.ones(3)), seen(spec, x), seen(spec, torch.ones(3))])
    assert not torch.isfinite(amax_of(found, spec))


@pytest.mark.parametrize("name", ["min_max", "percentile", "mse", "histogram"])
def test_nothing_seen(name: str) -> None:
    parameters = {"percentile": {"percentile": 50.0}, "mse": MSE}.get(name, {})
    spec = fp8(name, **parameters)
    with pytest.raises(DataError, match="no calibration token"):
        amax_of(seen(spec, torch.zeros(0, 16)), spec)


def test_minimum_of_static_scales() -> None:
    least = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", minimum=0.5))
    assert static_scale(torch.tensor(1.0), least) == 0.5
    assert static_scale(torch.tensor(4480.0), least) == 10
    two = TensorSpec(
        "fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", when="dynamic", global_scale=ScaleSpec("f32", minimum=0.25))
    )
    assert static_scale(torch.tensor(1.0), two) == 0.25
    assert static_scale(torch.tensor(2688.0), two) == 1


def test_a_weight_with_one_scale() -> None:
    x = heavy(9, torch.float32, 32, 64).clamp(-30, 30)
    spec = fp8("percentile", percentile=90.0)
    wanted = np.sort(magnitudes(x), axis=None)[int(np.ceil(0.9 * x.numel())) - 1]
    assert weight_amax(x, spec) == wanted
    assert weight_amax(x, fp8()) == x.abs().max()
    clipped = weight_amax(x, int8("mse", **MSE))
    values = magnitudes(x)
    errors = [reference(values, np.float32(values.max() * (1 - 0.6 * step / 39)), "int8") for step in range(40)]
    assert reference(values, np.float32(clipped), "int8") <= min(errors) * (1 + 1e-4)
    x[3, 4] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        weight_amax(x, spec)


def block_maxima(x: torch.Tensor) -> np.ndarray:
    """The largest magnitudes of blocks of 16 that are not zero, rising; the last block of a row may be short."""
    values = x.double().abs().numpy()
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % 16)))
    maxima = values.reshape(-1, 16).max(axis=1)
    return np.sort(maxima[maxima > 0])


def nearest_rank(rising: np.ndarray, percentile: float) -> float:
    return float(rising[max(1, -(-round(percentile * 10**4) * len(rising) // 10**6)) - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rho", [2.0, 500.0, 16384.0])
@pytest.mark.parametrize(("anchor", "upper"), [(1.0, 99.99), (0.1, 90.0), (50.0, 100.0)])
def test_headroom_over_blocks(dtype: torch.dtype, rho: float, anchor: float, upper: float) -> None:
    """ModelOpt's rule, `max(rho * anchor, upper)`, with exact ranks."""
    x = heavy(7, dtype, 300, 40)
    x[:20] = 0
    x[20:60] *= 1e-12  # too small to be an anchor
    spec = headroom(anchor, upper, rho)
    maxima = block_maxima(x)
    top = nearest_rank(maxima, upper)
    low = nearest_rank(maxima[maxima >= top * 1e-6], anchor)
    found = float(amax_of(seen(spec, x), spec))
    assert found == pytest.approx(max(rho * low, top), rel=BOUND)
    assert float(amax_of(merged([seen(spec, x[:101]), seen(spec, x[101:])]), spec)) == found


def test_headroom_of_nothing_but_zeros_and_of_one_block() -> None:
    spec = headroom()
    assert float(amax_of(seen(spec, torch.zeros(4, 16)), spec)) == 0
    assert float(amax_of(seen(spec, torch.full((1, 5), -2.0)), spec)) == 2 * 16384
    assert torch.isinf(amax_of(seen(spec, torch.tensor([[1.0, torch.inf]])), spec))


def test_which_ranges_are_kept() -> None:
    for granularity in (PerTile(4, 4), PerToken()):
        with pytest.raises(ConfigError, match="no range"):
            MinMax(granularity)
    global_only = TensorSpec(BLOCKS.element, BLOCKS.granularity, BLOCKS.scale, observer=ObserverSpec("histogram"))
    with pytest.raises(ConfigError, match="one scale per tensor"):
        amax_of(seen(global_only, torch.ones(4)), global_only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_ends_of_channels_are_those_of_aminmax(axis: int, dtype: torch.dtype) -> None:
    """Bit for bit, zeros of both signs too; where there is a NaN, both ends are one."""
    x = torch.randn(33, 21, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[5], x[:, 4], x[6, 1], x[7, 2], x[8, 3] = 0.0, -0.0, torch.nan, torch.inf, -torch.inf
    for found, expected in zip(observers._ends(x, PerChannel(axis)), torch.aminmax(x, dim=1 - axis), strict=True):
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan) and nan.any()
        assert torch.equal(found[~nan].view(torch.int32), expected[~nan].float().view(torch.int32))
