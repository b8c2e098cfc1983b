"""Products of 16-bit values against float64."""

import pytest
import torch

from quarkcli.numerics.products import RUN, add_product_

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _values(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    spread = torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(9)))
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread + 0.3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 300, 2 * RUN + 7])
def test_products_are_those_of_float64_but_for_float32_sums(rows: int, dtype: torch.dtype) -> None:
    """Each entry, relative to its Cauchy-Schwarz bound: rounding a value to 8 bits would be a thousand times as far."""
    left, right = _values(rows, 300, dtype, 1), _values(rows, 200, dtype, 2)
    total = torch.ones(300, 200)
    add_product_(total, left.float(), right.float(), dtype, keep=0.5, weight=0.25)
    a, b = left.double(), right.double()
    size = 0.5 + 0.25 * a.norm(dim=0)[:, None] * b.norm(dim=0)
    error = ((total.double() - 0.5 - 0.25 * a.T @ b).abs() / size).max()
    assert float(error) < 2e-6


@pytest.mark.parametrize("width", [64, 256, 512])
def test_bits_do_not_depend_on_the_number_of_threads(width: int) -> None:
    rows = _values(2 * RUN, width, torch.bfloat16, 3).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.zeros(width, width))
            add_product_(found[-1], rows, rows, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_other_float32_products_stay_as_they_were() -> None:
    left, right = torch.randn(300, 300), torch.randn(300, 300)
    before = left @ right
    add_product_(torch.zeros(300, 300), left, right, torch.bfloat16)
    assert torch.equal(left @ right, before)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
