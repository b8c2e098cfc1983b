"""Codes <-> the bytes of a checkpoint. Layouts as written by AMD Quark, compressed-tensors and AutoAWQ.

Every function works along the last axis and is the exact inverse of its partner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.errors import ModelError

_WORD_BITS = 32


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16 [..., n] -> uint8 [..., n / 2]; the low nibble is the even column."""
    return _fold(codes, 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., m] -> uint8 [..., 2 m]."""
    return _unfold(packed, 4)


def pack_fp6(codes: Tensor) -> Tensor:
    """uint8 codes below 64 [..., n] -> uint8 [..., 3 n / 4]; four codes little endian in three bytes."""
    _require_multiple(codes, 4)
    c0, c1, c2, c3 = codes.unflatten(-1, (-1, 4)).unbind(-1)
    # uint8 shifts drop what leaves the byte.
    return torch.stack((c0 | (c1 << 6), (c1 >> 2) | (c2 << 4), (c2 >> 4) | (c3 << 2)), -1).flatten(-2)


def unpack_fp6(packed: Tensor) -> Tensor:
    """Inverse of `pack_fp6`: uint8 [..., 3 m] -> uint8 [..., 4 m]."""
    _require_multiple(packed, 3)
    b0, b1, b2 = packed.unflatten(-1, (-1, 3)).unbind(-1)
    fields = (b0, (b0 >> 6) | (b1 << 2), (b1 >> 4) | (b2 << 4), b2 >> 2)
    return torch.stack(fields, -1).flatten(-2).bitwise_and_(0x3F)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """int8 signed codes [out, in] -> int32 [out, in * bits / 32] as compressed-tensors stores them.

    Offset binary (value + 2^(bits - 1)), the first column in the lowest bits. `bits` is 2, 4 or 8.
    """
    _require_multiple(codes, _codes_per_word(bits))
    packed = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # uint8 wraps: the offset code
    width = bits
    while width < 8:
        packed = _fold(packed, width)
        width *= 2
    return packed.view(torch.int32)


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_int32`: int32 [out, m] -> int8 [out, m * 32 / bits]."""
    _codes_per_word(bits)
    codes = packed.contiguous().view(torch.uint8)
    width = 8
    while width > bits:
        width //= 2
        codes = _unfold(codes, width)
    return (codes - (1 << (bits - 1))).view(torch.int8)


def pack_awq(codes: Tensor) -> Tensor:
    """int8 4-bit codes [rows, n] -> int32 [rows, n / 8]: two's complement nibbles in AWQ order (Quark `reorder`).

    Nibble j of a word, from the low end, holds element (0, 2, 4, 6, 1, 3, 5, 7)[j] of its run of eight.
    """
    _require_multiple(codes, 8)
    words = codes.contiguous().view(torch.int64) & 0x0F0F0F0F0F0F0F0F  # code i in byte i
    # Bytes 0, 1 and 4, 5 become the nibble pairs (c0 c2), (c1 c3) and (c4 c6), (c5 c7) ...
    words = (words | (words >> 12)) & 0x0000FFFF0000FFFF
    # ... which go to bytes 0, 2 and 1, 3 of the result.
    words = (words | (words << 8)) & 0x00FF00FF00FF00FF
    return (words | (words >> 24)).to(torch.int32)


def unpack_awq(packed: Tensor) -> Tensor:
    """Inverse of `pack_awq`: int32 [rows, m] -> int8 [rows, 8 m], signed."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = (words | (words << 24)) & 0x00FF00FF00FF00FF
    words = (words | (words >> 8)) & 0x0000FFFF0000FFFF
    words = (words | (words << 12)) & 0x0F0F0F0F0F0F0F0F
    # Bit 3 is the sign: adding and subtracting 8 extends it.
    return (words.view(torch.int8) ^ 8) - 8


def _fold(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits [..., n] -> uint8 [..., n / 2]: two neighbours in the low 2 * bits bits."""
    _require_multiple(codes, 2)
    pairs = codes.contiguous().view(torch.int16)  # little endian: the even column is the low byte
    return (pairs >> (8 - bits)).bitwise_or_(pairs).to(torch.uint8)  # the cast keeps the low byte


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_fold`."""
    wide = packed.to(torch.int16)
    mask = (1 << bits) - 1
    return ((wide << (8 - bits)) | wide).bitwise_and_(mask << 8 | mask).view(torch.uint8)


def _codes_per_word(bits: int) -> int:
    if bits not in (2, 4, 8):
        raise ModelError(f"{bits}-bit codes are not packed into 32-bit words", hint="use 2, 4 or 8 bits")
    return _WORD_BITS // bits


def _require_multiple(codes: Tensor, count: int) -> None:
    if codes.shape[-1] % count:
        raise ModelError(
            f"the last dimension {codes.shape[-1]} is not a multiple of {count} and cannot be packed",
            hint="exclude this layer",
        )
