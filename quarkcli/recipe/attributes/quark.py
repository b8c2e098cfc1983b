"""Turns a SPEC of AMD Quark (release 0.13, `QTensorConfig`) into a TensorSpec. Torch-free.

All 17 keys; a missing one is null, and `enable_buffer_reuse` and `max_input_numel` only steer Quark's kernels. Quark's
rules: integer scales are amax / half of the range, exponents of MX scales round to `even`. Older names are read as
well: `dynamic` and `axis`, enumeration members written out (`Dtype.fp8_e4m3`), rounding as its number. A second SPEC
with `is_scale_quant` quantizes the scales of the first; without it, it quantizes the first one's values, and its codes
are stored.

What is said twice must agree, and what we cannot honour is refused by name: learned scales, observers without a
counterpart here, 16 and 32-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.recipe.attributes import native
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.spec import (
    ELEMENTS,
    MIN_MAX,
    OBSERVERS,
    Element,
    Granularity,
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Rounding,
    Rule,
    ScaleSpec,
    TensorSpec,
    When,
    ZeroPoint,
)

FIELDS = (
    "dtype", "is_dynamic", "qscheme", "ch_axis", "group_size", "block_size", "symmetric", "round_method", "scale_type",
    "scale_format", "scale_calculation_mode", "mx_element_dtype", "observer_cls", "is_scale_quant", "zero_point_type",
    "enable_buffer_reuse", "max_input_numel",
)  # fmt: skip
# What Quark has no word for is written as a native cfg under this key of the first SPEC; Quark's readers pass it over.
OWN_KEY = "tensor_spec"
_OLD_FIELDS = {"dynamic": "is_dynamic", "axis": "ch_axis"}
_TRAINING = "qat_spec"
WORDS = frozenset((*FIELDS, *_OLD_FIELDS, _TRAINING, OWN_KEY))

# dtype -> element; the others have the same name in both.
DTYPES = {"fp4": "fp4_e2m1", "float16": "fp16", "bfloat16": "bf16"}
# The wrapper `mx` names its element apart; its groups are of 32 where nothing is said.
MX = "mx"
MX_ELEMENTS = {"int8": "mxint8"}
MX_GROUP = 32
# scale_type -> scale format
SCALE_TYPES = {
    "float": "model",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "pof2": "pow2",
    "power_of_2": "pow2",
}
E8M0_TYPE, E5M3_TYPE = "float8_e8m0fnu", "float8_e5m3"
_SCALE_FORMATS = ("float32", "e8m0", "e4m3", "e5m3")
# dtype of the SPEC of a scale over scales -> format of the scales below
BLOCK_SCALES = {"fp8_e4m3": "e4m3", "fp8_e5m3": "e5m3"}
MODES = ("even", "floor", "ceil")
_SHARED_RULES = {"mx6": "floor", "mx9": "floor", "bfp16": "fit"}
_QSCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
_ROUNDINGS = {name: name for name in ("half_even", "floor", "round")} | {"8": "half_even", "3": "floor", "2": "round"}
_ZERO_POINTS = {"int32": "int", "float32": "float"}
# Quark's percentile is a constant of its code.
_PERCENTILE = ObserverSpec("percentile", (("percentile", 99.99999999),))
PLACEHOLDER = "PlaceholderObserver"
# observer_cls -> (the qscheme it is for, None: any; how the range is found here)
OBSERVER_CLASSES: dict[str, tuple[str | None, ObserverSpec]] = {
    PLACEHOLDER: (None, MIN_MAX),
    "PerTensorMinMaxObserver": ("per_tensor", MIN_MAX),
    "PerTensorPowOf2MinMaxObserver": ("per_tensor", MIN_MAX),
    "PerTensorPercentileObserver": ("per_tensor", _PERCENTILE),
    "PerTensorHistogramObserver": ("per_tensor", ObserverSpec("histogram")),
    "PerTensorHistogramObserverPro": ("per_tensor", ObserverSpec("histogram")),
    "PerTensorMSEObserver": ("per_tensor", ObserverSpec("mse", tuple(OBSERVERS["mse"].items()))),
    "PerChannelMinMaxObserver": ("per_channel", MIN_MAX),
    "PerChannelPowOf2MinMaxObserver": ("per_channel", MIN_MAX),
    "PerGroupMinMaxObserver": ("per_group", MIN_MAX),
    "PerBlockMXObserver": ("per_group", MIN_MAX),
    "PerBlockMXBufferReuseObserver": ("per_group", MIN_MAX),
    "PerBlockBFPObserver": ("per_group", MIN_MAX),
    "PerBlock2DMinMaxObserver": ("per_block", MIN_MAX),
}
_REFUSED_OBSERVERS = {
    "LSQObserver": "scales are learned only in training",
    "TQTObserver": "scales are learned only in training",
    "PerTensorPowOf2MinMSEObserver": "no observer here tries powers of two",
    "PerChannelPowOf2MinMSEObserver": "no observer here tries powers of two",
    "PerBlockMXDiffsObserver": "no observer here tries the exponents of blocks",
}
_POWERS_OF_TWO = ("PerTensorPowOf2MinMaxObserver", "PerChannelPowOf2MinMaxObserver")


def to_spec(specs: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, weight: bool) -> TensorSpec:
    """Returns the TensorSpec of a SPEC or of a list of them. Raises ConfigError naming the field."""
    given = [specs] if isinstance(specs, Mapping) else list(specs)
    if given and isinstance(given[0], Mapping) and OWN_KEY in given[0]:
        return native.to_spec(given[0][OWN_KEY])
    entries = [_known(entry) for entry in given]
    stages: list[TensorSpec] = []
    for index, entry in enumerate(entries):
        if not entry.get("is_scale_quant"):
            after = entries[index + 1] if index + 1 < len(entries) else {}
            stages.append(_stage(entry, after if after.get("is_scale_quant") else None, weight))
        elif index == 0 or entries[index - 1].get("is_scale_quant"):
            raise ConfigError("is_scale_quant needs a spec before it, whose scales it quantizes", kind="E-CHAIN")
    *before, spec = stages
    for stage in reversed(before):
        spec = replace(stage, then=spec, stored="last")
    # Quark's combinations are more than ours: what comes out must be one that a native cfg may say.
    return native.to_spec(spec_to_yaml(spec))


def _known(entry: Any) -> dict[str, Any]:
    """Returns a SPEC under today's keys, enumeration members by their bare names."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"a SPEC must be a mapping, not {entry!r}", kind="E-ATTRIBUTE-VALUE")
    out: dict[str, Any] = {}
    for key, value in entry.items():
        name = _OLD_FIELDS.get(key, key)
        if name == _TRAINING and value is None:
            continue
        if name == _TRAINING:
            raise ConfigError(
                "'qat_spec' is not supported: scales are learned only in training",
                hint="remove it",
                kind="E-ATTRIBUTE-UNSUPPORTED",
            )
        if name not in FIELDS:
            hint = did_you_mean(str(key), FIELDS)
            raise ConfigError(f"unknown key '{key}' in a SPEC", hint=hint, kind="E-ATTRIBUTE-UNKNOWN")
        if name in out:
            raise ConfigError(f"'{key}' is the old name of '{name}', and both are given", kind="E-ATTRIBUTE-CONFLICT")
        out[name] = value.rpartition(".")[2] if isinstance(value, str) else value
    if out.get("dtype") is None:
        raise ConfigError(
            "a SPEC has no 'dtype'", hint="add dtype: fp8_e4m3, or another one", kind="E-ATTRIBUTE-CONFLICT"
        )
    for name in ("dtype", "mx_element_dtype", "observer_cls"):
        if not isinstance(out.get(name), str | None):
            raise ConfigError(f"{name} must be a name, not {out[name]!r}", kind="E-ATTRIBUTE-VALUE")
    return out


