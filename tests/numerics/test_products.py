"""Products of 16-bit values against float64."""

import pytest
import torch

from quarkcli.numerics.products import RUN, add_product_, through_onednn
from quarkcli.numerics.quantize import make_qparams
from quarkcli.numerics.settle import DAMPS, Aim, Choices, Objective
from quarkcli.numerics.task import Task
from quarkcli.spec import PerGroup, ScaleSpec, TensorSpec
from tests.numerics.columns import settle

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _values(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    spread = torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(9)))
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread + 0.3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 300, 2 * RUN + 903])
def test_products_are_those_of_float64_but_for_float32_sums(rows: int, dtype: torch.dtype) -> None:
    """Each entry, relative to its Cauchy-Schwarz bound: rounding a value to 8 bits would be a thousand times as far."""
    left, right = _values(rows, 300, dtype, 1), _values(rows, 200, dtype, 2)
    total = torch.ones(300, 200)
    add_product_(total, left.float(), right.float(), dtype, -1)
    a, b = left.double(), right.double()
    error = ((total.double() - 1.0 + a.T @ b).abs() / (1.0 + a.norm(dim=0)[:, None] * b.norm(dim=0))).max()
    assert float(error) < 2e-6
    fresh = torch.full((300, 200), torch.nan)
    add_product_(fresh, left.float(), right.float(), dtype, -1, fresh=True)
    torch.testing.assert_close(
        fresh, total - 1.0, rtol=1e-5, atol=float(a.norm(dim=0).max() * b.norm(dim=0).max()) * 1e-6
    )


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


def test_products_through_onednn_are_float32s() -> None:
    """Of values that need all of float32's bits, also where a processor would round them to bfloat16."""
    left, right = _values(700, 300, torch.float32, 4), _values(700, 200, torch.float32, 5)
    size = left.double().norm(dim=0)[:, None] * right.double().norm(dim=0)
    with through_onednn():
        found = left.T @ right
    assert float(((found.double() - left.double().T @ right.double()).abs() / size).max()) < 1e-6


def test_products_elsewhere_stay_as_they_were() -> None:
    left, right = torch.randn(300, 300), torch.randn(300, 300)
    before = left @ right
    add_product_(torch.zeros(300, 300), left, right, torch.bfloat16)
    with pytest.raises(ZeroDivisionError), through_onednn():
        raise ZeroDivisionError
    assert torch.equal(left @ right, before)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_a_solution_does_not_depend_on_the_number_of_threads() -> None:
    """Factor, column loop, refinement and what is chosen on held-out tokens, of a problem wide enough for all steps."""
    spec = TensorSpec("int4", PerGroup(128), ScaleSpec("bf16", "half_range"))
    inputs = _values(3000, 640, torch.float32, 6)
    gram, held = (part.T @ part / len(part) for part in inputs.split([2600, 400]))
    weight = torch.randn(700, 640, generator=torch.Generator().manual_seed(7)).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            task = Task([weight], [make_qparams(weight, spec)], spec)
            choices = Choices(DAMPS, (0.0,), 2, True, 2600)
            found.append(settle(task, gram.clone(), choices, lambda factor, strength: Aim(), Objective(held)))
    finally:
        torch.set_num_threads(before)
    one, two = found
    assert one is not None and two is not None
    assert torch.equal(one.quantized[0].codes, two.quantized[0].codes)
    assert one.quantized[0].params.scale is not None and two.quantized[0].params.scale is not None
    assert torch.equal(one.quantized[0].params.scale, two.quantized[0].params.scale)
    assert one.damp == two.damp
