"""Looks at the values of stored tensors with numpy, a few megabytes at a time, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quarkcli.disk.headers import Header
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError, ResourceError

if TYPE_CHECKING:
    from io import BufferedReader

    from numpy import ndarray

_PIECE = 4 * 2**20  # bytes
# 8-bit floats: bits of the mantissa, bias of the exponent, and what the largest exponent stands for.
_FLOAT8 = {
    "F8_E4M3": (3, 7, "one NaN"),
    "F8_E5M2": (2, 15, "as IEEE"),
    "F8_E4M3FNUZ": (3, 8, "numbers"),
    "F8_E5M2FNUZ": (2, 16, "numbers"),
}
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_EXPONENTS = {"U8", "F8_E8M0"}  # scales of one byte: e8m0, or e5m3, whose NaN has the same bits


@dataclass
class Values:
    """A summary of the numbers of one tensor.

    first   place of the first NaN or infinity, counted in values
    only    the number of a tensor that is a scalar
    """

    count: int = 0
    nans: int = 0
    infinities: int = 0
    zeros: int = 0
    negatives: int = 0
    first: int | None = None
    only: float | None = None

    @property
    def nonfinite(self) -> int:
        return self.nans + self.infinities

    def fault(self, signed: bool = False) -> str | None:
        """Returns what is wrong with these numbers as scales, None when nothing is; `signed`: they may be negative."""
        counts = {"NaN": self.nans, "infinite": self.infinities, "zero": self.zeros}
        counts["negative"] = 0 if signed else self.negatives
        found = [word for word, count in counts.items() if count]
        return " and ".join(found) if found else None


def values(source: Source, names: Iterable[str]) -> dict[str, Values]:
    """Reads tensors of floats, or of scales in one byte, and returns their summaries. Raises ModelError.

    Each file is opened once and read front to back.
    """
    files: dict[str, list[Header]] = {}
    for name in dict.fromkeys(names):
        files.setdefault(source.headers[name].file, []).append(source.headers[name])
    found = {}
    for file, headers in files.items():
        with _opened(source, file) as (stream, where):
            for header in sorted(headers, key=lambda header: header.start):
                found[header.name] = _summary(header, _pieces(stream, header, where))
    return found


def _summary(header: Header, pieces: Iterable[ndarray[Any, Any]]) -> Values:
    import numpy as np

    found = Values()
    for piece in pieces:
        numbers = to_floats(piece, header.dtype)
        if not (numbers.min() > 0 and numbers.max() < np.inf):  # NaN is neither
            _count(found, numbers)
        if header.shape in ((), (1,)):
            found.only = float(numbers[0])
        found.count += len(numbers)
    return found


def _count(found: Values, numbers: ndarray[Any, Any]) -> None:
    """Counts the numbers that are no scales."""
    import numpy as np

    nan, inf = np.isnan(numbers), np.isinf(numbers)
    found.nans += int(nan.sum())
    found.infinities += int(inf.sum())
    found.zeros += int((numbers == 0).sum())
    found.negatives += int((numbers < 0).sum())
    if found.first is None and found.nonfinite:
        found.first = found.count + int((nan | inf).argmax())


def is_finite(source: Source, name: str) -> bool:
    """True when a tensor of codes holds no NaN and no infinity; 8-bit floats are judged by their bits."""
    import numpy as np

    header = source.headers[name]
    if header.dtype in _FLOAT8:
        bad = ~np.isfinite(_table(header.dtype))
        return not any(bad[piece].any() for piece in pieces(source, header))
    return not has_floats(header) or all(np.isfinite(numbers).all() for numbers in floats(source, header))


def has_floats(header: Header) -> bool:
    """True when the dtype can hold NaN or infinity."""
    return header.dtype in {"BF16", "F8_E8M0", *_NUMPY, *_FLOAT8}


def floats(source: Source, header: Header) -> Iterator[ndarray[Any, Any]]:
    """Yields the numbers of a tensor, flat, piece by piece."""
    for piece in pieces(source, header):
        yield to_floats(piece, header.dtype)


def to_floats(raw: ndarray[Any, Any], dtype: str) -> ndarray[Any, Any]:
    """Returns the numbers that bytes stand for, float32 or larger."""
    import numpy as np

    if dtype in _FLOAT8:
        return _table(dtype)[raw]
    if dtype in _EXPONENTS:
        powers = np.ldexp(np.float32(1), np.minimum(raw, 254).astype(np.int32) - 127)
        return np.where(raw == 255, np.float32("nan"), powers)
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view(_NUMPY[dtype])


def pieces(source: Source, header: Header) -> Iterator[ndarray[Any, Any]]:
    """Yields the bytes of a tensor piece by piece, each of whole values. Raises ModelError, ResourceError."""
    with _opened(source, header.file) as (stream, where):
        yield from _pieces(stream, header, where)


@contextmanager
def _opened(source: Source, file: str) -> Iterator[tuple[BufferedReader, str]]:
    path = source.path(file)
    try:
        with path.open("rb") as stream:
            yield stream, str(path)
    except OSError as error:
        raise ResourceError(f"cannot be read: {error.strerror or error}", where=str(path), kind="E-SYSTEM") from error


def _pieces(stream: BufferedReader, header: Header, where: str) -> Iterator[ndarray[Any, Any]]:
    import numpy as np

    stream.seek(header.start)
    left = header.nbytes
    while left:
        piece = np.empty(min(left, _PIECE), np.uint8)
        if stream.readinto(piece.data) < len(piece):
            raise ModelError(f"ended inside {header.name}", where=where, kind="E-MODEL-DAMAGED")
        left -= len(piece)
        yield piece


@cache
def _table(dtype: str) -> ndarray[Any, Any]:
    """Returns the number of every byte."""
    import numpy as np

    mantissa, bias, last = _FLOAT8[dtype]
    codes = np.arange(256)
    exponent, fraction = (codes & 0x7F) >> mantissa, codes & (2**mantissa - 1)
    normal = exponent > 0
    real = np.ldexp(fraction / 2**mantissa + normal, np.where(normal, exponent, 1) - bias)
    real = np.where(codes & 0x80, -real, real)
    if last == "one NaN":
        real[codes & 0x7F == 0x7F] = np.nan
    elif last == "as IEEE":
        top = exponent == exponent.max()
        real = np.where(top, np.where(fraction > 0, np.nan, np.copysign(np.inf, real)), real)
    else:
        real[0x80] = np.nan
    return real.astype(np.float32)
