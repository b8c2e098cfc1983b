"""Defines TensorSpec, the coding of one tensor, and the tables of element and scale formats.

Standard library only, so that recipes, plans and dialect facts never import torch. Sources of the tables: OCP
Microscaling Formats (MX) v1.0 for fp4, fp6, mxint8 and e8m0; the OFP8 specification for fp8; "With Shared
Microexponents, A Little Shifting Goes a Long Way" (arXiv 2302.08007) for mx6 and mx9; AMD Quark for e5m3 and bfp16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

Rounding = Literal["half_even", "floor", "round"]


@dataclass(frozen=True)
class Element:
    """One element format, a row of `ELEMENTS`.

    kind                integer: value = code * 2^-fraction; float: sign, exponent, mantissa; cast: a 16-bit float of
                        torch's, which takes no scale
    bits                storage bits of one code
    exponent, mantissa  field widths of a float; 0 for integers
    bias                exponent bias of a float; 0 for integers
    minimum, maximum    smallest and largest finite value, on a unit scale
    fraction            bits behind the point of an integer; those of the shared-exponent formats have some
    sub_block           neighbours that share one shift bit below their group's exponent; 0: no such bits
    rounding            rounding of a value between two codes, see TensorSpec
    """

    name: str
    kind: Literal["integer", "float", "cast"]
    bits: int
    minimum: float
    maximum: float
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    fraction: int = 0
    sub_block: int = 0
    rounding: Rounding = "half_even"

    @property
    def max_exponent(self) -> int:
        """Returns the exponent of the largest binade (OCP MX `emax`): 2 for e2m1 since 6 = 1.5 * 2^2."""
        return math.frexp(self.maximum)[1] - 1


def _integer(bits: int, signed: bool) -> Element:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return Element(f"{'' if signed else 'u'}int{bits}", "integer", bits, low, high)


def _fixed(name: str, bits: int, low: int, high: int, sub_block: int = 0) -> Element:
    """Returns signed codes low..high with one bit before the point: below 2 on a power-of-two scale."""
    step = 2.0 ** (2 - bits)
    return Element(name, "integer", bits, low * step, high * step, fraction=bits - 2, sub_block=sub_block)


def _float(name: str, exponent: int, mantissa: int, bias: int, maximum: float) -> Element:
    return Element(name, "float", 1 + exponent + mantissa, -maximum, maximum, exponent, mantissa, bias)


def _cast(name: str, exponent: int, mantissa: int, maximum: float) -> Element:
    return Element(name, "cast", 16, -maximum, maximum, exponent, mantissa, (1 << (exponent - 1)) - 1)


# The largest numbers of formats that are numbers of blocks and scales alike, or scales alone.
E4M3_MAX, E5M3_MAX = 448.0, 114688.0

ELEMENTS: dict[str, Element] = {
    row.name: row
    for row in (
        *(_integer(bits, True) for bits in (2, 3, 4, 8)),
        *(_integer(bits, False) for bits in (2, 3, 4, 8)),
        _float("fp4_e2m1", 2, 1, 1, 6.0),
        _float("fp6_e2m3", 2, 3, 1, 7.5),
        _float("fp6_e3m2", 3, 2, 3, 28.0),
        _float("fp8_e4m3", 4, 3, 7, E4M3_MAX),
        _float("fp8_e5m2", 5, 2, 15, 57344.0),
        _fixed("mxint8", 8, -127, 127),
        _fixed("mx6", 5, -15, 15, sub_block=2),
        _fixed("mx9", 8, -127, 127, sub_block=2),
        _fixed("bfp16", 8, -128, 127),
        _cast("fp16", 5, 10, 65504.0),
        _cast("bf16", 8, 7, 2.0**127 * (2 - 2.0**-7)),
    )
}


@dataclass(frozen=True)
class ScaleFormat:
    """One scale format, a row of `SCALE_FORMATS`: stored bits and largest value (None: a plain float)."""

    name: str
    bits: int
    maximum: float | None = None


# `model` is the dtype of the source tensor: 16 bits for every model we write. `pow2` is a plain scale rounded to the
# power of two nearest in the logarithm, stored as float32.
SCALE_FORMATS: dict[str, ScaleFormat] = {
    row.name: row
    for row in (
        ScaleFormat("f32", 32),
        ScaleFormat("f16", 16),
        ScaleFormat("bf16", 16),
        ScaleFormat("model", 16),
        ScaleFormat("pow2", 32),
        ScaleFormat("e8m0", 8, 2.0**127),
        ScaleFormat("e4m3", 8, E4M3_MAX),
        ScaleFormat("e5m3", 8, E5M3_MAX),
    )
}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`: for a weight [out, in] 0 is the output row, 1 the input column."""

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
ExponentRule = Literal["even", "floor", "ceil", "rceil", "fit"]
Rule = Literal["half_range", "absmax", "sweep", "four_over_six"] | ExponentRule
RULES = ("half_range", "absmax", "sweep", "four_over_six", "even", "floor", "ceil", "rceil", "fit")
SEARCH_RULES = ("sweep", "four_over_six")
EXPONENT_RULES = ("even", "floor", "ceil", "rceil", "fit")
When = Literal["static", "dynamic"]
ZeroPoint = Literal["none", "int", "float"]


