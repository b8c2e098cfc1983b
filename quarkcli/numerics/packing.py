"""Packs codes into the bytes of a checkpoint, and back, as AMD Quark, compressed-tensors and AutoAWQ lay them out.

Every function works along the last axis and is the exact inverse of its partner. Codes are int8 or uint8 tensors; of a
signed code the two's complement bits are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quarkcli.errors import ModelError
from quarkcli.numerics.chunks import CPU_CHUNK

_WORD_BITS = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Returns codes of `bits` bits (1..8) [..., n] -> uint8 [..., ceil(n * bits / 8)].

    A row is one stream of bits, the lowest first.

    Code i lies in bits i * bits .. (i + 1) * bits - 1 of the row; bits of the last byte that are left over are zero.
    AMD Quark's int3 and fp6, and everybody's 4-bit nibbles.
    """
    _require_width(bits)
    stream = _stream(_padded(_unsigned(codes, bits), 8), bits)
    return _first(stream, -(-codes.shape[-1] * bits // 8))


def unpack_bits(packed: Tensor, bits: int, count: int, signed: bool = False) -> Tensor:
    """Returns the inverse of `pack_bits`.

    It gives the `count` codes [..., count] of each row, int8 with their sign extended or uint8.
    """
    _require_length(packed, bits, count)
    codes = _first(_codes(_padded(packed, bits), bits), count)
    return _signed(codes, bits) if signed else codes


def pack_msb(codes: Tensor, bits: int) -> Tensor:
    """As `pack_bits`, the highest bit first: the first code lies in the top bits of the first byte (Quark's uint2)."""
    _require_width(bits)
    turned = _turned(_padded(_unsigned(codes, bits), 8), 8)
    return _first(_turned(_stream(turned, bits), bits), -(-codes.shape[-1] * bits // 8))


def unpack_msb(packed: Tensor, bits: int, count: int, signed: bool = False) -> Tensor:
    """Returns the inverse of `pack_msb`, as `unpack_bits`."""
    _require_length(packed, bits, count)
    codes = _first(_turned(_codes(_turned(_padded(packed, bits), bits), bits), 8), count)
    return _signed(codes, bits) if signed else codes


def pack_fp6(codes: Tensor) -> Tensor:
    """Returns uint8 codes below 64 [..., n] -> uint8 [..., 3 n / 4]; four codes little endian in three bytes."""
    _require_multiple(codes, 4)
    c0, c1, c2, c3 = codes.unflatten(-1, (-1, 4)).unbind(-1)
    # uint8 shifts drop what leaves the byte.
    return torch.stack((c0 | (c1 << 6), (c1 >> 2) | (c2 << 4), (c2 >> 4) | (c3 << 2)), -1).flatten(-2)


def unpack_fp6(packed: Tensor) -> Tensor:
    """Returns the inverse of `pack_fp6`: uint8 [..., 3 m] -> uint8 [..., 4 m]."""
    _require_multiple(packed, 3)
    b0, b1, b2 = packed.unflatten(-1, (-1, 3)).unbind(-1)
    fields = (b0, (b0 >> 6) | (b1 << 2), (b1 >> 4) | (b2 << 4), b2 >> 2)
    return torch.stack(fields, -1).flatten(-2).bitwise_and_(0x3F)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Returns codes of `bits` bits [rows, n] -> int32 [rows, ceil(n * bits / 32)] as compressed-tensors stores them.

    int8 codes as offset binary (value + 2^(bits - 1)), uint8 ones as they are; the first column in the lowest bits.
    Where the width does not divide 32 a code lies across two words; what the last word has left over is zero.
    """
    if codes.dtype == torch.int8:
        codes = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # uint8 wraps: the offset code
    return _viewed(_padded(pack_bits(codes, bits), _WORD_BITS // 8), torch.int32)


def words_of(stream: Tensor, bits: int, signed: bool) -> Tensor:
    """Returns as `pack_int32` what `pack_bits` made of the same codes: where a code's bits never leave a byte.

    What a row leaves over of its last byte is no zero where codes are signed; nobody reads it.
    """
    if signed:
        stream = stream ^ _signs(bits)
    return _viewed(_padded(stream, _WORD_BITS // 8), torch.int32)


def stream_of(words: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Returns the inverse of `words_of`: the stream of the `count` codes of each row."""
    stream = words.contiguous().view(torch.uint8)[..., : -(-count * bits // 8)]
    return stream ^ _signs(bits) if signed else stream


def _signs(bits: int) -> int:
    """Returns a byte of its codes' top bits, which two's complement and offset binary have the other way round."""
    return sum(1 << (start + bits - 1) for start in range(0, 8, bits))


def unpack_int32(packed: Tensor, bits: int, count: int | None = None, signed: bool = True) -> Tensor:
    """Returns the inverse of `pack_int32`: the `count` codes (None: all the words hold) of each row, int8 or uint8."""
    count = packed.shape[-1] * _WORD_BITS // bits if count is None else count
    stream = packed.contiguous().view(torch.uint8)[..., : -(-count * bits // 8)]
    codes = unpack_bits(stream, bits, count)
    return (codes - (1 << (bits - 1))).view(torch.int8) if signed else codes


def unpack_order(packed: Tensor, signed: bool = True) -> Tensor:
    """Returns 4-bit codes of int32 words [rows, m] -> int8 [rows, 8 m] with their sign, or uint8: AMD Quark's `order`.

    Nibble j of a word, from the low end, is element j; signed ones are two's complement.
    """
    codes = _unfold(packed.contiguous().view(torch.uint8), 4)
    return _signed(codes, 4) if signed else codes


def pack_awq(codes: Tensor) -> Tensor:
    """Returns 4-bit codes [rows, n] -> int32 [rows, n / 8]: two's complement nibbles in AWQ order (Quark `reorder`).

    Nibble j of a word, from the low end, holds element (0, 2, 4, 6, 1, 3, 5, 7)[j] of its run of eight.
    """
    _require_multiple(codes, 8)
    words = _viewed(codes, torch.int64) & _lanes(8, 4)  # code i in byte i
    # Bytes 0, 1 and 4, 5 become the nibble pairs (c0 c2), (c1 c3) and (c4 c6), (c5 c7) ...
    words.bitwise_or_(words >> 12).bitwise_and_(0x0000FFFF0000FFFF)
    # ... which go to bytes 0, 2 and 1, 3 of the result.
    words.bitwise_or_(words << 8).bitwise_and_(0x00FF00FF00FF00FF)
    return words.bitwise_or_(words >> 24).to(torch.int32)


def unpack_awq(packed: Tensor, signed: bool = True) -> Tensor:
    """Returns the inverse of `pack_awq`: int32 [rows, m] -> int8 [rows, 8 m] with their sign, or uint8."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words.bitwise_or_(words << 24).bitwise_and_(0x00FF00FF00FF00FF)
    words.bitwise_or_(words >> 8).bitwise_and_(0x0000FFFF0000FFFF)
    codes = words.bitwise_or_(words << 12).bitwise_and_(_lanes(8, 4)).view(torch.uint8)
    return _signed(codes, 4) if signed else codes


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Returns uint8 codes below 2^bits [..., 8 n] -> uint8 [..., bits * n]; see `pack_bits`."""
    match bits:
        case 1 | 2 | 3 | 4:
            return _stream(_fold(codes, bits), 2 * bits)
        case 6:
            return pack_fp6(codes)
        case 8:
            return codes.contiguous()
    words = _viewed(codes, torch.int64)  # code i in byte i
    for lane in (8, 16, 32):  # two lanes become one of twice the width, without the gap between them
        held = bits * lane // 8
        low = _lanes(2 * lane, held)
        words = (words & low) | ((words >> (lane - held)) & (low << held))
    return words.view(torch.uint8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)


def _codes(stream: Tensor, bits: int) -> Tensor:
    """Returns the inverse of `_stream`."""
    match bits:
        case 1 | 2 | 3 | 4:
            return _unfold(_codes(stream, 2 * bits), bits)
        case 6:
            return unpack_fp6(stream)
        case 8:
            return stream.contiguous()
    words = functional.pad(stream.unflatten(-1, (-1, bits)), (0, 8 - bits)).view(torch.int64)
    for lane in (32, 16, 8):
        held = bits * lane // 8
        low = _lanes(2 * lane, held)
        words = (words & low) | ((words & (low << held)) << (lane - held))
    return words.view(torch.uint8).flatten(-2)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """Returns the two's complement bits of signed codes as uint8; unsigned ones as they are."""
    return codes.view(torch.uint8) & ((1 << bits) - 1) if codes.dtype == torch.int8 else codes


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Returns uint8 two's complement codes of `bits` bits as int8: flipping and subtracting the top bit extends it."""
    half = 1 << (bits - 1)
    return ((codes ^ half) - half).view(torch.int8)


def _lanes(lane: int, width: int) -> int:
    """Returns a 64-bit mask of the low `width` bits of every run of `lane` bits."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, lane))


def _turned(values: Tensor, count: int) -> Tensor:
    """Returns every run of `count` values in reverse."""
    return values.unflatten(-1, (-1, count)).flip(-1).flatten(-2)


def _first(values: Tensor, count: int) -> Tensor:
    """Returns the first `count` of each row, contiguous."""
    return values if values.shape[-1] == count else values[..., :count].contiguous()


def _padded(codes: Tensor, count: int) -> Tensor:
    """Returns `codes` with zeros up to a multiple of `count` along the last axis."""
    missing = -codes.shape[-1] % count
    return functional.pad(codes, (0, missing)) if missing else codes


def _viewed(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns bytes as wider integers, low byte first; a copy where a view would not be aligned."""
    whole = codes.contiguous()
    if whole.storage_offset() % dtype.itemsize:
        whole = whole.clone()
    # Flat, because a dimension of one may have any stride.
    return whole.flatten().view(dtype).view(*codes.shape[:-1], codes.shape[-1] // dtype.itemsize)


def _fold(codes: Tensor, bits: int) -> Tensor:
    """Returns uint8 codes below 2^bits [..., n] -> uint8 [..., n / 2]: two neighbours in the low 2 * bits bits."""
    _require_multiple(codes, 2)
    pairs = _viewed(codes, torch.int16)  # little endian: the even column is the low byte
    out = torch.empty(pairs.shape, dtype=torch.uint8, device=pairs.device)
    for source, to in zip(pairs.view(-1).split(CPU_CHUNK), out.view(-1).split(CPU_CHUNK), strict=True):
        to.copy_((source >> (8 - bits)).bitwise_or_(source))  # the cast keeps the low byte
    return out


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """Returns the inverse of `_fold`."""
    wide = packed.to(torch.int16)
    mask = (1 << bits) - 1
    return ((wide << (8 - bits)) | wide).bitwise_and_(mask << 8 | mask).view(torch.uint8)


def _require_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ModelError(f"{bits}-bit codes do not fit a byte", hint="use 1 to 8 bits", kind="E-GROUP-SIZE")


def _require_length(packed: Tensor, bits: int, count: int) -> None:
    _require_width(bits)
    if packed.shape[-1] != -(-count * bits // 8):
        raise ModelError(f"{packed.shape[-1]} bytes do not hold {count} codes of {bits} bits", kind="E-GROUP-SIZE")


def _require_multiple(codes: Tensor, count: int) -> None:
    if codes.shape[-1] % count:
        raise ModelError(
            f"the last dimension {codes.shape[-1]} is not a multiple of {count} and cannot be packed",
            hint="exclude this layer",
            kind="E-GROUP-SIZE",
        )
