"""From a weight to a dialect's tensors and back where kernels run: codes stay packed, and the bytes are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from quarkcli import dialects
from quarkcli.job.pieces import weight_error
from quarkcli.job.served import decode
from quarkcli.numerics import packed, packing
from quarkcli.numerics import quantize as reference
from quarkcli.numerics.packed import Streamed
from quarkcli.plan.model import QuantizedTarget
from tests.plan import layouts

from .interpreter import Interpreter

CASES = [
    ("nvfp4_weight_only", "compressed-tensors"), ("nvfp4_weight_only", "modelopt"), ("mxfp4", "compressed-tensors"),
    ("int4_wo_32", "compressed-tensors"), ("ptpc_fp8", "compressed-tensors"), ("mxfp6_e2m3", "compressed-tensors"),
    ("int8_dynamic", "compressed-tensors"), ("uint4_wo_32", "compressed-tensors"),
]  # fmt: skip
Found = tuple[dict[str, torch.Tensor], torch.Tensor, float]


def target_of(scheme: str) -> QuantizedTarget:
    return next(layouts.plan(scheme).quantized())


def weight() -> torch.Tensor:
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()


def by_reference(scheme: str, dialect: str) -> Found:
    target = target_of(scheme)
    return _stored(dialect, target, reference.quantize(weight(), target.weight))


def by_kernels(scheme: str, dialect: str) -> Found:
    """Runs in the interpreter's process."""
    target = target_of(scheme)
    quantized = packed.quantize(weight(), target.weight)
    assert isinstance(quantized, Streamed), "no kernel answered"
    inside = [
        mock.patch.object(module, name, _small(getattr(module, name)))
        for module, names in ((packing, ("_stream", "_codes")), (packed, ("unpack_bits", "decode")))
        for name in names
    ]
    for patch in inside:
        patch.start()
    try:
        return _stored(dialect, target, quantized)
    finally:
        for patch in inside:
            patch.stop()


def _small(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, for zero points and the like alone: those of a matrix are to stay packed."""

    def call(tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert tensor.numel() < 128 * 128 // 2, "codes were unpacked"
        return real(tensor, *rest)

    return call


def _stored(dialect: str, target: QuantizedTarget, quantized: reference.Quantized) -> Found:
    writer = dialects.writer(dialect)
    tensors = writer.tensors(target, quantized, {})
    values = reference.dequantize(decode(writer, target, tensors).weight, target.weight, torch.bfloat16)
    return tensors, values.bfloat16(), weight_error(weight(), quantized, target)


@pytest.mark.parametrize(("scheme", "dialect"), CASES)
def test_no_codes_are_unpacked_on_the_way(interpreter: Interpreter, scheme: str, dialect: str) -> None:
    tensors, values, error = interpreter.call(by_kernels, scheme, dialect)
    wanted, expected, known = by_reference(scheme, dialect)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert torch.equal(values, expected)
    assert error == pytest.approx(known, rel=1e-6)
