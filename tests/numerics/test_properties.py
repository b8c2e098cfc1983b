"""Properties of every scheme's weight spec and of what no scheme has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quarkcli.numerics.quantize import (
    QParams,
    Quantized,
    decode,
    dequantize,
    encode,
    fake_quantize,
    make_qparams,
    quantize,
    tensor_amax,
)
from quarkcli.spec import MIN_MAX, PerChannel, PerGroup, PerTensor, PerTile, PerToken, ScaleSpec, TensorSpec

from . import specs

every_spec = pytest.mark.parametrize("spec", specs.ALL.values(), ids=specs.ALL)
every_single = pytest.mark.parametrize("spec", specs.SINGLE.values(), ids=specs.SINGLE)
SEEDS = st.integers(0, 2**31)
COLS = 256
# Whatever recomputes its scale from its own result finds it again: the exponent of amax is the same.
POWER_OF_TWO = [name for name, spec in specs.SINGLE.items() if spec.scale is not None and spec.scale.dtype == "e8m0"]
BY_COLUMN = {name for name, spec in specs.ALL.items() if spec.granularity == PerChannel(1)}
# Rounding down moves a value that division and multiplication have brought an ulp below its code.
NOT_IDEMPOTENT = {"int4 floor"}


def gaussian(rows: int, cols: int = COLS, seed: int = 0) -> Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed))


def bits(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.uint8)


def equal(a: Quantized, b: Quantized) -> bool:
    return torch.equal(bits(a.codes), bits(b.codes)) and _same(a.params, b.params)


def _same(a: QParams, b: QParams) -> bool:
    def both(x: Tensor | None, y: Tensor | None) -> bool:
        return (x is None and y is None) or (x is not None and y is not None and torch.equal(x.float(), y.float()))

    then = (a.then is None and b.then is None) or (a.then is not None and b.then is not None and _same(a.then, b.then))
    pairs = ((a.scale, b.scale), (a.global_scale, b.global_scale), (a.zero_point, b.zero_point), (a.shift, b.shift))
    return then and all(both(x, y) for x, y in pairs)


@every_single
def test_fake_quantization_is_dequantized_quantization(spec: TensorSpec) -> None:
    """For a spec without a search; searches belong to weights, activations take the rule's own scale."""
    plain = replace(spec, observer=MIN_MAX)
    if plain.scale is not None and plain.scale.rule in ("sweep", "four_over_six"):
        plain = replace(plain, scale=replace(plain.scale, rule="absmax"))
    x = gaussian(12)
    assert torch.equal(fake_quantize(x, plain), dequantize(quantize(x, plain), plain))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=st.sampled_from(sorted(set(specs.SINGLE) - NOT_IDEMPOTENT)))
def test_values_of_the_grid_stay_where_they_are(seed: int, name: str) -> None:
    """Idempotent under scales that are kept. A chain is not: the fp8 stage moves what the int4 stage has given."""
    spec, x = specs.SINGLE[name], gaussian(5, seed=seed)
    params = make_qparams(x, spec)
    once = decode(encode(x, spec, params), spec, params)
    assert torch.equal(decode(encode(once, spec, params), spec, params), once)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=st.sampled_from(sorted(set(POWER_OF_TWO) - {"bfp16"})))
def test_fake_quantization_is_idempotent_with_power_of_two_scales(seed: int, name: str) -> None:
    """Scales and all. Not so bfp16, whose lowest code -2 has a larger exponent than the group it came from; nor plain
    scales: amax / divisor * largest code is amax for neither a half range nor, always, a rounded quotient."""
    once = fake_quantize(gaussian(5, seed=seed), specs.SINGLE[name])
    assert torch.equal(fake_quantize(once, specs.SINGLE[name]), once)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, power=st.integers(-8, 8), name=st.sampled_from(sorted(specs.ALL)))
def test_powers_of_two_pass_through(seed: int, power: int, name: str) -> None:
    """Codes, zero points and shift bits stay, values scale. 16-bit scales and casts keep away from their subnormals."""
    spec, x = specs.ALL[name], gaussian(5, seed=seed)
    whole, scaled = quantize(x, spec), quantize(x * 2.0**power, spec)
    if spec.scale is not None:
        assert torch.equal(bits(scaled.codes), bits(whole.codes))
    if name != "fp16":
        assert torch.equal(dequantize(scaled, spec), dequantize(whole, spec) * 2.0**power)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, start=st.integers(0, 2), name=st.sampled_from(sorted(set(specs.ALL) - BY_COLUMN)))
