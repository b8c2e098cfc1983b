"""A second process in which the kernels run under Triton's interpreter.

Triton decides when it is imported whether it interprets, and for good; so it is never imported in the process that runs
the tests.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from quarkcli.numerics import kernels, packed, quantize
from quarkcli.spec import TensorSpec


class Interpreter:
    """Calls of functions in that process. What goes over is bytes, so that torch shares no memory."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start)

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return _value(self._pool.submit(_run, _bytes((function, arguments, named))).result())

    def close(self) -> None:
        self._pool.shutdown()


def _start() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # overflow and NaN are part of the inputs


def _run(call: bytes) -> bytes:
    function, arguments, named = _value(call)
    return _bytes(function(*arguments, **named))


def _bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)  # pickle alone loses float8
    return file.getvalue()


def _value(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


# What is called there. Each fails where no kernel would answer.


def quantize_packed(weight: torch.Tensor, spec: TensorSpec, amax: torch.Tensor | None = None) -> packed.Packed:
    _require_kernel(spec)
    return packed.quantize_packed(weight, spec, amax=amax)


def dequantize_packed(
    data: packed.Packed, spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    _require_kernel(spec)
    return packed.dequantize_packed(data, spec, shape, dtype)


def fake_quantize(x: torch.Tensor, spec: TensorSpec, static: torch.Tensor | None = None) -> torch.Tensor:
    _require_kernel(spec)
    return quantize.fake_quantize(x, spec, static)


def launches(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Names of the kernels that a call starts."""
    from quarkcli.numerics.kernels import launch

    seen: list[str] = []
    real = launch._launch

    def spy(kernel: Any, *rest: Any, **constants: Any) -> None:
        seen.append(kernel.fn.__name__)
        real(kernel, *rest, **constants)

    launch._launch = spy
    try:
        function(*arguments)
    finally:
        launch._launch = real
    return seen


def found(spec: TensorSpec, switch: str | None = None) -> str | None:
    """The name of the module that `find` gives for a CPU, with QUARK_KERNELS set to `switch`."""
    before = os.environ.pop(kernels.SWITCH, None)
    if switch is not None:
        os.environ[kernels.SWITCH] = switch
    try:
        module = kernels.find(spec, torch.device("cpu"))
        return None if module is None else module.__name__
    finally:
        os.environ.pop(kernels.SWITCH, None)
        if before is not None:
            os.environ[kernels.SWITCH] = before


def _require_kernel(spec: TensorSpec) -> None:
    assert kernels.find(spec, torch.device("cpu")) is not None
