"""Integer codes against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quarkcli.numerics.formats import integer
from quarkcli.numerics.quantize import decode_grid
from quarkcli.spec import ELEMENTS

from .. import grids

NAMES = [name for name, element in ELEMENTS.items() if element.kind == "integer"]


@pytest.mark.parametrize("name", NAMES)
def test_codes_equal_numpy(name: str) -> None:
    element = ELEMENTS[name]
    rng = np.random.default_rng(3)
    half = np.arange(-300, 300) + 0.5
    x = np.concatenate([rng.standard_normal(5000) * 40, half, [0.0, -0.0, np.inf, -np.inf, 3e38]]).astype(np.float32)
    codes = torch.empty(x.shape, dtype=integer.code_dtype(element))
    integer.encode_(torch.from_numpy(x.copy()), element, codes)
    low, high, denominator = grids.INTEGERS[name]
    want = np.clip(np.rint(x.astype(np.float64) * denominator), low, high)
    assert np.array_equal(codes.numpy().astype(np.float64), want)
    assert np.array_equal(decode_grid(codes, element).numpy(), (want / denominator).astype(np.float32))


@pytest.mark.parametrize("name", ["int4", "uint4", "uint8"])
@pytest.mark.parametrize("zero", [3, 1, 0])
def test_whole_zero_points_are_added_after_rounding(name: str, zero: int) -> None:
    element = ELEMENTS[name]
    ties = (np.arange(-12, 13) / 2).astype(np.float32)
    shift = torch.tensor(zero).to(integer.code_dtype(element))
    codes = torch.empty(ties.shape, dtype=shift.dtype)
    integer.encode_(torch.from_numpy(ties.copy()), element, codes, None, shift)
    want = np.clip(np.rint(ties) + zero, element.minimum, element.maximum)
    assert np.array_equal(codes.numpy(), want)
    values = integer.decode_(codes, element, torch.empty(ties.shape), shift)
    assert np.array_equal(values.numpy(), want - zero)
    assert torch.equal(integer.round_(torch.from_numpy(ties.copy()), element, None, shift), values)


def test_real_zero_points_are_added_before_rounding() -> None:
    element = ELEMENTS["uint4"]
    x = np.linspace(-3, 9, 97).astype(np.float32)
    zero = torch.tensor(2.625)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    integer.encode_(torch.from_numpy(x.copy()), element, codes, None, zero)
    want = np.clip(np.rint(x + np.float32(2.625)), 0, 15)
    assert np.array_equal(codes.numpy(), want)
    values = integer.decode_(codes, element, torch.empty(x.shape), zero).numpy()
    assert np.array_equal(values, want.astype(np.float32) - np.float32(2.625))