def _stage(entry: Mapping[str, Any], over: Mapping[str, Any] | None, weight: bool) -> TensorSpec:
    element = _element(entry)
    if element.kind == "cast":
        return _cast(entry, element)
    observer = _observer(entry)
    when = _when(entry, element, weight)
    if element.fraction or entry["dtype"] == MX:
        return _shared_exponent(entry, element, when, over)
    if entry.get("mx_element_dtype") is not None:
        raise ConfigError(f"mx_element_dtype works only with dtype {MX}", hint="remove it", kind="E-ATTRIBUTE-CONFLICT")
    granularity = _granularity(entry, weight)
    if not weight and when == "static" and isinstance(granularity, PerGroup) and over is None:
        raise ConfigError(
            "the scales of an activation in groups cannot be static",
            hint="write is_dynamic: true",
            kind="E-FORMAT-IMPOSSIBLE",
        )
    zero_point: ZeroPoint = "none"
    if _flag(entry, "symmetric") is False:
        kind = _choice(entry, "zero_point_type", _ZERO_POINTS) or "int32"
        zero_point = cast(ZeroPoint, _ZERO_POINTS[kind])
    rounding = _choice(entry, "round_method", _ROUNDINGS) or "half_even"
    return TensorSpec(
        element.name,
        granularity,
        _scale(entry, element, when, over),
        zero_point,
        cast(Rounding, _ROUNDINGS[rounding]),
        observer=observer,
    )


