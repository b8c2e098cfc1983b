"""The conformance vectors in tests/data/vectors: loading and comparing.

`<field>.n_agree` counts the independent libraries that gave exactly this value; where it is 0 only the table-based
oracle that made the files says so. A field is `<case>.<name>`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

FOLDER = Path(__file__).parent.parent / "data" / "vectors"
ELEMENTS = {
    "e4m3fn": "fp8_e4m3",
    "e5m2": "fp8_e5m2",
    "e3m2": "fp6_e3m2",
    "e2m3": "fp6_e2m3",
    "e2m1": "fp4_e2m1",
}
_NAMES = ("scale", "scale1", "scale2", "zp", "sub", "codes", "codes8", "packed", "dq")


@cache
def load(family: str) -> dict[str, NDArray]:
    with np.load(FOLDER / f"{family}.npz") as data:
        return dict(data)


def tensor(family: str, key: str) -> torch.Tensor:
    return torch.from_numpy(np.array(load(family)[key]))


def cases(family: str) -> dict[str, set[str]]:
    """Case -> names of its fields, of everything in the file but its inputs and its counts."""
    found: dict[str, set[str]] = {}
    for key in load(family):
        case, _, name = key.rpartition(".")
        if key.startswith("table."):
            found[key] = {""}
        elif name in _NAMES and not key.startswith("x."):
            found.setdefault(case, set()).add(name)
        else:
            assert key == "x" or key.startswith("x.") or name in ("n_agree", "n_src"), key
    return found


def expected(family: str, case: str, name: str) -> torch.Tensor:
    return tensor(family, f"{case}.{name}" if name else case)


def agreement(family: str, case: str, name: str) -> torch.Tensor:
    """How many libraries gave each value."""
    return tensor(family, f"{case}.{name}.n_agree")


def code_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Float8 or uint8 codes as uint8."""
    return codes.view(torch.uint8)


def differences(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where two tensors of the same size differ: floats by bits, any NaN equal to any NaN; integers by value."""
    actual = actual.reshape(expected.shape)
    if not expected.is_floating_point():
        return actual.int() != expected.int()
    nan = actual.isnan() & expected.isnan()
    return (actual.contiguous().view(torch.int32) != expected.view(torch.int32)) & ~nan


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit equality of two float32 tensors, any NaN equal to any NaN."""
    return not bool(differences(actual, expected).any())