@dataclass(frozen=True)
class ScaleSpec:
    """The computation and the storage of a scale.

    dtype         key of SCALE_FORMATS
    rule          range -> scale. `half_range` amax / ((qmax - qmin) / 2); `absmax` amax / qmax; for e8m0 the
                  exponent rules `even`, `floor`, `ceil`, `rceil` of the MX formats and `fit`, the smallest exponent
                  with which no code saturates; for e4m3 under a global scale also `sweep`, the one of its 126 codes
                  with the least error, and `four_over_six`, the better of mapping amax to 6 and to 4
    when          static: fixed before the model runs, stored; dynamic: computed from each activation, not stored
    global_scale  the global scale under a two-level scale (nvfp4: e4m3 over a static f32), else None
    minimum       the scale is at least this (Quark's `min_kv_scale`), or None
    constant_amax the amax to use instead of a measured one
    """

    dtype: str
    rule: Rule = "absmax"
    when: When = "static"
    global_scale: ScaleSpec | None = None
    minimum: float | None = None
    constant_amax: float | None = None

    @property
    def outermost(self) -> ScaleSpec:
        """Returns the scale that is fixed first: the global one when there is one."""
        return self.global_scale or self


@dataclass(frozen=True)
class ObserverSpec:
    """The way to find the range behind a static scale: a name of `OBSERVERS` and its parameter values, in order."""

    name: str = "min_max"
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def statistic(self) -> str:
        """Returns the kind of statistics that calibration keeps for it.

        `absmax`, a `histogram` of magnitudes, or one of the largest magnitudes in `blocks` of 16.
        """
        return {"min_max": "absmax", "headroom": "blocks"}.get(self.name, "histogram")


# Observer -> its parameters with their defaults. percentile: the range that holds so many per cent of the values;
# mse: of `steps` ranges from the full one down to `shrink` of it the one of least squared error; histogram: the same
# over all ranges, however small; headroom: of the largest magnitudes of nvfp4's blocks, `rho` times the one that
# `anchor` per cent do not exceed, and at least the one that `upper` per cent do not exceed (ModelOpt's
# nvfp4_act_headroom).
OBSERVERS: dict[str, dict[str, float]] = {
    "min_max": {},
    "percentile": {"percentile": 99.99},
    "histogram": {},
    "mse": {"steps": 40, "shrink": 0.4},
    "headroom": {"anchor": 1.0, "upper": 99.99, "rho": 16384.0},
}
MOST_RANGES = 1000  # ranges that a search may try
MIN_MAX = ObserverSpec()
# The largest e4m3 number over the smallest normal one: block scales further apart do not fit under one global scale.
E4M3_SPAN = 28672


