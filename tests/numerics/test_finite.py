"""NaN and infinity are found in every dtype that files hold."""

from __future__ import annotations

import pytest
import torch

from quarkcli.numerics.finite import bad_values, is_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_many(dtype: torch.dtype, value: float) -> None:
    made = torch.full((7, 11, 13), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(made)  # sums of the largest values overflow
    made[3, 4, 5] = value
    assert not is_finite(made)
    assert not is_finite(made.transpose(0, 2))
    assert bad_values(made).nonzero().tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_code_of_float8_is_told_as_torch_reads_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for code in codes:
        one = code.reshape(1, 1).view(dtype)
        assert is_finite(one) == bool(one.float().isfinite().all())
    assert torch.equal(bad_values(codes.view(dtype)), ~codes.view(dtype).float().isfinite())


@pytest.mark.parametrize("made", [torch.empty(0, 4), torch.zeros(3, dtype=torch.int64), torch.tensor(True)])
def test_nothing_to_find(made: torch.Tensor) -> None:
    assert is_finite(made)


def test_numbers_without_axes() -> None:
    assert is_finite(torch.tensor(1.0))
    assert not is_finite(torch.tensor(float("nan")))
