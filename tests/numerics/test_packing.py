"""Packing: round trips for any shape, layouts against numpy and compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarkcli.errors import ModelError
from quarkcli.numerics import packing


def codes(low: int, high: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6))
SEEDS = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_nibbles_and_fp6_round_trip(shape: tuple[int, int], seed: int) -> None:
    four = codes(0, 15, (shape[0], shape[1] * 2), seed, torch.uint8)
    assert torch.equal(packing.unpack_nibbles(packing.pack_nibbles(four)), four)
    six = codes(0, 63, (shape[0], shape[1] * 4), seed, torch.uint8)
    assert torch.equal(packing.unpack_fp6(packing.pack_fp6(six)), six)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=SEEDS, bits=st.sampled_from([2, 4, 8]))
def test_int32_round_trip(shape: tuple[int, int], seed: int, bits: int) -> None:
    values = codes(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, (shape[0], shape[1] * 32 // bits), seed)
    packed = packing.pack_int32(values, bits)
    assert packed.shape == shape
    assert torch.equal(packing.unpack_int32(packed, bits), values)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_awq_round_trip(shape: tuple[int, int], seed: int) -> None:
    values = codes(-8, 7, (shape[0], shape[1] * 8), seed)
    packed = packing.pack_awq(values)
    assert packed.dtype == torch.int32
    assert torch.equal(packing.unpack_awq(packed), values)


def test_awq_order() -> None:
    values = codes(-8, 7, (3, 16), 5)
    want = np.zeros((3, 2), dtype=np.uint32)
    for j, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        want |= (values.numpy()[:, source::8].astype(np.uint32) & 15) << np.uint32(4 * j)
    assert np.array_equal(packing.pack_awq(values).numpy().view(np.uint32), want)


@pytest.mark.parametrize("bits", [4, 8])
def test_int32_equals_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = codes(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, (6, 64), 2)
    assert torch.equal(packing.pack_int32(values, bits), helpers.pack_to_int32(values, bits))


def test_strided_input_is_packed_by_value() -> None:
    values = codes(0, 15, (8, 6), 1, torch.uint8)
    assert torch.equal(packing.pack_nibbles(values.t()), packing.pack_nibbles(values.t().contiguous()))
    signed = codes(-8, 7, (16, 3), 1)
    assert torch.equal(packing.pack_awq(signed.t()), packing.pack_awq(signed.t().contiguous()))
    assert torch.equal(packing.pack_int32(signed.t(), 4), packing.pack_int32(signed.t().contiguous(), 4))


@pytest.mark.parametrize(
    "pack",
    [packing.pack_nibbles, packing.pack_fp6, packing.pack_awq, lambda c: packing.pack_int32(c, 4)],
    ids=["nibbles", "fp6", "awq", "int32"],
)
def test_lengths_that_do_not_fill_a_word_are_refused(pack) -> None:
    with pytest.raises(ModelError, match="7"):
        pack(torch.zeros(2, 7, dtype=torch.uint8))


def test_odd_widths_are_refused() -> None:
    with pytest.raises(ModelError, match="3-bit"):
        packing.pack_int32(torch.zeros(2, 32, dtype=torch.int8), 3)
