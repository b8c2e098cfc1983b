"""Reads headers and tensors of safetensors files: names, shapes and places, bytes by offset.

Headers are parsed here by hand (format: https://github.com/huggingface/safetensors#format) because the library
hides the byte offsets and reads through torch or a memory map: plans need headers without torch, and a job needs
buffers that are freed after each part, where mapped pages would stay counted. torch is imported only to read tensors.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkcli.documents import text
from quarkcli.errors import AccessError, ModelError, QuarkError, ResourceError

if TYPE_CHECKING:
    import torch

_ROWS: tuple[tuple[int, dict[str, str]], ...] = (
    (1, {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"}),
    (1, {"F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}),
    (2, {"I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16"}),
    (4, {"I32": "int32", "U32": "uint32", "F32": "float32"}),
    (8, {"C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64"}),
)
# safetensors name -> (bytes per value, torch name), in the order of safetensors' own enum: files are laid out by
# it, last row first (see writer.file_size).
DTYPES = {name: (size, torch_name) for size, names in _ROWS for name, torch_name in names.items()}

HEADER_LIMIT = 100_000_000  # bytes, the library's own limit
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".th", ".t7")
OTHER_WEIGHTS = (".gguf", ".onnx", ".h5", ".msgpack")
_READ_CHUNK = 256 * 2**20
_DENIED = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}
AGAIN = "download the file again; it is damaged or incomplete"


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file.

    dtype        safetensors text, a key of DTYPES ("BF16")
    file         file name relative to the model directory
    start, end   absolute byte offsets in that file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_headers(path: Path, file: str) -> list[Header]:
    """Returns the headers of a safetensors file, in order, under the name `file`. Raises ModelError, AccessError."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = stream.read(header_length(stream.read(8), size, path))
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_headers(content, size, file, path)


def header_length(start: bytes, size: int, path: Path | str) -> int:
    """Returns the length of the header that follows the first 8 bytes of a file of `size` bytes. Raises ModelError."""
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(HEADER_LIMIT, size - 8):
        raise _bad(path, f"the header length {length} does not fit a file of {size} bytes")
    return length


def parse_headers(content: bytes, size: int, file: str, path: Path | str) -> list[Header]:
    """Returns the headers of a file of `size` bytes, in order. `path`: its place in messages. Raises ModelError."""
    try:
        table = text.parse(content, "header", unique=True)
    except ModelError as error:
        raise _bad(path, f"the header is not valid: {error.what}") from error
    if not isinstance(table, dict):
        raise _bad(path, "the header is not an object")
    table.pop("__metadata__", None)
    base = 8 + len(content)
    headers = [_header(path, file, name, entry, base) for name, entry in table.items()]
    headers.sort(key=lambda header: (header.start, header.end))
    _check_cover(path, headers, base, size)
    return headers


def _header(path: Path | str, file: str, name: str, entry: Any, base: int) -> Header:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _bad(path, f"the header entry of {name} has no valid shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = f"use one of the dtypes {', '.join(DTYPES)}"
        raise ModelError(f"{name} has the unknown dtype {dtype!r}", where=str(path), hint=known, kind="E-MODEL-DAMAGED")
    expected = math.prod(shape) * DTYPES[dtype][0]
    if offsets[1] - offsets[0] != expected:
        raise _bad(path, f"{name} has {offsets[1] - offsets[0]} bytes, but its shape and dtype need {expected}")
    return Header(name, dtype, tuple(shape), file, base + offsets[0], base + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path | str, headers: list[Header], base: int, size: int) -> None:
    """Raises ModelError unless tensors follow each other from the header to the file's end, as the format demands."""
    position = base
    for header in headers:
        if header.start != position:
            raise _bad(path, f"the bytes of {header.name} overlap another tensor or leave a hole")
        position = header.end
    if position != size:
        raise _bad(path, f"has {size} bytes, but its header says {position}")


def _bad(path: Path | str, what: str) -> ModelError:
    return ModelError(what, where=str(path), hint=AGAIN, kind="E-MODEL-DAMAGED")


def read_tensors(path: Path, headers: Sequence[Header]) -> dict[str, torch.Tensor]:
    """Returns tensors of one file, read by offset into own memory, front to back. Raises ModelError, AccessError."""
    try:
        with path.open("rb", buffering=0) as stream:
            ordered = sorted(headers, key=lambda header: header.start)
            return {header.name: _read_tensor(stream, path, header) for header in ordered}
    except OSError as error:
        raise unreadable(path, error) from error


def _read_tensor(stream: Any, path: Path, header: Header) -> torch.Tensor:
    import torch

    buffer = torch.empty(header.nbytes, dtype=torch.uint8)
    view: Any = memoryview(buffer.numpy())  # type: ignore[arg-type]  # arrays are buffers, numpy's stubs do not say so
    stream.seek(header.start)
    done = 0
    while done < header.nbytes:  # one read returns 2 GiB at most
        count = stream.readinto(view[done : done + _READ_CHUNK])
        if not count:
            raise ModelError(
                f"ended inside {header.name}: the file became shorter during reading",
                where=str(path),
                kind="E-MODEL-DAMAGED",
            )
        done += count
    return buffer.view(getattr(torch, DTYPES[header.dtype][1])).reshape(header.shape)


def unreadable(path: Path, error: OSError) -> QuarkError:
    """Returns an AccessError for a file that is missing or forbidden, which a user can mend; else a ResourceError."""
    what = f"cannot be read: {error.strerror or error}"
    if error.errno in _DENIED:
        return AccessError(what, where=str(path), kind="E-FILE-READ")
    return ResourceError(what, where=str(path), kind="E-SYSTEM")
