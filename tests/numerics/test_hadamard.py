"""Hadamard matrices: exact in integers, for the widths that models have, and products with them."""

from __future__ import annotations

import pytest
import torch

from quarkcli.numerics import hadamard as h

# Hidden and intermediate widths, and head sizes, of published models.
WIDTHS = (
    64, 80, 96, 112, 128, 192, 256, 576, 640, 896, 960, 1152, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 3840, 4096,
    4864, 5120, 5376, 6144, 7168, 8192, 8960, 9216, 9728, 11008, 12288, 13824, 14336, 16384, 18944, 25600,
)  # fmt: skip


@pytest.mark.parametrize("size", [n for n in range(1, 501) if h.base(n) is not None])
def test_every_size_is_exact(size: int) -> None:
    matrix = h.hadamard(size).long()
    assert matrix.abs().min() == 1 and matrix.abs().max() == 1
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.int64))


def test_which_sizes_there_are() -> None:
    """All multiples of four but those that need a table or a larger factor of two, and 1 and 2."""
    have = [n for n in range(1, 501) if h.base(n) is not None]
    assert all(n % 4 == 0 or n in {1, 2} for n in have)
    missing = [n for n in range(4, 501, 4) if h.base(n) is None]
    assert missing[:6] == [92, 116, 156, 172, 184, 188] and len(missing) == 22
    assert {n: h.base(n) for n in (64, 576, 2880, 11008, 18944, 14336)} == {
        64: 1, 576: 36, 2880: 180, 11008: 344, 18944: 148, 14336: 28,
    }  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_models_have_one(width: int) -> None:
    size = h.base(width)
    assert size is not None
    for factor in h.factors(width):
        n = len(factor)
        assert torch.equal(factor.int() @ factor.int().T, n * torch.eye(n, dtype=torch.int32))
    x = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(h.turned(x, width).norm(dim=1), x.norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 12, 28, 52, 100, 256, 344, 576])
def test_the_product_is_the_matrix(size: int) -> None:
    x = torch.randn(5, 3 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = (x.view(5, 3, size) @ (h.hadamard(size).double() / size**0.5)).reshape(5, 3 * size)
    assert torch.allclose(h.turned(x, size), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [3, 6, 18, 92, 27392])
def test_a_size_without_one(size: int) -> None:
    assert h.base(size) is None
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size}"):
        h.factors(size)
    assert size % h.largest_block(size) == 0


def test_long_inputs_are_turned_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = h.turned(x, 64)
    monkeypatch.setattr(h, "_PIECE", 7 * 64)
    assert torch.allclose(h.turned(x, 64), whole, atol=1e-14)
