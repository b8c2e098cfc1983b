"""The conformance vectors in tests/data/vectors: loading and comparing.

`<field>.n_agree` counts the independent libraries that gave exactly this value; where it is 0 only the table-based
oracle that made the files says so.
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


@cache
def load(family: str) -> dict[str, NDArray]:
    with np.load(FOLDER / f"{family}.npz") as data:
        return dict(data)


def tensor(family: str, key: str) -> torch.Tensor:
    return torch.from_numpy(np.array(load(family)[key]))


def code_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Float8 or uint8 codes as uint8."""
    return codes.view(torch.uint8)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit equality of two float32 tensors, any NaN equal to any NaN."""
    nan = actual.isnan() & expected.isnan()
    return bool(((actual.view(torch.int32) == expected.view(torch.int32)) | nan).all())
