"""Packing: round trips for any length and width, layouts against numpy, plain integers and compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quarkcli.errors import ModelError
from quarkcli.numerics import packing

ROWS, SEEDS, WIDTHS = st.integers(1, 4), st.integers(0, 2**31), st.integers(1, 8)
COUNTS = st.integers(0, 70)


def codes(bits: int, signed: bool, shape: tuple[int, ...], seed: int) -> Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    values = torch.randint(low, low + (1 << bits), shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.int8 if signed else torch.uint8)


def exact_stream(row: Tensor, bits: int, *, msb: bool) -> bytes:
    """The bits of one row as one whole number, then as bytes; the order of the bits is that of Python's integers."""
    length = -(-len(row) * bits // 8)
    fields = [int(code) & ((1 << bits) - 1) for code in row]
    if msb:
        number = sum(field << (8 * length - (i + 1) * bits) for i, field in enumerate(fields))
        return number.to_bytes(length, "big")
    return sum(field << (i * bits) for i, field in enumerate(fields)).to_bytes(length, "little")


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, count=COUNTS, bits=WIDTHS, signed=st.booleans(), msb=st.booleans(), seed=SEEDS)
def test_bit_streams(rows: int, count: int, bits: int, signed: bool, msb: bool, seed: int) -> None:
    values = codes(bits, signed, (rows, count), seed)
    pack, unpack = (packing.pack_msb, packing.unpack_msb) if msb else (packing.pack_bits, packing.unpack_bits)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert [bytes(row.tolist()) for row in packed] == [exact_stream(row, bits, msb=msb) for row in values]
    assert torch.equal(unpack(packed, bits, count, signed), values)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, count=st.integers(1, 70), bits=WIDTHS, signed=st.booleans(), seed=SEEDS)
def test_words_of_compressed_tensors(rows: int, count: int, bits: int, signed: bool, seed: int) -> None:
    """Signed codes in offset binary, unsigned ones as they are; a code may lie across two words."""
    values = codes(bits, signed, (rows, count), seed)
    packed = packing.pack_int32(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-count * bits // 32))
    shifted = values.int() + (1 << (bits - 1)) * signed
    want = [exact_stream(row, bits, msb=False).ljust(packed.shape[1] * 4, b"\0") for row in shifted]
    assert [row.numpy().tobytes() for row in packed] == want
    assert torch.equal(packing.unpack_int32(packed, bits, count, signed), values)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [32, 40, 33])
def test_int32_equals_compressed_tensors(bits: int, count: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = codes(bits, True, (6, count), 2)
    assert torch.equal(packing.pack_int32(values, bits), helpers.pack_to_int32(values, bits))


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, groups=st.integers(1, 6), seed=SEEDS)
def test_fp6_is_a_bit_stream(rows: int, groups: int, seed: int) -> None:
    six = codes(6, False, (rows, groups * 4), seed)
    assert [bytes(row.tolist()) for row in packing.pack_fp6(six)] == [exact_stream(r, 6, msb=False) for r in six]
    assert torch.equal(packing.unpack_fp6(packing.pack_fp6(six)), six)


PAIRS = {
    "order": (lambda each: packing.pack_bits(each, 4).view(torch.int32), packing.unpack_order, range(8)),
    "awq": (packing.pack_awq, packing.unpack_awq, (0, 2, 4, 6, 1, 3, 5, 7)),
}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PAIRS)), rows=ROWS, words=st.integers(1, 6), signed=st.booleans(), seed=SEEDS)
def test_words_of_eight_nibbles(name: str, rows: int, words: int, signed: bool, seed: int) -> None:
    pack, unpack, order = PAIRS[name]
    values = codes(4, signed, (rows, words * 8), seed)
    want = np.zeros((rows, words), dtype=np.uint32)
    for slot, source in enumerate(order):
        want |= (values.numpy()[:, source::8].astype(np.uint32) & 15) << np.uint32(4 * slot)
    packed = pack(values)
    assert packed.dtype == torch.int32
    assert np.array_equal(packed.numpy().view(np.uint32), want)
    assert torch.equal(unpack(packed, signed), values)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp6": packing.pack_fp6,
    "awq": packing.pack_awq,
    "int32": lambda each: packing.pack_int32(each, 4),
    "bits 3": lambda each: packing.pack_bits(each, 3),
    "bits 5": lambda each: packing.pack_bits(each, 5),
    "msb": lambda each: packing.pack_msb(each, 2),
}


@pytest.mark.parametrize("pack", CALLS.values(), ids=CALLS)
def test_any_strides_and_offsets_are_packed_by_value(pack: Callable[[Tensor], Tensor]) -> None:
    values = codes(2, False, (16, 24), 1)
    assert torch.equal(pack(values.t()), pack(values.t().contiguous()))
    odd = values.flatten()[3 : 3 + 8 * 16].view(8, 16)  # contiguous, but not where a wider integer may begin
    assert torch.equal(pack(odd), pack(odd.clone()))
    assert torch.equal(pack(values.view(4, 4, 24)), pack(values).view(4, 4, -1))


@pytest.mark.parametrize("name", ["fp6", "awq"])
def test_lengths_that_do_not_fill_a_word_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="7"):
        CALLS[name](torch.zeros(2, 7, dtype=torch.uint8))


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_that_do_not_fit_a_byte_are_refused(bits: int) -> None:
    zeros = torch.zeros(2, 8, dtype=torch.uint8)
    for call in (packing.pack_bits, packing.pack_msb, packing.pack_int32):
        with pytest.raises(ModelError, match=f"{bits}-bit"):
            call(zeros, bits)
    for unpack in (packing.unpack_bits, packing.unpack_msb):
        with pytest.raises(ModelError, match=f"{bits}-bit"):
            unpack(zeros, bits, 8)


@pytest.mark.parametrize("unpack", [packing.unpack_bits, packing.unpack_msb])
def test_bytes_that_do_not_hold_the_count_are_refused(unpack: Callable[..., Tensor]) -> None:
    with pytest.raises(ModelError, match="2 bytes do not hold 8 codes of 3 bits"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 3, 8)
