"""Triton kernels compute `numerics.packed` and `quantize.fake_quantize` in one pass, with the bits of the reference.

Triton is imported only when a kernel is going to run. Kernels run on a CUDA device, and on a CPU under Triton's
interpreter (`TRITON_INTERPRET=1` before Triton is first imported), which is how they are tested without one.

Division is IEEE division, multiplication and addition are not contracted, exponents come from bit fields. What may
differ from the reference: values of groups whose scale is a float32 subnormal, where the device or an older Triton
(before 3.6, whose division flushes) takes subnormals for zero; and activations in a group that holds a NaN, where only
the NaN itself is sure.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

from quarkcli.spec import TensorSpec

SWITCH = "QUARK_KERNELS"
_BITS = (4, 6, 8)


def find(spec: TensorSpec, device: torch.device) -> ModuleType | None:
    """Returns the module with the kernels for `spec` on `device`, or None: then the reference does it.

    The module has `quantize_packed`, `dequantize_packed` and `fake_quantize`, see `launch`. `QUARK_KERNELS=off` turns
    kernels off.
    """
    if os.environ.get(SWITCH) == "off" or not _runs_on(device) or not knows(spec):
        return None
    return _launchers()


def knows(spec: TensorSpec) -> bool:
    """True for one stage of 4, 6 or 8-bit floats, or integers of 4 or 8 bits, rounded to the even code."""
    element = spec.format
    if spec.then is not None or spec.scale is None or element.bits not in _BITS or spec.rounding != "half_even":
        return False
    if element.kind == "float":
        return spec.symmetric
    whole = element.kind == "integer" and not element.fraction and not element.sub_block
    return whole and (spec.zero_point == "int" or (spec.symmetric and element.minimum < 0))


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _launchers() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("quarkcli.numerics.kernels.launch")
