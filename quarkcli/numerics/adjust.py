"""Moves codes and scales a little around a solver's choice, with gradients straight through the rounding.

A value is (code - zero) * scale. With an offset V and a factor m of the scale, the code is round(t + V * step), where
t is the source weight over the moved scale, held inside the rounding interval of the solver's code, and step the local
step of the element's grid. Scales are always legal ones: rounded to what the spec stores.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quarkcli.numerics import scales, signs
from quarkcli.numerics.chunks import by_group
from quarkcli.numerics.grid import Grid, QParams, effective_scale, grid, per_row
from quarkcli.numerics.quantize import Quantized, decode_grid, dequantize, encode_grid, round_to_grid
from quarkcli.spec import Element, PerTensor, TensorSpec

# How far into its rounding interval a source weight is held, as a share of half a step: a float32 quotient must not
# fall on the other side of a tie.
_INSIDE = 1.0 - 2.0**-10
_LEAST, _MOST = 0.5, 1.5  # factors of scales


def moves_codes(spec: TensorSpec) -> bool:
    """True when the codes of a spec lie on a grid with steps; a cast has none."""
    return spec.codes.format.kind != "cast"


def moves_scales(spec: TensorSpec) -> bool:
    """True when every group, row or tile has a stored scale of its own that can take another value.

    Scales per tensor are shared with the weights that servers fuse; shift bits and chains are made for their scales.
    """
    return (
        spec.then is None
        and spec.scale is not None
        and not spec.format.sub_block
        and not isinstance(spec.granularity, PerTensor)
    )


def has_float_scales(spec: TensorSpec) -> bool:
    """True when `moves_scales`, and a scale is stored as a plain float, so that it can take any value."""
    return moves_scales(spec) and signs.is_plain(spec)


class Adjustable:
    """One weight, with the codes and scales that it starts from.

    `offset` is float32 [out, in] within half a step, `factors` float32 [1, *scales], or [2, *scales] for the upper and
    the lower end of each range where there is a zero point; None: the scales stay. Zeros and ones are the start itself.
    """

    def __init__(self, weight: Tensor, start: Quantized, spec: TensorSpec) -> None:
        self.start = start
        self.spec = spec
        self.at = _real(grid(start.params, spec, start.codes.shape))
        self._place = self._anchored(weight.float())

    def offset(self) -> Tensor:
        return torch.zeros_like(self._place)

    def factors(self) -> Tensor | None:
        """Returns factors that change nothing; None where the spec's scales do not move."""
        stored = self.start.params.scale
        if stored is None or not moves_scales(self.spec):
            return None
        ends = 1 if self.start.params.zero_point is None else 2
        return torch.ones(ends, *stored.shape, device=stored.device)

    def quantized(self, offset: Tensor, factors: Tensor | None) -> Quantized:
        """Returns the codes and scales that offset and factors lead to."""
        params = self._params(factors)
        at = self.at if factors is None else _real(grid(params, self.spec, self.start.codes.shape))
        return Quantized(encode_grid(self._on_grid(offset, at), at.element), params)

    def values(self, offset: Tensor, factors: Tensor | None) -> Tensor:
        """Returns the real values (float32 [out, in]) of `quantized`, as a server decodes them."""
        return dequantize(self.quantized(offset, factors), self.spec)

    def gradients(self, offset: Tensor, factors: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients by offset and factors for the gradient by `values`, straight through every rounding."""
        with torch.enable_grad():
            leaf = offset.detach().requires_grad_()
            others = factors.detach().requires_grad_() if factors is not None else None
            at = self.at if others is None else self._smooth(others)
            placed = self._on_grid(leaf, at)
            code = placed + (round_to_grid(placed.detach(), at.element) - placed.detach())
            made = _scaled(code if at.zero is None else _less(code, at.zero, at.size), at.scale, at.size)
            found = torch.autograd.grad(made, [leaf] if others is None else [leaf, others], values)
        return found[0], found[1] if others is not None else None

    def rescaled(self, factors: Tensor) -> Quantized:
        """Returns the codes of the start under moved scales; zero points stay."""
        return Quantized(self.start.codes, self._params(factors[:1]))

    def scale_gradients(self, factors: Tensor, values: Tensor) -> Tensor:
        """Returns the gradient by the factors of `rescaled` for the gradient by its values."""
        with torch.enable_grad():
            leaf = factors.detach().requires_grad_()
            at = self._smooth(leaf[:1])
            code = decode_grid(self.start.codes, at.element)
            made = _scaled(code if at.zero is None else _less(code, at.zero, at.size), at.scale, at.size)
            return torch.autograd.grad(made, leaf, values)[0]

    # -- parts ------------------------------------------------------------------------------------------------------

    def _anchored(self, weight: Tensor) -> Tensor:
        """Returns where every weight lies between codes, less its zero point: inside the interval of its own code."""
        at, codes = self.at, self.start.codes
        centre = decode_grid(codes, at.element)
        step = step_of(centre, at.element)
        if at.element.kind == "float":  # a code of -0 is what a little below zero becomes
            centre = torch.where(centre == 0, torch.copysign(step * (1.0 - _INSIDE), centre), centre)
        home = centre if at.zero is None else _less(centre, at.zero, at.size)
        raw, divisors = by_group(weight, at.scale, at.size)
        away = (raw / divisors).view_as(weight) - home
        found = home
        for share in (0.5, 1.0):  # below a binade the step is half as long
            reach = step * (0.5 * share * _INSIDE)
            held = home + torch.minimum(torch.maximum(away, -reach), reach)
            found = torch.where(_same(encode_grid(self._shifted(held, at), at.element), codes), held, found)
        return found

    def _on_grid(self, offset: Tensor, at: Grid) -> Tensor:
        """Returns places between codes: the weight over the scales of `at`, with its zero point and offset.

        They are held where the outermost codes are the nearest, so that what lies beyond has no gradient by its offset.
        """
        place = self._shifted(self._place if at is self.at else self._moved(at), at)
        with torch.no_grad():
            step = step_of(place, at.element)
        low, high = at.element.minimum, at.element.maximum
        return torch.minimum(torch.maximum(place + offset * step, low - 0.5 * step), high + 0.5 * step)

    def _moved(self, at: Grid) -> Tensor:
        ratio = self.at.scale / at.scale
        return _scaled(self._place, ratio, at.size)

    def _shifted(self, place: Tensor, at: Grid) -> Tensor:
        return place if at.zero is None else _less(place, -at.zero, at.size)

    def _params(self, factors: Tensor | None) -> QParams:
        """Returns stored scales and zero points for factors."""
        start = self.start.params
        if factors is None or start.scale is None:
            return start
        share, shift = self._ranges(factors)
        moved = scales.decode_scale(start.scale, self._scale_dtype) * share
        if self._scale_dtype == "e8m0":  # factors move scales up as far as down, in the logarithm
            scale = scales.nearest_exponent(moved)
        else:
            scale = scales.nearest_stored(moved, self.spec, start.scale.dtype)
        zero = start.zero_point
        if zero is not None and shift is not None:
            moved = zero.float() + shift
            if not torch.is_floating_point(zero):
                moved = moved.round_().clamp_(self.spec.format.minimum, self.spec.format.maximum)
            zero = moved.to(zero.dtype)
        return replace(start, scale=scale, zero_point=zero)

    def _smooth(self, factors: Tensor) -> Grid:
        """Returns the grid of `_params(factors)`, whose scales and zero points have gradients by the factors."""
        start, shape = self.start.params, self.start.codes.shape
        assert start.scale is not None
        stored = self._params(factors.detach())
        share, shift = self._ranges(factors)
        true = effective_scale(stored, self.spec, shape)
        smooth = self.at.scale * per_row(share, self.spec, shape)
        scale = smooth + (true - smooth.detach())
        zero = self.at.zero
        if zero is not None and shift is not None and stored.zero_point is not None:
            now = per_row(stored.zero_point, self.spec, shape).float()
            soft = zero + per_row(shift, self.spec, shape)
            zero = soft + (now - soft.detach())
        return Grid(self.at.element, scale, self.at.size, zero)

    def _ranges(self, factors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the factor of each scale, and what is added to each zero point, for factors of the ranges' ends."""
        zero = self.start.params.zero_point
        if zero is None or len(factors) == 1:
            return factors[0], None
        high = self.spec.format.maximum - zero.float()
        low = self.spec.format.minimum - zero.float()
        share = (factors[0] * high - factors[1] * low) / (high - low)
        return share, low * (1.0 - factors[1] / share)

    @property
    def _scale_dtype(self) -> str:
        assert self.spec.scale is not None
        return self.spec.scale.dtype


def step_of(values: Tensor, element: Element) -> Tensor:
    """Returns the distance to the next code upwards in magnitude, for float32 values on a unit scale."""
    if element.kind == "integer":
        return torch.full_like(values, 2.0**-element.fraction)
    least = 2.0 ** (1 - element.bias)
    _, exponent = torch.frexp(values.abs().clamp(least, element.maximum))
    return torch.ldexp(torch.ones_like(values), exponent - 1 - element.mantissa)


def within(factors: Tensor) -> Tensor:
    """Holds factors of scales within their limits, in place."""
    return factors.clamp_(_LEAST, _MOST)


def _real(at: Grid) -> Grid:
    """Returns a grid whose zero points are float32: codes without a sign cannot be subtracted."""
    return at if at.zero is None else replace(at, zero=at.zero.float())


def _scaled(values: Tensor, scale: Tensor, size: int) -> Tensor:
    grouped, factors = by_group(values, scale, size)
    return (grouped * factors).view_as(values)


def _less(values: Tensor, zero: Tensor, size: int) -> Tensor:
    grouped, zeros = by_group(values, zero, size)
    return (grouped - zeros).view_as(values)


def _same(one: Tensor, other: Tensor) -> Tensor:
    bits = torch.uint8 if one.element_size() == 1 else one.dtype
    return one.view(bits) == other.view(bits)
