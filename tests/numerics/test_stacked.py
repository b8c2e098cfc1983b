"""Weights that are quantized above each other have the bits of each alone."""

from __future__ import annotations

import pytest
import torch

from quarkcli.errors import DataError
from quarkcli.numerics import stacked
from quarkcli.numerics.quantize import Quantized, dequantize, quantize, tensor_amax
from quarkcli.numerics.ranges import known_range
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

F32 = ScaleSpec("f32")
CPU = torch.device("cpu")
SPECS = {
    "nvfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32)),
    "mxfp4": TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even")),
    "mxfp6": TensorSpec("fp6_e3m2", PerGroup(32), ScaleSpec("e8m0", "even")),
    "mxfp8": TensorSpec("fp8_e4m3", PerGroup(32), ScaleSpec("e8m0", "rceil")),
    "int4": TensorSpec("int4", PerGroup(32), ScaleSpec("model", "half_range")),
    "uint4": TensorSpec("uint4", PerGroup(32), ScaleSpec("f32", "half_range"), zero_point="int"),
    "int3 by channel": TensorSpec("int3", PerChannel(0), F32),
    "fp8 by channel": TensorSpec("fp8_e4m3", PerChannel(0), F32),
}


def weights() -> list[torch.Tensor]:
    """Weights of one shape, of unlike sizes; one is all zero."""
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randn(6, 96, generator=generator) * 10.0**power).bfloat16() for power in (-3, 0, 2)]
    return [*made, torch.zeros(6, 96, dtype=torch.bfloat16)]


def same(one: Quantized, other: Quantized) -> bool:
    def bits(tensor: torch.Tensor | None) -> object:
        return None if tensor is None else (tensor.shape, tensor.dtype, tensor.contiguous().view(torch.uint8).tolist())

    def of(it: Quantized) -> list[object]:
        outer = None if it.params.global_scale is None else it.params.global_scale.item()
        return [bits(it.codes), bits(it.params.scale), outer, bits(it.params.zero_point)]

    return of(one) == of(other)


@pytest.mark.parametrize("given", ["own", "amax", "known"])
@pytest.mark.parametrize("name", SPECS)
def test_a_stack_has_the_bits_of_each_weight(name: str, given: str) -> None:
    spec, every = SPECS[name], weights()
    assert stacked.takes(spec, CPU)
    amax = [tensor_amax(weight) * 2 if given == "amax" and spec.is_two_level else None for weight in every]
    known = [known_range(weight, spec) if given == "known" else None for weight in every]
    found = stacked.quantize(every, spec, amax, known)
    alone = [quantize(weight, spec, amax=own) for weight, own in zip(every, amax, strict=True)]
    assert all(same(one, other) for one, other in zip(found, alone, strict=True))
    decoded = stacked.dequantized(found, spec).split(6)
    assert all(torch.equal(one, dequantize(other, spec)) for one, other in zip(decoded, alone, strict=True))


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if stacked.has_ranges(spec, CPU)])
def test_the_ranges_of_a_stack_are_those_of_each_weight(name: str) -> None:
    for weight, found in zip(weights(), stacked.known_ranges(weights(), SPECS[name]), strict=True):
        alone = known_range(weight, SPECS[name])
        assert alone is not None and torch.equal(found, alone)


def test_what_rows_share_is_not_stacked() -> None:
    assert not stacked.takes(TensorSpec("fp8_e4m3", PerTensor(), F32), CPU)
    assert not stacked.takes(TensorSpec("fp8_e4m3", PerTile(128, 128), F32), CPU)
    assert not stacked.takes(TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "sweep", global_scale=F32)), CPU)


def test_a_kernel_gets_weights_with_a_global_scale_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarkcli.numerics.kernels.find", lambda spec, device: object())
    assert not stacked.takes(SPECS["nvfp4"], CPU)
    assert stacked.takes(SPECS["mxfp4"], CPU)


def test_not_a_number_in_a_stack_is_refused() -> None:
    every = weights()
    every[2][3, 5] = torch.nan
    with pytest.raises(DataError):
        stacked.quantize(every, SPECS["mxfp4"], [None] * 4, [None] * 4)


def test_a_stack_holds_few_large_weights_and_many_small_ones() -> None:
    assert stacked.at_once((4096, 4096)) == 1
    assert stacked.at_once((128, 1024)) == 16
    assert stacked.at_once((0, 1024)) == 1