def test_rows_alone_are_the_same_rows(seed: int, start: int, name: str) -> None:
    """With the amax of the whole. A tile has five or 128 rows; of columns a slice has ranges of its own."""
    spec = specs.ALL[name]
    step = spec.granularity.rows if isinstance(spec.granularity, PerTile) else 4
    x = gaussian(3 * step, seed=seed)
    amax = tensor_amax(x) if spec.has_tensor_scale else None
    part = slice(start * step, start * step + step)
    whole, alone = quantize(x, spec, amax=amax), quantize(x[part], spec, amax=amax)
    assert torch.equal(bits(alone.codes), bits(whole.codes[part]))
    assert torch.equal(dequantize(alone, spec), dequantize(whole, spec)[part])
    if not isinstance(spec.granularity, PerTile):
        assert _same(whole.params.rows(part, len(x)), alone.params)


GROUPS = [name for name, spec in specs.SINGLE.items() if isinstance(spec.granularity, PerGroup)]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=st.sampled_from(GROUPS))
def test_groups_alone_are_the_same_groups(seed: int, name: str) -> None:
    spec, x = specs.SINGLE[name], gaussian(4, seed=seed)
    whole = quantize(x, spec)
    alone = quantize(x[:, 128:], spec, amax=tensor_amax(x))
    assert torch.equal(bits(alone.codes), bits(whole.codes[:, 128:]))
    assert torch.equal(dequantize(alone, spec), dequantize(whole, spec)[:, 128:])


@pytest.mark.parametrize("name", sorted(set(specs.ALL) - BY_COLUMN))
def test_values_keep_their_order_under_one_scale(name: str) -> None:
    """Within a sub-block where there are such: its neighbour may lie on a grid twice as fine."""
    spec = specs.ALL[name]
    run = spec.format.sub_block or 8  # divides every group
    x = gaussian(20).unflatten(1, (-1, run)).sort(-1).values.flatten(1)
    values = dequantize(quantize(x, spec), spec)
    assert bool((values.unflatten(1, (-1, run)).diff() >= 0).all())


@every_spec
def test_bfloat16_is_coded_as_float32(spec: TensorSpec) -> None:
    """The dtype of the weight only matters where the scale has it too."""
    x = gaussian(6).bfloat16()
    if any(stage.scale is not None and stage.scale.dtype == "model" for stage in spec.stages):
        spec = replace(spec, scale=ScaleSpec("f32", "half_range"))
    assert equal(quantize(x, spec), quantize(x.float(), spec))


# --- granularities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_columns_are_the_rows_of_the_transposed(zero: str) -> None:
    name = "int8" if zero == "none" else "uint8"
    columns = TensorSpec(name, PerChannel(1), ScaleSpec("f32", "half_range"), zero)  # type: ignore[arg-type]
    rows = replace(columns, granularity=PerChannel(0))
    x = gaussian(7, 130)
    got, want = quantize(x, columns), quantize(x.t().contiguous(), rows)
    assert got.params.scale.shape == (1, 130)
    assert torch.equal(got.codes, want.codes.t())
    assert torch.equal(dequantize(got, columns), dequantize(want, rows).t())
    assert torch.equal(fake_quantize(x, columns), dequantize(got, columns))


def test_a_column_with_nan_is_refused_by_position() -> None:
    x = gaussian(7, 130)
    x[3, 77] = torch.nan
    with pytest.raises(Exception, match=r"\[3, 77\]"):
        quantize(x, TensorSpec("int8", PerChannel(1), ScaleSpec("f32", "half_range")))


def test_tokens_are_rows() -> None:
    token = TensorSpec("int8", PerToken(), ScaleSpec("f32", "half_range", "dynamic"))
    row = replace(token, granularity=PerChannel(0))
    x = gaussian(6).view(2, 3, COLS)
    assert torch.equal(fake_quantize(x, token).view(6, COLS), fake_quantize(x.view(6, COLS), row))


@pytest.mark.parametrize("name", ["int4 tile", "uint4 tile"])
def test_ragged_tiles_equal_a_loop_over_tiles(name: str) -> None:
    spec = specs.OTHERS[name]
    whole = replace(spec, granularity=PerTensor())
    x = gaussian(13, 100) + 0.3  # 5 + 5 + 3 rows, 48 + 48 + 4 columns
    result = quantize(x, spec)
    values = dequantize(result, spec)
    assert result.params.scale.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            tile = (slice(5 * i, 5 * i + 5), slice(48 * j, 48 * j + 48))
            alone = quantize(x[tile].contiguous(), whole)
            assert torch.equal(result.codes[tile], alone.codes)
            assert torch.equal(values[tile], dequantize(alone, whole))
