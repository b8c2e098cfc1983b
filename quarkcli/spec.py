"""TensorSpec: how one tensor is coded, and the tables of element and scale formats.

Standard library only, so that recipes, plans and dialect facts never import torch. Sources of the tables: OCP
Microscaling Formats (MX) v1.0 for fp4, fp6 and e8m0; the OFP8 specification for fp8; IEEE 754 for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Element:
    """One element format, a row of `ELEMENTS`.

    bits                storage bits of one code
    exponent, mantissa  field widths of a float; 0 for integers
    bias                exponent bias of a float; 0 for integers
    minimum, maximum    smallest and largest finite value; for integers the code range itself
    """

    name: str
    kind: Literal["integer", "float"]
    bits: int
    minimum: float
    maximum: float
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest binade (OCP MX `emax`): 2 for e2m1 since 6 = 1.5 * 2^2."""
        return math.frexp(self.maximum)[1] - 1


def _integer(bits: int, signed: bool) -> Element:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return Element(f"{'' if signed else 'u'}int{bits}", "integer", bits, low, high)


def _float(name: str, exponent: int, mantissa: int, bias: int, maximum: float) -> Element:
    return Element(name, "float", 1 + exponent + mantissa, -maximum, maximum, exponent, mantissa, bias)


ELEMENTS: dict[str, Element] = {
    row.name: row
    for row in (
        _integer(2, True),
        _integer(3, True),
        _integer(4, True),
        _integer(8, True),
        _integer(4, False),
        _integer(8, False),
        _float("fp4_e2m1", 2, 1, 1, 6.0),
        _float("fp6_e2m3", 2, 3, 1, 7.5),
        _float("fp6_e3m2", 3, 2, 3, 28.0),
        _float("fp8_e4m3", 4, 3, 7, 448.0),
        _float("fp8_e5m2", 5, 2, 15, 57344.0),
    )
}


@dataclass(frozen=True)
class ScaleFormat:
    """One scale format, a row of `SCALE_FORMATS`: stored bits and largest value (None: a plain float)."""

    name: str
    bits: int
    maximum: float | None = None


# `model` is the dtype of the source tensor: 16 bits for every model we write.
SCALE_FORMATS: dict[str, ScaleFormat] = {
    row.name: row
    for row in (
        ScaleFormat("f32", 32),
        ScaleFormat("f16", 16),
        ScaleFormat("bf16", 16),
        ScaleFormat("model", 16),
        ScaleFormat("e8m0", 8, 2.0**127),
        ScaleFormat("e4m3", 8, 448.0),
    )
}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`; for a weight [out, in] axis 0 is the output row."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale per run of `size` elements along the last (input) axis."""

    size: int


@dataclass(frozen=True)
class PerTile:
    """One scale per patch of `rows` x `cols` of a weight [out, in]."""

    rows: int
    cols: int


@dataclass(frozen=True)
class PerToken:
    """One scale per row of an activation [..., features]."""


Granularity = PerTensor | PerChannel | PerGroup | PerTile | PerToken
Rule = Literal["half_range", "absmax", "even", "floor", "ceil", "rceil"]
When = Literal["static", "dynamic"]


@dataclass(frozen=True)
class ScaleSpec:
    """How a scale is computed and stored.

    dtype         key of SCALE_FORMATS
    rule          amax -> scale: `half_range` amax/((qmax-qmin)/2), `absmax` amax/qmax, and for e8m0 the four
                  exponent rules of the MX formats
    when          static: fixed before the model runs, stored; dynamic: computed from each activation, not stored
    over          the global scale under a two-level scale (nvfp4: e4m3 over a static f32), else None
    constant_amax the amax to use instead of a measured one
    """

    dtype: str
    rule: Rule = "absmax"
    when: When = "static"
    over: ScaleSpec | None = None
    constant_amax: float | None = None


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized: real value = code * scale (* global scale)."""

    element: str
    granularity: Granularity
    scale: ScaleSpec

    @property
    def format(self) -> Element:
        return ELEMENTS[self.element]

    @property
    def group_size(self) -> int | None:
        """Elements per scale along the last axis, or None when a scale spans the row or more."""
        match self.granularity:
            case PerGroup(size):
                return size
            case PerTile(_, cols):
                return cols
        return None

    @property
    def needs_amax(self) -> bool:
        """True when an activation with this spec needs a measured amax before it can be quantized."""
        outer = self.scale.over or self.scale
        return outer.when == "static" and outer.constant_amax is None

    @property
    def has_tensor_scale(self) -> bool:
        """True when one stored scale covers the whole tensor, so fused linears must agree on it."""
        return self.scale.over is not None or isinstance(self.granularity, PerTensor)

    def bits_per_value(self, rows: int, cols: int) -> float:
        """Stored bits per value of a [rows, cols] weight, scales included."""
        scale_bits = SCALE_FORMATS[self.scale.dtype].bits
        count: float
        match self.granularity:
            case PerTensor():
                count = 1
            case PerChannel():
                count = rows
            case PerGroup(size):
                count = rows * cols / size
            case PerTile(tile_rows, tile_cols):
                count = -(-rows // tile_rows) * -(-cols // tile_cols)
            case PerToken():
                count = 0
        extra = SCALE_FORMATS[self.scale.over.dtype].bits if self.scale.over else 0
        return self.format.bits + (count * scale_bits + extra) / (rows * cols)

    def describe(self) -> str:
        """Short text for tables: `fp4_e2m1 group 16, e4m3 over f32`."""
        match self.granularity:
            case PerTensor():
                where = "tensor"
            case PerChannel(axis):
                where = f"channel {axis}"
            case PerGroup(size):
                where = f"group {size}"
            case PerTile(rows, cols):
                where = f"tile {rows}x{cols}"
            case PerToken():
                where = "token"
        scale = self.scale.dtype + (f" over {self.scale.over.dtype}" if self.scale.over else "")
        when = "" if self.scale.when == "static" else " dynamic"
        return f"{self.element} {where}, {scale}{when}, {self.scale.rule}"


def granularity_to_yaml(granularity: Granularity) -> str | dict[str, Any]:
    """The YAML form of a granularity: `tensor`, `token`, `{channel: 0}`, `{group: 16}`, `{tile: [128, 128]}`."""
    match granularity:
        case PerTensor():
            return "tensor"
        case PerToken():
            return "token"
        case PerChannel(axis):
            return {"channel": axis}
        case PerGroup(size):
            return {"group": size}
        case PerTile(rows, cols):
            return {"tile": [rows, cols]}


def scale_to_yaml(scale: ScaleSpec) -> dict[str, Any]:
    out: dict[str, Any] = {"dtype": scale.dtype, "rule": scale.rule, "when": scale.when}
    if scale.over:
        out["over"] = scale_to_yaml(scale.over)
    if scale.constant_amax is not None:
        out["constant_amax"] = scale.constant_amax
    return out


def spec_to_yaml(spec: TensorSpec) -> dict[str, Any]:
    """The native `cfg` that resolves to `spec` again."""
    return {
        "element": spec.element,
        "granularity": granularity_to_yaml(spec.granularity),
        "scale": scale_to_yaml(spec.scale),
    }
