"""Small floats against ml_dtypes and a float64 table search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quarkcli.numerics.formats import minifloat
from quarkcli.numerics.quantize import decode_grid
from quarkcli.spec import ELEMENTS

from .. import reference

NAMES = list(reference.FLOATS)


def samples(name: str) -> NDArray[np.float32]:
    """Random values over all binades, ties and their neighbours, zeros, subnormals, infinities and float32 max."""
    rng = np.random.default_rng(7)
    spread = rng.standard_normal(20_000) * np.exp2(rng.integers(-24, 20, 20_000))
    ordinary = rng.standard_normal(20_000) * ELEMENTS[name].maximum / 3
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf]
    return np.concatenate([spread, ordinary, special, reference.ties(name)]).astype(np.float32)


def encoded(x: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    element = ELEMENTS[name]
    codes = torch.empty(x.shape, dtype=minifloat.code_dtype(element))
    minifloat.encode_(torch.from_numpy(x.copy()), element, codes)
    return codes.view(torch.uint8).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_codes_equal_ml_dtypes(name: str) -> None:
    x = samples(name)
    clamped = np.clip(x, ELEMENTS[name].minimum, ELEMENTS[name].maximum)
    assert np.array_equal(encoded(x, name), clamped.astype(reference.ML_DTYPES[name]).view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_codes_equal_the_table_search(name: str) -> None:
    x = samples(name)
    assert np.array_equal(encoded(x, name), reference.float_codes(x, name))


@pytest.mark.parametrize("name", NAMES)
def test_generic_encoder_equals_the_one_in_use(name: str) -> None:
    x = samples(name)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    minifloat.encode_bits_(torch.from_numpy(x.copy()), ELEMENTS[name], codes)
    assert np.array_equal(codes.numpy(), encoded(x, name))


@pytest.mark.parametrize("name", NAMES)
def test_rounding_gives_the_table_value_with_its_sign(name: str) -> None:
    x = samples(name)
    rounded = minifloat.round_(torch.from_numpy(x.copy()), ELEMENTS[name]).numpy()
    want = reference.float_values(x, name).astype(np.float32)
    assert np.array_equal(rounded.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("name", NAMES)
def test_every_code_round_trips(name: str) -> None:
    values = reference.table(name).astype(np.float32)
    values = np.concatenate([values, -values])
    codes = torch.from_numpy(encoded(values, name)).view(minifloat.code_dtype(ELEMENTS[name]))
    decoded = decode_grid(codes, ELEMENTS[name]).numpy()
    assert np.array_equal(decoded.view(np.int32), values.view(np.int32))


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_monotone(name: str) -> None:
    x = torch.from_numpy(np.sort(samples(name)))
    rounded = minifloat.round_(x.clone(), ELEMENTS[name])
    assert bool((rounded.diff() >= 0).all())


def test_nan_stays_nan_when_rounding() -> None:
    for name in NAMES:
        y = torch.tensor([float("nan"), 1.0])
        rounded = minifloat.round_(y, ELEMENTS[name])
        assert rounded[0].isnan()
        assert rounded[1] == 1.0


def test_fp8_nan_codes_decode_to_nan() -> None:
    for name in ("fp8_e4m3", "fp8_e5m2"):
        element = ELEMENTS[name]
        codes = torch.tensor([0x7F, 0xFF, 0x38], dtype=torch.uint8).view(minifloat.code_dtype(element))
        assert decode_grid(codes, element).isnan().tolist() == [True, True, False]


def test_rows_of_a_larger_matrix_can_be_written_in_place() -> None:
    whole = torch.zeros(4, 6, dtype=torch.uint8)
    minifloat.encode_(torch.full((2, 6), -6.0), ELEMENTS["fp4_e2m1"], whole[1:3])
    assert whole.tolist() == [[0] * 6, [15] * 6, [15] * 6, [0] * 6]
