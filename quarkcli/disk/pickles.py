"""Reads headers and tensors of `pytorch_model.bin` files, which are pickles. torch reads only tensors from them.

`weights_only` makes torch refuse whatever else a pickle asks for, and nothing here ever loads one without it. Files
since torch 1.6 are mapped, so that only the tensors asked for are read; older ones are read whole, the last is kept.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from quarkcli.disk.headers import AGAIN, DTYPES, Header, unreadable
from quarkcli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FLAG = "--allow-pickle"
UNUSED = f"{FLAG} is not used: the model has safetensors files"
SINGLE = "pytorch_model.bin"
INDEX = f"{SINGLE}.index.json"
READ = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")  # names of files with a model's weights
_GLOBAL = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)|GLOBAL ([\w.]+)")
_MAKER = "ask its author for .safetensors files, and do not load it in another way"


def read_headers(path: Path, file: str) -> list[Header]:
    """Returns the headers of a file, in order, under the name `file`. Raises ModelError, AccessError.

    Places are those that the tensors would have one behind the other.
    """
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
    headers: list[Header] = []
    place = 0
    for name, tensor in _tensors(path).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in names or str(tensor.layout) != "torch.strided":
            raise ModelError(
                f"quark cannot read {name}, which is of {dtype}, {tensor.layout}", where=str(path), kind="E-MODEL-DTYPE"
            )
        end = place + tensor.numel() * tensor.element_size()
        headers.append(Header(name, names[dtype], tuple(tensor.shape), file, place, end))
        place = end
    return headers


def read_tensors(path: Path, headers: Sequence[Header]) -> dict[str, Tensor]:
    """Returns tensors of one file in memory of their own. Raises ModelError, AccessError."""
    import torch

    found = _tensors(path)
    return {header.name: found[header.name].detach().clone(memory_format=torch.contiguous_format) for header in headers}


def is_read_whole(path: Path) -> bool:
    """True for a file from before torch 1.6, which cannot be mapped."""
    return not zipfile.is_zipfile(path)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        status = path.stat()
        whole = is_read_whole(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return _whole(path, status.st_size, status.st_mtime_ns) if whole else _loaded(path, mapped=True)


@lru_cache(maxsize=1)
def _whole(path: Path, size: int, time: int) -> dict[str, Tensor]:
    return _loaded(path, mapped=False)


def _loaded(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    """Returns the tensors of a file, mapped or in memory. Raises ModelError for one that holds anything else."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(str(path), map_location="cpu", mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch's readers raise whatever a damaged file leads to
        raise _refusal(path, error) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"holds a {type(found).__name__}, not tensors by name", where=str(path), kind="E-MODEL-PICKLE")
    strange = next((name for name, value in found.items() if not isinstance(value, torch.Tensor)), None)
    if strange is not None:
        what = f"holds more than weights: {strange} is a {type(found[strange]).__name__}, not a tensor"
        raise ModelError(what, where=str(path), hint="save only the state dict of the model", kind="E-MODEL-PICKLE")
    return found


def _refusal(path: Path, error: Exception) -> ModelError:
    """Returns the plain message of a file that torch does not read."""
    message = " ".join(str(error).split())
    if "TorchScript" in message:
        what = "is a TorchScript program, which could run code; it was not loaded"
        return ModelError(what, where=str(path), hint=_MAKER, kind="E-MODEL-PICKLE")
    if "weights only load failed" in message.lower() or "unsupported" in message.lower():
        asks = _GLOBAL.search(message)
        what = f"asks for {asks[1] or asks[2]}, which could run code" if asks else "holds more than tensors"
        return ModelError(f"{what}; it was not loaded", where=str(path), hint=_MAKER, kind="E-MODEL-PICKLE")
    return ModelError(
        f"torch cannot read it: {type(error).__name__}: {message[:200]}",
        where=str(path),
        hint=AGAIN,
        kind="E-MODEL-DAMAGED",
    )