@dataclass(frozen=True)
class TensorSpec:
    """The quantization of one tensor: real value = (code - zero point) * scale (* global scale).

    scale       None only for an element of kind `cast`
    zero_point  none: symmetric; int: codes are shifted by a whole number (asymmetric); float: by a real one
    rounding    half_even: nearest, ties to the even code; round: ties away from zero; floor: towards minus infinity
    narrow      signed integers leave their lowest code out, so that the range is symmetric
    observer    the way to find the range behind the scale
    then        a second quantization of the values that the first one gives (its chain)
    stored      the one of the two whose codes are on disk
    """

    element: str
    granularity: Granularity
    scale: ScaleSpec | None
    zero_point: ZeroPoint = "none"
    rounding: Rounding = "half_even"
    narrow: bool = False
    observer: ObserverSpec = MIN_MAX
    then: TensorSpec | None = None
    stored: Literal["first", "last"] = "first"

    @property
    def format(self) -> Element:
        """Returns the element with this spec's rounding and range."""
        return _format(self.element, self.rounding, self.narrow)

    @property
    def stages(self) -> tuple[TensorSpec, ...]:
        """Returns this spec and those chained to it, in order."""
        return (self, *(self.then.stages if self.then else ()))

    @property
    def codes(self) -> TensorSpec:
        """Returns the stage whose codes are on disk."""
        return self.then if self.then is not None and self.stored == "last" else self

    @property
    def symmetric(self) -> bool:
        return self.zero_point == "none"

    @property
    def group_size(self) -> int | None:
        """Returns the elements per stored scale along the last axis, or None when a scale spans the row or more."""
        match self.granularity:
            case PerGroup(size):
                return size
            case PerTile(_, cols):
                return cols
        return None

    @property
    def group_sizes(self) -> set[int]:
        """Returns the divisors that the last axis must have: the groups of every stage."""
        return {stage.granularity.size for stage in self.stages if isinstance(stage.granularity, PerGroup)}

    @property
    def is_static(self) -> bool:
        """True when an activation with this spec has a scale that is fixed before the model runs."""
        return any(stage.scale is not None and stage.scale.outermost.when == "static" for stage in self.stages)

    @property
    def needs_amax(self) -> bool:
        """True when an activation with this spec needs a measured range before it can be quantized."""
        outer = [stage.scale.outermost for stage in self.stages if stage.scale is not None]
        return any(scale.when == "static" and scale.constant_amax is None for scale in outer)

    @property
    def is_two_level(self) -> bool:
        """True when the scales of this stage's blocks lie under one of the whole tensor."""
        return self.scale is not None and self.scale.global_scale is not None

    @property
    def has_global_scale(self) -> bool:
        """True when a stage is of two levels: of fused linears, servers take one scale of the tensor for all."""
        return any(stage.is_two_level for stage in self.stages)

    @property
    def has_tensor_scale(self) -> bool:
        """True when one stored scale covers the whole tensor, so fused linears must agree on it."""
        scaled = [stage for stage in self.stages if stage.scale is not None]
        return any(stage.is_two_level or isinstance(stage.granularity, PerTensor) for stage in scaled)

    @property
    def has_own_scales(self) -> bool:
        """True when every group or row has a stored scale that can be changed for its own sake."""
        plain = self.then is None and not self.format.sub_block and self.scale is not None
        return plain and (isinstance(self.granularity, PerGroup) or self.granularity == PerChannel(0))

    @property
    def searches(self) -> bool:
        """True when the observer or the rule of its scale chooses ranges by a search of its own."""
        return self.observer != MIN_MAX or (self.scale is not None and self.scale.rule in SEARCH_RULES)

    def bits_per_value(self, rows: int, cols: int) -> float:
        """Returns the stored bits per value of a [rows, cols] weight; scales, zero points and shift bits included."""
        return self.codes.format.bits + sum(_scale_bits(stage, rows, cols) for stage in self.stages)

    def describe(self) -> str:
        """Returns short text for tables: `fp4_e2m1 group 16, e4m3 over f32`."""
        if self.then is not None:
            return f"{replace(self, then=None).describe()}, then {self.then.describe()} ({self.stored} stored)"
        if self.scale is None:
            return self.element
        scale = self.scale.dtype + (f" over {self.scale.global_scale.dtype}" if self.scale.global_scale else "")
        when = "" if self.scale.when == "static" else " dynamic"
        more = "" if self.symmetric else f", {self.zero_point} zero point"
        more += "" if self.rounding == "half_even" else f", rounding {self.rounding}"
        more += ", narrow" if self.narrow else ""
        more += "" if self.observer == MIN_MAX else f", {self.observer.name}"
        return f"{self.element} {_where(self.granularity)}, {scale}{when}, {self.scale.rule}{more}"


@cache
def _format(name: str, rounding: Rounding, narrow: bool) -> Element:
    element = ELEMENTS[name]
    return replace(element, rounding=rounding, minimum=-element.maximum if narrow else element.minimum)


def _where(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "tensor"
        case PerToken():
            return "token"
        case PerChannel(axis):
            return f"channel {axis}"
        case PerGroup(size):
            return f"group {size}"
        case PerTile(rows, cols):
            return f"tile {rows}x{cols}"


def _scale_bits(spec: TensorSpec, rows: int, cols: int) -> float:
    """Returns the bits per value that are not the code's own."""
    if spec.scale is None:
        return 0.0
    count: float = 1
    match spec.granularity:
        case PerChannel(axis):
            count = cols if axis == 1 else rows
        case PerGroup(size):
            count = rows * cols / size
        case PerTile(tile_rows, tile_cols):
            count = -(-rows // tile_rows) * -(-cols // tile_cols)
        case PerToken():
            count = 0
    zero = {"none": 0, "int": spec.format.bits, "float": 32}[spec.zero_point]
    shifts = 1 / spec.format.sub_block if spec.format.sub_block else 0.0
    over = SCALE_FORMATS[spec.scale.global_scale.dtype].bits if spec.scale.global_scale else 0
    return shifts + (count * (SCALE_FORMATS[spec.scale.dtype].bits + zero) + over) / (rows * cols)