def _element(entry: Mapping[str, Any]) -> Element:
    dtype = entry["dtype"]
    inner = entry.get("mx_element_dtype")
    if dtype == MX:
        if inner is None:
            raise ConfigError(
                "dtype mx needs mx_element_dtype", hint="add mx_element_dtype: fp4", kind="E-ATTRIBUTE-CONFLICT"
            )
        name = MX_ELEMENTS.get(inner, DTYPES.get(inner, inner))
        if name not in ELEMENTS or not (ELEMENTS[name].kind == "float" or name in MX_ELEMENTS.values()):
            raise ConfigError(
                f"mx_element_dtype '{inner}' is unknown",
                hint="use fp4, an fp6, an fp8, or int8",
                kind="E-ATTRIBUTE-VALUE",
            )
        return ELEMENTS[name]
    name = DTYPES.get(dtype, dtype)
    if name not in ELEMENTS or name in MX_ELEMENTS.values():
        known = [*DTYPES, MX, *(known for known in ELEMENTS if known not in {*DTYPES.values(), *MX_ELEMENTS.values()})]
        hint = did_you_mean(str(dtype), known, f"use one of {', '.join(known)}")
        raise ConfigError(f"dtype {dtype!r} is not supported", hint=hint, kind="E-ATTRIBUTE-UNSUPPORTED")
    return ELEMENTS[name]


