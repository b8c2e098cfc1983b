"""Turns NVIDIA ModelOpt's quantizer attributes into a TensorSpec. Torch-free.

Facts: release 0.47, `QuantizerAttributeConfig`. Its rules differ from ours: integer scales are amax / qmax, the
exponents of MX scales round up (`rceil`). What has no effect on a written checkpoint (`fake_quant`,
`pass_through_bwd`, `trt_high_precision_dtype`, `effective_bits`) is accepted; what we cannot honour is refused by name.
Axes of `block_sizes` may be text, because JSON has no other keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.spec import (
    E4M3_MAX,
    ELEMENTS,
    MIN_MAX,
    OBSERVERS,
    Granularity,
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
    When,
)

FIELDS = (
    "num_bits", "axis", "block_sizes", "type", "unsigned", "narrow_range", "fake_quant", "calibrator", "bias", "rotate",
    "learn_amax", "trt_high_precision_dtype", "pass_through_bwd", "backend", "backend_extra_args", "use_constant_amax",
    "constant_amax", "effective_bits",
)  # fmt: skip
_BLOCK_WORDS = ("type", "scale_bits", "scale_block_sizes", "four_over_six")
_FLOATS = {(element.exponent, element.mantissa): name for name, element in ELEMENTS.items() if element.kind == "float"}
_EXPONENT_SCALE, _BLOCK_SCALE = (8, 0), (4, 3)
_PRECISIONS = ("Float", "Half", "BFloat16")
_REFUSED = {
    "learn_amax": "scales are learned only in training",
    "bias": "no algorithm here subtracts a bias before it quantizes",
    "backend": "custom backends cannot be run",
    "backend_extra_args": "custom backends cannot be run",
}


def to_spec(cfg: Mapping[str, Any], *, weight: bool) -> TensorSpec:
    """Returns the TensorSpec of ModelOpt attributes. Raises ConfigError naming the field.

    weight   a weight is known whole, so that its `dynamic` blocks are computed once and stored
    """
    _known(cfg)
    for name, why in _REFUSED.items():
        if cfg.get(name) not in (None, False):
            raise ConfigError(
                f"'{name}' is not supported: {why}", hint="remove it from cfg", kind="E-ATTRIBUTE-UNSUPPORTED"
            )
    if _rotates(cfg.get("rotate", False)):
        raise ConfigError(
            "'rotate' is not supported: no algorithm rotates a single tensor",
            hint="remove it from cfg",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    for name in ("fake_quant", "pass_through_bwd"):
        _flag(cfg, name)
    blocks = _blocks(cfg)
    scale_bits = _pair(blocks.get("scale_bits"), "block_sizes.scale_bits")
    element = _element(cfg, mx=scale_bits == _EXPONENT_SCALE)
    when = _when(cfg, blocks, weight)
    granularity = _granularity(cfg, blocks, weight)
    scale = _scale(element, scale_bits, when, blocks, _constant(cfg))
    narrow = _flag(cfg, "narrow_range") and not ELEMENTS[element].fraction  # mxint8 is narrow as it is
    observer = _observer(cfg.get("calibrator", "max"), weight, when)
    return TensorSpec(element, granularity, scale, narrow=narrow, observer=observer)


def from_spec(spec: TensorSpec) -> dict[str, Any]:
    """Returns the attributes that come nearest to one stage; what ModelOpt has no word for is left out.

    Raises ConfigError for a number format that it does not have.
    """
    element = ELEMENTS[spec.element]
    if spec.element == "mxint8" or (element.kind == "integer" and not element.fraction):
        bits: Any = element.bits
    elif element.kind == "float":
        bits = [element.exponent, element.mantissa]
    else:
        raise ConfigError(
            f"ModelOpt has no word for {spec.element}",
            hint="write 'element' in its place",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    found: dict[str, Any] = {"num_bits": bits}
    scale = spec.scale
    assert scale is not None  # casts are refused above
    blocks: dict[Any, Any] = {}
    match spec.granularity:
        case PerChannel(axis):
            found["axis"] = axis
        case PerGroup(size):
            blocks[-1] = size
        case PerTile(rows, columns):
            blocks |= {-1: columns, -2: rows}
        case PerToken():
            blocks[-1] = None
    if blocks and scale.dtype in ("e8m0", "e4m3"):
        blocks["scale_bits"] = list(_EXPONENT_SCALE if scale.dtype == "e8m0" else _BLOCK_SCALE)
    if blocks and scale.rule == "four_over_six":
        blocks["four_over_six"] = True
    if scale.when == "dynamic":
        (blocks or found)["type"] = "dynamic"
    if blocks:
        found["block_sizes"] = blocks
    if scale.outermost.constant_amax is not None:
        found["constant_amax"] = scale.outermost.constant_amax
    if spec.narrow:
        found["narrow_range"] = True
    if spec.observer.name == "histogram":
        found["calibrator"] = "histogram"
    return found


def _known(cfg: Mapping[str, Any]) -> None:
    for key in cfg:
        if key not in FIELDS:
            hint = did_you_mean(str(key), FIELDS)
            raise ConfigError(f"unknown attribute '{key}'", hint=hint, kind="E-ATTRIBUTE-UNKNOWN")
    if cfg.get("axis") is not None and cfg.get("block_sizes"):
        raise ConfigError(
            "axis and block_sizes exclude each other", hint="remove one of the two", kind="E-ATTRIBUTE-CONFLICT"
        )
    if cfg.get("use_constant_amax") and cfg.get("constant_amax") is not None:
        raise ConfigError(
            "use_constant_amax and constant_amax exclude each other",
            hint="remove one of the two",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    precision = cfg.get("trt_high_precision_dtype")
    if precision not in (None, *_PRECISIONS):
        raise ConfigError(
            f"trt_high_precision_dtype {precision!r} is unknown",
            hint=f"use one of {', '.join(_PRECISIONS)}",
            kind="E-ATTRIBUTE-VALUE",
        )
    bits = cfg.get("effective_bits")
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= 16):
        raise ConfigError(f"effective_bits must lie between 0 and 16, not {bits!r}", kind="E-ATTRIBUTE-VALUE")


def _rotates(value: Any) -> bool:
    return bool(value.get("enable", False)) if isinstance(value, Mapping) else bool(value)


def _flag(cfg: Mapping[str, Any], name: str) -> bool:
    value = cfg.get(name, False)
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{name} must be true or false, not {value!r}", kind="E-ATTRIBUTE-VALUE")


def _pair(value: Any, name: str) -> tuple[int, int] | None:
    """Returns (exponent, mantissa) of `[4, 3]` or `e4m3`."""
    if value is None:
        return None
    if isinstance(value, str) and (found := re.fullmatch(r"e(\d)m(\d)", value.lower())):
        return int(found[1]), int(found[2])
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(part) is int for part in value):
        return value[0], value[1]
    raise ConfigError(
        f"{name} must be a pair such as [4, 3] or a text such as e4m3, not {value!r}", kind="E-ATTRIBUTE-VALUE"
    )


def _element(cfg: Mapping[str, Any], *, mx: bool) -> str:
    bits = cfg.get("num_bits", 8)
    if isinstance(bits, float) and bits.is_integer():
        bits = int(bits)
    unsigned = _flag(cfg, "unsigned")
    if isinstance(bits, int) and not isinstance(bits, bool):
        if mx:
            if bits != 8 or unsigned:
                raise ConfigError(
                    f"no MX format has {bits}-bit integers", hint="write num_bits: 8", kind="E-ATTRIBUTE-UNSUPPORTED"
                )
            return "mxint8"
        if unsigned:
            raise ConfigError(
                "'unsigned' is not supported: without a zero point negative values are lost",
                kind="E-ATTRIBUTE-UNSUPPORTED",
            )
        if f"int{bits}" not in ELEMENTS:
            raise ConfigError(
                f"num_bits {bits} is not supported",
                hint="use 2, 3, 4 or 8, or a pair such as [4, 3]",
                kind="E-ATTRIBUTE-UNSUPPORTED",
            )
        return f"int{bits}"
    pair = _pair(bits, "num_bits")
    if pair not in _FLOATS:
        raise ConfigError(
            f"num_bits {bits!r} is not supported",
            hint=f"use one of the pairs {', '.join(map(str, _FLOATS))}",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    if unsigned or _flag(cfg, "narrow_range"):
        raise ConfigError(
            "unsigned and narrow_range are for integers", hint="remove them from cfg", kind="E-ATTRIBUTE-CONFLICT"
        )
    return _FLOATS[pair]


def _blocks(cfg: Mapping[str, Any]) -> dict[Any, Any]:
    blocks = cfg.get("block_sizes")
    if blocks is None:
        return {}
    if not isinstance(blocks, Mapping):
        raise ConfigError(f"block_sizes must be a mapping from axis to size, not {blocks!r}", kind="E-ATTRIBUTE-VALUE")
    found: dict[Any, Any] = {}
    for key, size in blocks.items():
        axis = int(key) if isinstance(key, str) and re.fullmatch(r"-?\d+", key) else key
        if axis in found:
            raise ConfigError(f"block_sizes names axis {axis} twice", kind="E-ATTRIBUTE-CONFLICT")
        found[axis] = size
        if isinstance(axis, int) and not isinstance(axis, bool):
            if size is not None and (type(size) is not int or size < 1):
                raise ConfigError(
                    f"block_sizes.{key} must be a positive whole number or null, not {size!r}", kind="E-ATTRIBUTE-VALUE"
                )
        elif axis not in _BLOCK_WORDS:
            otherwise = f"write an axis, such as -1: 16, or {', '.join(_BLOCK_WORDS)}"
            hint = did_you_mean(str(axis), _BLOCK_WORDS, otherwise)
            raise ConfigError(f"unknown key '{key}' in block_sizes", hint=hint, kind="E-ATTRIBUTE-UNKNOWN")
    if found.get("scale_block_sizes"):
        raise ConfigError(
            "'scale_block_sizes' is not supported: a scale over scales covers the whole tensor",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    if not isinstance(found.get("four_over_six", False), bool):
        raise ConfigError(
            f"block_sizes.four_over_six must be true or false, not {found['four_over_six']!r}", kind="E-ATTRIBUTE-VALUE"
        )
    return found


def _when(cfg: Mapping[str, Any], blocks: Mapping[Any, Any], weight: bool) -> When:
    for value in (cfg.get("type", "static"), blocks.get("type", "static")):
        if value not in ("static", "dynamic"):
            raise ConfigError(f"type must be static or dynamic, not {value!r}", kind="E-ATTRIBUTE-VALUE")
    dynamic = "dynamic" in (cfg.get("type"), blocks.get("type"))
    return "dynamic" if dynamic and not weight else "static"


def _granularity(cfg: Mapping[str, Any], blocks: Mapping[Any, Any], weight: bool) -> Granularity:
    axes = {key: size for key, size in blocks.items() if isinstance(key, int)}
    if blocks and not axes:
        raise ConfigError("block_sizes names no axis", hint="write -1: 16, for example", kind="E-ATTRIBUTE-CONFLICT")
    if not axes:
        return _channel(cfg.get("axis"), weight)
    if blocks.get("type") == "dynamic" and len(axes) != 1:
        raise ConfigError(
            "dynamic blocks can have only one axis", hint="write -1: 16, or type: static", kind="E-ATTRIBUTE-CONFLICT"
        )
    # A weight is [out, in]: 0 and -2 are its rows, 1 and -1 its columns. Activations have their features last.
    known = (0, 1, -1, -2) if weight else (-1,)
    sizes = {key % 2: size for key, size in axes.items() if key in known}
    if len(axes) != len(sizes):
        raise ConfigError(
            f"blocks along {list(axes)} are not supported",
            hint="use axis -1; for weights also -1 together with -2",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    match sizes:
        case {0: int(rows), 1: int(columns)}:
            return PerTile(rows, columns)
        case {1: int(size)} if len(sizes) == 1:
            return PerGroup(size)
        case {1: None} if len(sizes) == 1:
            return PerChannel(0) if weight else PerToken()
    raise ConfigError(
        f"blocks along {list(axes)} are not supported",
        hint="use axis -1, or -1 and -2 with sizes",
        kind="E-ATTRIBUTE-UNSUPPORTED",
    )


def _channel(axis: Any, weight: bool) -> Granularity:
    if isinstance(axis, list | tuple) and len(axis) == 1:
        axis = axis[0]
    if axis is None:
        return PerTensor()
    if type(axis) is int and axis in ((0, 1, -1, -2) if weight else (-1,)):
        return PerChannel(axis % 2)
    hint = (
        "use 0 for output rows, -1 for input columns, or null"
        if weight
        else "use null or -1, or write block_sizes: {-1: null}"
    )
    raise ConfigError(f"axis {axis!r} is not supported", hint=hint, kind="E-ATTRIBUTE-UNSUPPORTED")


def _constant(cfg: Mapping[str, Any]) -> float | None:
    if _flag(cfg, "use_constant_amax"):
        return E4M3_MAX  # so that the scale is one
    amax = cfg.get("constant_amax")
    if amax is None:
        return None
    if isinstance(amax, bool) or not isinstance(amax, int | float) or not 0 < amax < float("inf"):
        raise ConfigError(f"constant_amax must be a positive number, not {amax!r}", kind="E-ATTRIBUTE-VALUE")
    return float(amax)


def _scale(
    element: str, bits: tuple[int, int] | None, when: When, blocks: Mapping[Any, Any], constant: float | None
) -> ScaleSpec:
    four_over_six = blocks.get("four_over_six", False)
    if four_over_six and bits != _BLOCK_SCALE:
        raise ConfigError(
            "four_over_six works only with e4m3 block scales", hint="write scale_bits: e4m3", kind="E-FORMAT-IMPOSSIBLE"
        )
    if bits == _EXPONENT_SCALE:
        return ScaleSpec("e8m0", "rceil", when, constant_amax=constant)
    if bits == _BLOCK_SCALE:
        if four_over_six and when == "dynamic":
            raise ConfigError(
                "four_over_six works only with static blocks",
                hint="write block_sizes.type: static",
                kind="E-FORMAT-IMPOSSIBLE",
            )
        over = ScaleSpec("f32", "absmax", "static", constant_amax=constant)
        return ScaleSpec("e4m3", "four_over_six" if four_over_six else "absmax", when, over)
    if bits is not None:
        raise ConfigError(
            f"scale_bits {bits} is not supported", hint="write [4, 3] or [8, 0]", kind="E-ATTRIBUTE-UNSUPPORTED"
        )
    dtype = "model" if ELEMENTS[element].kind == "integer" and ELEMENTS[element].bits <= 4 else "f32"
    return ScaleSpec(dtype, "absmax", when, constant_amax=constant)


def _observer(calibrator: Any, weight: bool, when: When) -> ObserverSpec:
    if calibrator in ("max", None):
        return MIN_MAX
    if calibrator != "histogram":
        raise ConfigError(
            f"calibrator {calibrator!r} is not supported", hint="use max or histogram", kind="E-ATTRIBUTE-UNSUPPORTED"
        )
    if weight or when == "dynamic":
        raise ConfigError(
            "calibrator histogram works only for static activations",
            hint="write calibrator: max",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    return ObserverSpec("histogram", tuple(OBSERVERS["histogram"].items()))
