"""Integer codes against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quarkcli.numerics.formats import integer
from quarkcli.numerics.quantize import decode_grid
from quarkcli.spec import ELEMENTS

NAMES = [name for name, element in ELEMENTS.items() if element.kind == "integer"]


@pytest.mark.parametrize("name", NAMES)
def test_codes_equal_numpy(name: str) -> None:
    element = ELEMENTS[name]
    rng = np.random.default_rng(3)
    half = np.arange(-300, 300) + 0.5
    x = np.concatenate([rng.standard_normal(5000) * 40, half, [0.0, -0.0, np.inf, -np.inf, 3e38]]).astype(np.float32)
    codes = torch.empty(x.shape, dtype=integer.code_dtype(element))
    integer.encode_(torch.from_numpy(x.copy()), element, codes)
    want = np.clip(np.rint(x.astype(np.float64)), element.minimum, element.maximum)
    assert np.array_equal(codes.numpy().astype(np.float64), want)
    assert np.array_equal(decode_grid(codes, element).numpy(), want.astype(np.float32))


def test_code_dtypes() -> None:
    assert integer.code_dtype(ELEMENTS["int4"]) == torch.int8
    assert integer.code_dtype(ELEMENTS["uint4"]) == torch.uint8