def _cast(entry: Mapping[str, Any], element: Element) -> TensorSpec:
    """Returns the spec of a plain 16-bit float, which takes no scale."""
    for key in ("qscheme", "group_size", "block_size", "scale_format", "mx_element_dtype"):
        if entry.get(key) is not None:
            raise ConfigError(
                f"'{key}' contradicts dtype {entry['dtype']}, which has no scale",
                hint="remove it",
                kind="E-ATTRIBUTE-CONFLICT",
            )
    if entry.get("observer_cls") not in (None, PLACEHOLDER):
        raise ConfigError(
            f"dtype {entry['dtype']} has no range to observe",
            hint=f"write observer_cls: {PLACEHOLDER}",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    return TensorSpec(element.name, PerTensor(), None)


def _shared_exponent(
    entry: Mapping[str, Any], element: Element, when: When, over: Mapping[str, Any] | None
) -> TensorSpec:
    """Returns the spec of mx6, mx9, bfp16 or the wrapper mx: groups under one exponent. Quark says little of them."""
    if over is not None:
        raise ConfigError(f"the exponents of {entry['dtype']} cannot have a scale", kind="E-FORMAT-IMPOSSIBLE")
    _along_features(entry)
    size = _size(entry, "group_size", MX_GROUP)
    rule = _SHARED_RULES.get(element.name, _choice(entry, "scale_calculation_mode", MODES) or "even")
    return TensorSpec(element.name, PerGroup(size), ScaleSpec("e8m0", cast(Rule, rule), when))


def _when(entry: Mapping[str, Any], element: Element, weight: bool) -> When:
    dynamic = _flag(entry, "is_dynamic")
    if dynamic is None and not weight and element.bits == 8 and not element.fraction and entry["dtype"] != MX:
        raise ConfigError(
            f"'is_dynamic' is missing beside dtype {entry['dtype']}",
            hint="add is_dynamic: true, or false",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    if weight and dynamic:
        raise ConfigError(
            "a weight cannot be dynamic: it is quantized before the model runs",
            hint="write is_dynamic: false",
            kind="E-FORMAT-IMPOSSIBLE",
        )
    # Formats that need no calibration leave it open.
    return "static" if weight or dynamic is False else "dynamic"


def _granularity(entry: Mapping[str, Any], weight: bool) -> Granularity:
    scheme = _choice(entry, "qscheme", _QSCHEMES)
    if scheme is None:
        raise ConfigError(
            "a SPEC has no 'qscheme'", hint=f"add one of {', '.join(_QSCHEMES)}", kind="E-ATTRIBUTE-CONFLICT"
        )
    if scheme != "per_group" and entry.get("group_size") is not None:
        raise ConfigError(
            f"group_size contradicts qscheme {scheme}", hint="write qscheme: per_group", kind="E-ATTRIBUTE-CONFLICT"
        )
    if scheme != "per_block" and entry.get("block_size") is not None:
        raise ConfigError(
            f"block_size contradicts qscheme {scheme}", hint="write qscheme: per_block", kind="E-ATTRIBUTE-CONFLICT"
        )
    axis = entry.get("ch_axis")
    if axis is not None and type(axis) is not int:
        raise ConfigError(f"ch_axis must be a whole number, not {axis!r}", kind="E-ATTRIBUTE-VALUE")
    if scheme == "per_tensor":
        return PerTensor()
    if scheme == "per_channel":
        # Quark's 1 on [batch, token, feature] is the token axis.
        return PerChannel(abs(axis or 0)) if weight else PerToken()
    if scheme == "per_group":
        _along_features(entry)
        return PerGroup(_size(entry, "group_size", None))
    blocks = entry.get("block_size")
    if not isinstance(blocks, list | tuple) or len(blocks) != 2 or not all(type(b) is int and b > 0 for b in blocks):
        raise ConfigError(
            f"block_size must be two positive whole numbers, not {blocks!r}",
            hint="write [128, 128], for example",
            kind="E-ATTRIBUTE-VALUE",
        )
    return PerTile(blocks[0], blocks[1])


def _along_features(entry: Mapping[str, Any]) -> None:
    if entry.get("ch_axis") not in (None, 1, -1):
        raise ConfigError(
            f"groups must be along the last axis, not along {entry['ch_axis']}",
            hint="write ch_axis: -1",
            kind="E-ATTRIBUTE-CONFLICT",
        )


def _size(entry: Mapping[str, Any], key: str, usual: int | None) -> int:
    size = entry.get(key)
    if size is None and usual is not None:
        return usual
    if type(size) is int and size > 0:
        return size
    raise ConfigError(
        f"{key} must be a positive whole number, not {size!r}",
        hint=f"write {key}: 128, for example",
        kind="E-ATTRIBUTE-VALUE",
    )


def _scale(entry: Mapping[str, Any], element: Element, when: When, over: Mapping[str, Any] | None) -> ScaleSpec:
    kind = _choice(entry, "scale_type", (*SCALE_TYPES, E8M0_TYPE, E5M3_TYPE))
    format_ = _choice(entry, "scale_format", _SCALE_FORMATS)
    mode = _choice(entry, "scale_calculation_mode", MODES)
    if over is not None:
        return _two_level(over, when)
    if format_ == "e8m0" or kind == E8M0_TYPE:
        return ScaleSpec("e8m0", cast(Rule, mode or "even"), when)
    if format_ == "e5m3" or kind == E5M3_TYPE:
        return ScaleSpec("e5m3", "absmax", when)
    if format_ == "e4m3":
        raise ConfigError(
            "scale_format e4m3 needs a second SPEC with is_scale_quant",
            hint="write a list of two SPECs",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    dtype = SCALE_TYPES[kind or "float"]
    if entry.get("observer_cls") in _POWERS_OF_TWO:
        if kind not in (None, "float", "pof2", "power_of_2"):
            raise ConfigError(
                f"scale_type {kind} contradicts {entry['observer_cls']}",
                hint="write scale_type: pof2",
                kind="E-ATTRIBUTE-CONFLICT",
            )
        dtype = "pow2"
    return ScaleSpec(dtype, "half_range" if element.kind == "integer" else "absmax", when)


def _two_level(over: Mapping[str, Any], when: When) -> ScaleSpec:
    """Returns block scales under the global scale that the second SPEC says."""
    dtype = _choice(over, "dtype", BLOCK_SCALES)
    if over.get("qscheme") != "per_tensor":
        raise ConfigError("the scale over scales is one per tensor", hint="write qscheme: per_tensor", kind="E-CHAIN")
    outer = ScaleSpec("f32", when="dynamic" if _flag(over, "is_dynamic") else "static")
    return ScaleSpec(BLOCK_SCALES[dtype or ""], "absmax", when, outer)


def _observer(entry: Mapping[str, Any]) -> ObserverSpec:
    name = entry.get("observer_cls")
    if name is None:
        return MIN_MAX
    if name in _REFUSED_OBSERVERS:
        raise ConfigError(
            f"'{name}' is not supported: {_REFUSED_OBSERVERS[name]}",
            hint="use another observer",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    known = _choice(entry, "observer_cls", OBSERVER_CLASSES)
    scheme, observer = OBSERVER_CLASSES[known or PLACEHOLDER]
    given = _choice(entry, "qscheme", _QSCHEMES)
    if scheme is not None and given is not None and given != scheme:
        raise ConfigError(
            f"{name} does not fit qscheme {given}", hint=f"use it with {scheme}", kind="E-ATTRIBUTE-CONFLICT"
        )
    return observer


def _choice(entry: Mapping[str, Any], key: str, known: Iterable[str]) -> str | None:
    """Returns one of the known words, or None for null."""
    value = entry.get(key)
    if value is None:
        return None
    word = str(value) if type(value) is int else value
    if isinstance(word, str) and word in known:
        return word
    hint = did_you_mean(str(value), known, f"use one of {', '.join(known)}")
    raise ConfigError(f"{key} {value!r} is unknown", hint=hint, kind="E-ATTRIBUTE-VALUE")


def _flag(entry: Mapping[str, Any], key: str) -> bool | None:
    value = entry.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise ConfigError(f"{key} must be true, false or null, not {value!r}", kind="E-ATTRIBUTE-VALUE")
