"""Degenerate values have one answer in every scheme, weights and activations: the table of docs/numerics.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quarkcli.errors import DataError
from quarkcli.numerics.quantize import QParams, dequantize, effective_scale, fake_quantize, quantize, tensor_amax
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes.native import to_spec
from quarkcli.spec import MIN_MAX, SCALE_FORMATS, TensorSpec
from tests.products import each_once

from . import specs

ROWS, COLS = 260, 256
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _activations() -> dict[str, TensorSpec]:
    found: dict[TensorSpec, str] = {}
    for kind, slots in (("schemes", ("input",)), ("kv_cache", ("k", "v")), ("attention", ("q", "k", "v", "p"))):
        for name, path in sorted(catalog.files(kind).items()):
            data = catalog.document(path).data
            for slot in slots:
                if slot in data:
                    found.setdefault(to_spec(data[slot]), f"{name} {slot}")
    return {name: spec for spec, name in found.items()}


ACTIVATIONS = _activations()
BOTH = specs.ALL | ACTIVATIONS
every_spec = pytest.mark.parametrize("spec", BOTH.values(), ids=BOTH)
every_spec_and_dtype = pytest.mark.parametrize(("spec", "dtype"), each_once(BOTH, DTYPES))
# The decoded value of a group without range_, stored: 2^-23 where a plain float is stored, the smallest power of two,
# one where another scale lies above or could.
ZERO_GROUP = {"e8m0": 2.0**-127, "e4m3": 1.0, "e5m3": 1.0}


def gaussian(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)).to(dtype)


def zero_is_a_value(spec: TensorSpec) -> bool:
    """With a real zero point it need not be one."""
    return spec.zero_point != "float"


def tensors(params: QParams) -> list[Tensor]:
    own = [params.scale, params.global_scale, params.zero_point, params.shift]
    return [each for each in own if each is not None] + (tensors(params.then) if params.then else [])


def both_ways(x: Tensor, spec: TensorSpec) -> list[Tensor]:
    """The decoded weight and the fake-quantized activation; no parameter is NaN, no scale is zero or infinite."""
    result = quantize(x, spec)
    assert all(bool(each.float().isfinite().all()) for each in tensors(result.params))
    scale = effective_scale(result.params, spec, x.shape)
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    return [dequantize(result, spec), fake_quantize(x, spec).float()]


@every_spec_and_dtype
def test_zeros_of_either_sign_stay_zero(spec: TensorSpec, dtype: torch.dtype) -> None:
    x = torch.zeros(ROWS, COLS, dtype=dtype)
    x[3] = -0.0
    for values in both_ways(x, spec):
        assert bool((values == 0).all())
    if spec.codes.format.kind != "integer":
        values = dequantize(quantize(x, spec), spec)
        assert bool(values[3].signbit().all())
        assert not bool(values[0].signbit().any())


@every_spec
def test_scales_of_a_tensor_of_zeros(spec: TensorSpec) -> None:
    if spec.scale is None:
        assert quantize(torch.zeros(4, COLS), spec).params.scale is None
        return
    params = quantize(torch.zeros(ROWS, COLS), spec).params
    usual = 1.0 if spec.zero_point == "float" else 2.0**-23
    scale = effective_scale(params, spec, (ROWS, COLS))
    if params.shift is not None:
        scale = scale[params.shift == 0] if bool((params.shift == 0).any()) else scale
    assert set(scale.flatten().tolist()) == {ZERO_GROUP.get(spec.scale.dtype, usual)}
    if params.global_scale is not None:
        assert params.global_scale == 1


@every_spec_and_dtype
def test_a_group_of_zeros_in_a_tensor_of_others(spec: TensorSpec, dtype: torch.dtype) -> None:
    x = gaussian(dtype)
    x[:, :128] = 0.0
    x[7] = -0.0
    for values in both_ways(x, spec):
        assert bool(values.isfinite().all())
        if zero_is_a_value(spec):
            assert bool((values[:, :128] == 0).all())
            assert bool((values[7] == 0).all())


@pytest.mark.parametrize(("spec", "dtype", "value"), each_once(BOTH, DTYPES, [1e-45, 6e-8, 1e-40, 2.0**-126, 1e-30]))
def test_tiny_magnitudes(spec: TensorSpec, dtype: torch.dtype, value: float) -> None:
    """At worst they vanish; they never grow beyond a step of the format. 1e-45 is a float32 subnormal, 6e-8 one of
    float16."""
    x = torch.full((ROWS, COLS), value).to(dtype)
    x[:, ::3] *= -0.5
    x[:, 1::5] = 0.0
    for values in both_ways(x, spec):
        assert bool(values.isfinite().all())
        assert float(values.abs().max()) <= 2 * float(x.float().abs().max())
        if zero_is_a_value(spec):
            assert bool((values[x == 0] == 0).all())


@every_spec_and_dtype
def test_the_largest_finite_value(spec: TensorSpec, dtype: torch.dtype) -> None:
    """Decoded to a finite float32, but for a power-of-two scale whose nearest value is 2^128, and a chain whose scales
    together reach beyond: that is infinity, with ordinary codes."""
    x = gaussian(dtype)
    x[5, 9], x[6, 10] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    x[:, 200] = 0.0
    values = both_ways(x, spec)[0]
    assert not bool(values.isnan().any())
    overflows = spec.codes is not spec or (spec.scale is not None and spec.scale.dtype == "e8m0")
    if not overflows or dtype == torch.float16:
        assert bool(values.isfinite().all())
    else:
        assert {(5, 9), (6, 10)} >= {tuple(at) for at in (~values.isfinite()).nonzero().tolist()}
    if zero_is_a_value(spec):
        assert bool((values[:, 200] == 0).all())
    assert values[5, 9] > 0
    assert values[6, 10] < 0 or spec.zero_point != "none"


@pytest.mark.parametrize(("spec", "outlier"), each_once(BOTH, [1e4, 1e20, -1e37]))
def test_one_huge_outlier(spec: TensorSpec, outlier: float) -> None:
    """It costs its own group only, unless a scale covers the tensor; then the others may vanish."""
    x = gaussian()
    clean = dequantize(quantize(x, spec), spec)
    x[130, 9] = outlier
    x[:, 200] = 0.0
    values = both_ways(x, spec)[0]
    assert bool(values.isfinite().all())
    if zero_is_a_value(spec):
        assert bool((values[:, 200] == 0).all())
    if not spec.has_tensor_scale and spec.scale is not None:
        assert torch.equal(values[:128, :128], clean[:128, :128]) or spec.granularity == specs.PerChannel(1)
    if spec.observer == MIN_MAX and spec.scale is not None and SCALE_FORMATS[spec.scale.dtype].bits > 16:
        assert abs(float(values[130, 9]) / outlier - 1) < 0.35


@pytest.mark.parametrize(
    ("spec", "dtype", "value"), each_once(specs.ALL, DTYPES, [float("nan"), float("inf"), float("-inf")])
)
def test_what_is_not_finite_is_refused_by_position(spec: TensorSpec, dtype: torch.dtype, value: float) -> None:
    x = gaussian(dtype)
    x[134, 77] = value
    with pytest.raises(DataError, match=r"\[134, 77\]"):
        quantize(x, spec)
    with pytest.raises(DataError, match=r"\[134, 77\]"):
        quantize(x, spec, amax=torch.tensor(1.0))
    with pytest.raises(DataError, match=r"\[134, 77\]"):
        tensor_amax(x)


@pytest.mark.parametrize("spec", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_that_are_not_finite_pass_on_their_own(spec: TensorSpec) -> None:
    """They are not refused while a model runs: NaN stays NaN and spoils no group but its own."""
    x = gaussian()[:8]
    clean = fake_quantize(x, spec, torch.tensor(0.02))
    x[3, 9] = torch.nan
    got = fake_quantize(x, spec, torch.tensor(0.02))
    assert got[3, 9].isnan()
    if not spec.has_tensor_scale or spec.is_static:
        assert torch.equal(got[:3], clean[:3])


def test_the_scales_of_zeros_are_the_documented_ones() -> None:
    text = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.split("| scale | value |")[1].split("\n\n")[0].splitlines()]
    documented = {name: value for names, value in rows[2:] for name in names.split(", ")}
    assert set(documented) == set(SCALE_FORMATS)
    for name, value in documented.items():
        base, _, power = value.partition("^")
        want = float(base) ** float(power or 1)
        assert want == ZERO_GROUP.get(name, 2.0**-23), name
