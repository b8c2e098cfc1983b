"""Offsets and factors around a solver's codes: the start bit for bit, one step at most, gradients of every format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quarkcli.numerics import adjust
from quarkcli.numerics.adjust import Adjustable
from quarkcli.numerics.grid import QParams, grid
from quarkcli.numerics.quantize import Quantized, decode_grid, dequantize, encode_grid, quantize
from quarkcli.spec import Element, PerGroup, ScaleSpec, TensorSpec
from tests.numerics import specs

MOVING = {name: spec for name, spec in specs.ALL.items() if adjust.moves_codes(spec)}
SCALED = {name: spec for name, spec in MOVING.items() if adjust.moves_scales(spec)}


def weight(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 384, generator=generator) * torch.rand(20, 1, generator=generator).add(0.1)


def unit_codes(element: Element) -> Tensor:
    """Every value of an element on a unit scale, in order."""
    if element.kind == "integer":
        step = 2.0**-element.fraction
        return torch.arange(element.minimum / step, element.maximum / step + 1) * step
    bits = torch.arange(1 << element.bits, dtype=torch.uint8)
    dtype = encode_grid(torch.zeros(1), element).dtype
    values = decode_grid(bits.view(dtype) if dtype != torch.uint8 else bits, element)
    return values[values.isfinite() & (values.abs() <= element.maximum)].unique()


def places(codes: Tensor, element: Element) -> Tensor:
    """The position of every code among the element's values."""
    return torch.searchsorted(unit_codes(element), decode_grid(codes, element) + 0.0)


def shaken(start: Quantized, spec: TensorSpec, seed: int = 1) -> Quantized:
    """Codes as a solver may choose them: some are not the nearest, by one step or two."""
    element = grid(start.params, spec, start.codes.shape).element
    values = unit_codes(element)
    moves = torch.randint(-2, 3, start.codes.shape, generator=torch.Generator().manual_seed(seed))
    moved = values[(places(start.codes, element) + moves).clamp(0, len(values) - 1)]
    return Quantized(encode_grid(moved, element), start.params)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and torch.equal(bits(one), bits(other)))


def alike(one: QParams | None, other: QParams | None) -> bool:
    if one is None or other is None:
        return one is other
    names = ("scale", "global_scale", "zero_point", "shift")
    return all(same(getattr(one, n), getattr(other, n)) for n in names) and alike(one.then, other.then)


@pytest.mark.parametrize("name", MOVING)
def test_nothing_moved_is_the_start_bit_for_bit(name: str) -> None:
    spec = MOVING[name]
    for start in (quantize(weight(), spec), shaken(quantize(weight(), spec), spec)):
        moving = Adjustable(weight(), start, spec)
        made = moving.quantized(moving.offset(), moving.factors())
        assert same(made.codes, start.codes) and alike(made.params, start.params)
        assert torch.equal(moving.values(moving.offset(), moving.factors()), dequantize(start, spec))


@pytest.mark.parametrize("name", MOVING)
def test_half_a_step_moves_a_code_by_one_at_most(name: str) -> None:
    spec = MOVING[name]
    start = shaken(quantize(weight(), spec), spec)
    moving = Adjustable(weight(), start, spec)
    element = moving.at.element
    seen = 0
    for offset in (torch.rand(start.codes.shape) - 0.5, torch.full(start.codes.shape, 0.5)):
        for signed in (offset, -offset):
            made = moving.quantized(signed, None)
            apart = (places(made.codes, element) - places(start.codes, element)).abs()
            assert int(apart.max()) <= 1
            seen += int(apart.sum())
            assert alike(made.params, start.params)
    assert seen > 0


@pytest.mark.parametrize("name", SCALED)
def test_moved_scales_are_stored_ones(name: str) -> None:
    """The dtype, shape and sign of a scale stay, and what is stored is near the product it stands for."""
    spec = SCALED[name]
    start = quantize(weight(), spec)
    moving = Adjustable(weight(), start, spec)
    factors = moving.factors()
    assert factors is not None and start.params.scale is not None and spec.scale is not None
    factors[:] = 0.5 + 0.5 * torch.rand(factors.shape, generator=torch.Generator().manual_seed(2))
    made = moving.quantized(moving.offset(), factors)
    assert made.params.scale is not None
    assert made.params.scale.dtype == start.params.scale.dtype and made.params.scale.shape == start.params.scale.shape
    assert not same(made.params.scale, start.params.scale)
    again = Adjustable(weight(), made, spec)
    assert alike(again.quantized(again.offset(), again.factors()).params, made.params)
    if len(factors) == 1:
        coarse = {"e8m0": 2**0.5, "pow2": 2**0.5, "e4m3": 1.07, "e5m3": 1.07, "bf16": 1.005}
        reach = coarse.get(spec.scale.dtype, 1.001)
        real = grid(made.params, spec, made.codes.shape).scale / grid(start.params, spec, made.codes.shape).scale
        asked = adjust.per_row(factors[0], spec, made.codes.shape)
        assert bool(((real / asked).log2().abs() <= 1.0001 * torch.tensor(reach).log2()).all())


