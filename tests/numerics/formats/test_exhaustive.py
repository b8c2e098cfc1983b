"""Every code of every element and scale format of 8 bits and less, against exact fractions and ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quarkcli.numerics import scales
from quarkcli.numerics.formats import codec, integer
from quarkcli.numerics.quantize import decode_grid, encode_grid, round_to_grid
from quarkcli.spec import ELEMENTS, SCALE_FORMATS, Element, PerTensor, ScaleSpec, TensorSpec

from .. import grids, reference

SMALL = [name for name, element in ELEMENTS.items() if element.bits <= 8]
WHOLE = [name for name in grids.INTEGERS if grids.INTEGERS[name][2] == 1]
ROUNDINGS = ("half_even", "floor", "round")
ML_INTEGERS = {
    "int2": ml_dtypes.int2, "int4": ml_dtypes.int4, "int8": np.int8,
    "uint2": ml_dtypes.uint2, "uint4": ml_dtypes.uint4, "uint8": np.uint8,
}  # fmt: skip


def test_every_small_element_has_an_exact_grid() -> None:
    assert set(SMALL) == set(grids.FLOATS) | set(grids.INTEGERS)


def signed_probes(name: str) -> NDArray[np.float32]:
    x = grids.probes(list(grids.values(name).values()))
    return np.concatenate([x, -x]) if name in grids.FLOATS else x


def as_codes(raw: NDArray, element: Element) -> torch.Tensor:
    dtype = codec(element).code_dtype(element)
    if element.kind == "float":
        return torch.from_numpy(raw.astype(np.uint8)).view(dtype)
    return torch.from_numpy(raw.astype(np.int16)).to(dtype)


@pytest.mark.parametrize("name", SMALL)
def test_every_code_decodes_to_its_value(name: str) -> None:
    codes = grids.values(name)
    want = np.array([float(value) for value in codes.values()], dtype=np.float32)
    raw = np.array(list(codes))
    if name in grids.FLOATS:
        raw, want = np.concatenate([raw, raw + (1 << (ELEMENTS[name].bits - 1))]), np.concatenate([want, -want])
    got = decode_grid(as_codes(raw, ELEMENTS[name]), ELEMENTS[name]).numpy()
    assert np.array_equal(got.view(np.int32), want.view(np.int32))
    peer = reference.ML_DTYPES.get(name)
    if peer is not None:
        assert np.array_equal(got, raw.astype(np.uint8).view(peer).astype(np.float32))


@pytest.mark.parametrize("name", SMALL)
def test_values_midpoints_and_their_neighbours_get_the_exact_code(name: str) -> None:
    x = signed_probes(name)
    want = np.array([grids.code(float(value), name) for value in x])
    codes = encode_grid(torch.from_numpy(x), ELEMENTS[name])
    got = codes.view(torch.uint8).numpy() if name in grids.FLOATS else codes.numpy()
    wrong = np.nonzero(got.astype(np.int64) != want)[0]
    assert wrong.size == 0, (x[wrong[:5]], got[wrong[:5]], want[wrong[:5]])
    rounded = round_to_grid(torch.from_numpy(x), ELEMENTS[name])
    assert torch.equal(rounded, decode_grid(codes, ELEMENTS[name]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("name", "narrow"), [(n, narrow) for n in WHOLE for narrow in {False, not n.startswith("u")}])
def test_roundings_and_narrow_ranges(name: str, rounding: str, narrow: bool) -> None:
    spec = TensorSpec(name, PerTensor(), ScaleSpec("f32", "absmax"), rounding=rounding, narrow=narrow)  # type: ignore[arg-type]
    # the largest float32 below one half: adding one half to it gives one
    x = np.concatenate([grids.probes(list(grids.values(name).values())), np.float32([0.49999997, -0.49999997])])
    want = [grids.code(float(value), name, rounding, narrow) for value in x]
    assert encode_grid(torch.from_numpy(x), spec.format).tolist() == want


@pytest.mark.parametrize("name", ML_INTEGERS)
def test_integers_equal_ml_dtypes(name: str) -> None:
    element = ELEMENTS[name]
    x = np.arange(element.minimum, element.maximum + 0.25, 0.25, dtype=np.float32)
    got = encode_grid(torch.from_numpy(x), element).numpy()
    assert np.array_equal(got, np.rint(x).astype(ML_INTEGERS[name]).astype(got.dtype))


@pytest.mark.parametrize(
    ("name", "rounding"), [(name, rounding) for name in SMALL for rounding in ROUNDINGS[: 3 if name in WHOLE else 1]]
)
def test_rounding_is_monotone(name: str, rounding: str) -> None:
    spec = TensorSpec(name, PerTensor(), ScaleSpec("f32"), rounding=rounding)  # type: ignore[arg-type]
    dense = np.linspace(-1.2, 1.2, 30_001) * spec.format.maximum
    x = torch.from_numpy(np.sort(np.concatenate([signed_probes(name), dense]).astype(np.float32)))
    assert bool((round_to_grid(x, spec.format).diff() >= 0).all())


def test_code_dtypes() -> None:
    assert {name: str(integer.code_dtype(ELEMENTS[name])).removeprefix("torch.") for name in grids.INTEGERS} == {
        name: "uint8" if name.startswith("u") else "int8" for name in grids.INTEGERS
    }


@pytest.mark.parametrize(("name", "peer"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_16_bit_casts(name: str, peer: type) -> None:
    """All 65536 codes, and midpoints with their neighbours; finite values saturate."""
    element = ELEMENTS[name]
    codes = np.arange(1 << 16, dtype=np.uint16)
    native = torch.from_numpy(codes.view(np.int16).copy()).view(codec(element).code_dtype(element))
    values = decode_grid(native, element).numpy()
    assert np.array_equal(values, codes.view(peer).astype(np.float32), equal_nan=True)
    grid = np.unique(values[np.isfinite(values)])
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    x = np.concatenate([grid, middle, np.nextafter(middle, np.float32(0)), np.float32([3.4028235e38, -3.4028235e38])])
    got = encode_grid(torch.from_numpy(x), element)
    want = np.clip(x, element.minimum, element.maximum).astype(peer)
    assert np.array_equal(got.view(torch.int16).numpy(), want.view(np.int16))
    assert np.array_equal(round_to_grid(torch.from_numpy(x), element).numpy(), want.astype(np.float32))


# --- scale formats ---------------------------------------------------------------------------------------------------

ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def test_8_bit_scale_formats() -> None:
    assert {name for name, row in SCALE_FORMATS.items() if row.bits == 8} == {"e8m0", "e4m3", "e5m3"}


def test_every_e8m0_byte() -> None:
    want = ALL_BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(scales.decode_scale(ALL_BYTES, "e8m0").numpy(), want, equal_nan=True)


def test_every_e4m3_byte() -> None:
    want = ALL_BYTES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = scales.decode_scale(ALL_BYTES.view(torch.float8_e4m3fn), "e4m3").numpy()
    assert np.array_equal(got, want, equal_nan=True)


def test_every_e5m3_byte() -> None:
    grid = grids.magnitudes("e5m3")
    got = scales.decode_scale(ALL_BYTES, "e5m3")
    assert got[:255].tolist() == [float(value) for value in grid]
    assert got[255].isnan()
    assert float(grid[-1]) == SCALE_FORMATS["e5m3"].maximum == 114688


def test_e5m3_codes_of_values_midpoints_and_neighbours() -> None:
    grid = grids.magnitudes("e5m3")
    x = grids.probes(grid)
    x = np.concatenate([x, -x])
    want = [grids.nearest(max(grids.Fraction(float(v)), grids.Fraction(0)), grid, list(range(255))) for v in x]
    assert scales.e5m3_bytes(torch.from_numpy(x)).tolist() == want


def test_e4m3_block_scales_of_values_midpoints_and_neighbours() -> None:
    """Under a global scale of 1 / 6 the block scale of fp4 is amax itself, between 2^-9 and 448."""
    outer = torch.tensor(1 / 6)
    assert outer * 6 == 1
    grid = grids.magnitudes("fp8_e4m3")
    x = grids.probes(grid)
    x = x[x > 0]
    got = scales.e4m3_scale(torch.from_numpy(x), ELEMENTS["fp4_e2m1"], "absmax", outer).view(torch.uint8).tolist()
    assert got == [max(grids.nearest(grids.Fraction(float(v)), grid, list(range(127))), 1) for v in x]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_plain_scales_are_the_rounded_quotient(dtype: str) -> None:
    x = np.exp2(np.linspace(-12, 12, 5000)).astype(np.float32)
    spec = TensorSpec("int4", PerTensor(), ScaleSpec(dtype, "half_range"))
    peer = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    got = scales.plain_scale(scales.Range(torch.from_numpy(x)), spec, torch.float32)
    assert np.array_equal(got.float().numpy(), (x / np.float32(7.5)).astype(peer).astype(np.float32))


def test_pow2_scales_are_nearest_in_the_logarithm() -> None:
    powers = np.exp2(np.arange(-40, 40, dtype=np.float64))
    roots = (powers * np.sqrt(2)).astype(np.float32)
    x = np.concatenate(
        [powers.astype(np.float32), roots, np.nextafter(roots, np.float32(0)), powers * 1.3, powers * 1.5]
    )
    x = x.astype(np.float32)
    spec = TensorSpec("uint8", PerTensor(), ScaleSpec("pow2", "absmax"))
    unit = (x * np.float32(255)) / np.float32(255)  # what is left of x after the division by the largest code
    got = scales.plain_scale(scales.Range(torch.from_numpy(x * np.float32(255))), spec, torch.float32).tolist()
    for value, scale in zip(unit, got, strict=True):
        power = grids.Fraction(scale)
        square = grids.Fraction(float(value)) ** 2
        assert power**2 / 2 < square <= power**2 * 2, value