def test_signs_of_scales_stay() -> None:
    spec = TensorSpec("int4", PerGroup(32), ScaleSpec("bf16", "absmax"))
    start = quantize(weight(), spec)
    assert start.params.scale is not None
    start.params.scale[::2] *= -1
    start.codes[::2] = -start.codes[::2].clamp_min(-7)
    moving = Adjustable(weight(), start, spec)
    factors = torch.full((1, *start.params.scale.shape), 0.9)
    made = moving.quantized(moving.offset(), factors)
    assert made.params.scale is not None
    assert torch.equal(made.params.scale, (start.params.scale.float() * 0.9).bfloat16())


def expected(
    spec: TensorSpec, moving: Adjustable, offset: Tensor, factors: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """Gradients by hand, in float64: of s (c - z) by V and by m, with c = t + V step where the codes do not end."""
    at = moving.at
    made = moving.quantized(offset, factors)
    now = grid(made.params, spec, made.codes.shape)

    def spread(values: Tensor, size: int) -> Tensor:
        return values.double().repeat_interleave(size, 1)[:, : offset.shape[1]]

    scale, old = spread(now.scale, at.size), spread(at.scale, at.size)
    zero = spread(now.zero.float(), at.size) if now.zero is not None else torch.zeros(1).double()
    old_zero = spread(at.zero, at.size) if at.zero is not None else torch.zeros(1).double()
    place = moving._place.double() * old / scale
    step = adjust.step_of((place + zero).float(), at.element).double()
    free = place + zero + offset * step
    inside = (free >= at.element.minimum - 0.5 * step) & (free <= at.element.maximum + 0.5 * step)
    by_offset = grad * scale * step * inside
    if factors is None:
        return [by_offset]
    code = decode_grid(made.codes, at.element).double()
    by_scale = grad * ((code - zero) - torch.where(inside, place, 0.0))  # by the scale in use
    by_zero = grad * scale * torch.where(inside, 0.0, -1.0)  # the code follows the zero point where it is free
    if len(factors) == 1:
        return [by_offset, by_scale * old]
    high, low = at.element.maximum - old_zero, at.element.minimum - old_zero
    upper, lower = (spread(adjust.per_row(f, spec, offset.shape), at.size) for f in factors)
    share = (upper * high - lower * low) / (high - low)
    by_share = by_scale * old + by_zero * low * lower / share**2
    return [
        by_offset,
        by_share * high / (high - low),
        -by_share * low / (high - low) - by_zero * low / share,
    ]


@pytest.mark.parametrize("name", MOVING)
def test_gradients_go_straight_through_every_rounding(name: str) -> None:
    spec = MOVING[name]
    start = shaken(quantize(weight(), spec), spec)
    moving = Adjustable(weight(), start, spec)
    generator = torch.Generator().manual_seed(3)
    offset = torch.rand(start.codes.shape, generator=generator) - 0.5
    factors = moving.factors()
    if factors is not None:
        factors[:] = 0.8 + 0.4 * torch.rand(factors.shape, generator=generator)
    grad = torch.randn(start.codes.shape, generator=generator)
    by_offset, by_factors = moving.gradients(offset, factors, grad)
    wanted = expected(spec, moving, offset, factors, grad.double())
    torch.testing.assert_close(by_offset.double(), wanted[0], rtol=1e-4, atol=1e-5)
    if factors is None:
        assert by_factors is None
        return
    assert by_factors is not None
    for found, each in zip(by_factors, wanted[1:], strict=True):
        leaf = torch.zeros(found.shape, dtype=torch.float64, requires_grad=True)
        rows = adjust.per_row(leaf, spec, offset.shape).repeat_interleave(moving.at.size, 1)[:, : offset.shape[1]]
        (summed,) = torch.autograd.grad(rows, leaf, each)
        torch.testing.assert_close(found.double(), summed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SCALED)
def test_scales_alone(name: str) -> None:
    """With codes fixed, a value is linear in its scale."""
    spec = SCALED[name]
    start = quantize(weight(), spec)
    moving = Adjustable(weight(), start, spec)
    factors = moving.factors()
    assert factors is not None
    factors[0] = 1.1
    made = moving.rescaled(factors)
    assert same(made.codes, start.codes) and same(made.params.zero_point, start.params.zero_point)
    grad = torch.randn(start.codes.shape, generator=torch.Generator().manual_seed(4))
    found = moving.scale_gradients(factors, grad)
    leaf = torch.zeros(factors[0].shape, dtype=torch.float64, requires_grad=True)
    rows = adjust.per_row(leaf, spec, grad.shape).repeat_interleave(moving.at.size, 1)[:, : grad.shape[1]]
    (summed,) = torch.autograd.grad(rows, leaf, (grad * dequantize(start, spec)).double())
    torch.testing.assert_close(found[0].double(), summed, rtol=1e-3, atol=1e-4)


def test_steps_of_the_grid() -> None:
    for name in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "int4", "mxint8"):
        element = TensorSpec(name, PerGroup(32), specs.F32).format
        values = unit_codes(element)
        values = values[values >= 0]
        assert torch.equal(adjust.step_of(values[:-1], element), values.diff())
