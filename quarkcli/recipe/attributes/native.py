"""Reads the native vocabulary of a `cfg`: the fields of TensorSpec in YAML.

    element: fp4_e2m1
    granularity: {group: 16}
    scale: {dtype: e4m3, rule: absmax, when: dynamic, global_scale: {dtype: f32, when: static}}
    zero_point: int            # asymmetric integers
    rounding: half_even        # or floor, round
    narrow: true               # signed integers without their lowest code
    observer: {name: percentile, percentile: 99.9}
    then: {...}                # a second quantization of the result; `stored: last` keeps its codes instead
    stored: first

Left out, `scale.dtype` is the model's dtype for integers of 4 bits and less, e8m0 for the shared-exponent formats and
float32 otherwise; `scale.rule` is `half_range` for integers, `even` for e8m0 and `absmax` otherwise; `scale.when` is
`static`. `element: mx` with `mx_element` is short for an element in groups of 32 under an e8m0 scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from quarkcli.errors import ConfigError, did_you_mean, near_misses
from quarkcli.spec import (
    E4M3_SPAN,
    ELEMENTS,
    EXPONENT_RULES,
    MIN_MAX,
    MOST_RANGES,
    OBSERVERS,
    RULES,
    SCALE_FORMATS,
    SEARCH_RULES,
    Element,
    Granularity,
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Rounding,
    ScaleSpec,
    TensorSpec,
    ZeroPoint,
)

KEYS = ("element", "granularity", "scale", "zero_point", "rounding", "narrow", "observer", "then", "stored")
_RENAMED = {"over": "global_scale"}  # words of before
_SCALE_KEYS = ("dtype", "rule", "when", "global_scale", "minimum", "constant_amax")
_MX = "mx"
_MX_KEYS = ("element", "mx_element", "granularity", "scale")
_MX_GROUP = 32


def to_spec(cfg: Mapping[str, Any]) -> TensorSpec:
    """Returns the TensorSpec of a native cfg.

    Raises ConfigError naming the key, without a place (the caller adds it).
    """
    if isinstance(cfg, Mapping) and cfg.get("element") == _MX:
        cfg = _unwrapped(cfg)
    _only(cfg, KEYS, "cfg")
    if "element" not in cfg:
        raise ConfigError("cfg has no 'element'", hint=f"add one of {', '.join(ELEMENTS)}", kind="E-ATTRIBUTE-CONFLICT")
    element = ELEMENTS[_choice(cfg["element"], ELEMENTS, "element")]
    if element.kind == "cast":
        _only(cfg, ("element",), f"a cfg of {element.name} (which has no scale)")
        return TensorSpec(element.name, PerTensor(), None)
    then = cfg.get("then")
    if then is None and "stored" in cfg:
        raise ConfigError(
            "'stored' works only in a chain (two quantizations, one after the other)",
            hint="write the second stage as 'then'",
            kind="E-CHAIN",
        )
    spec = TensorSpec(
        element.name,
        _granularity(cfg.get("granularity", "tensor")),
        _scale(cfg.get("scale") or {}, element),
        _choice(cfg.get("zero_point", "none"), get_args(ZeroPoint), "zero_point"),  # type: ignore[arg-type]
        _choice(cfg.get("rounding", "half_even"), get_args(Rounding), "rounding"),  # type: ignore[arg-type]
        _flag(cfg.get("narrow", False), "narrow"),
        _observer(cfg.get("observer")),
        to_spec(then) if then is not None else None,
        _choice(cfg.get("stored", "first"), ("first", "last"), "stored"),  # type: ignore[arg-type]
    )
    _check(spec)
    return spec


def _unwrapped(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{element: mx, mx_element: X}` written out."""
    _only(cfg, _MX_KEYS, "a cfg of mx")
    inner = cfg.get("mx_element")
    element = "mxint8" if inner == "int8" else inner
    if (
        not isinstance(element, str)
        or element not in ELEMENTS
        or (ELEMENTS[element].kind != "float" and element != "mxint8")
    ):
        raise ConfigError(
            f"mx_element {inner!r} is unknown", hint="use fp4_e2m1, an fp6, an fp8, or int8", kind="E-ATTRIBUTE-VALUE"
        )
    given = cfg.get("scale") or {}
    _only(given, _SCALE_KEYS, "scale")
    scale = {"dtype": "e8m0", **given}
    return {"element": element, "granularity": cfg.get("granularity", {"group": _MX_GROUP}), "scale": scale}


def _only(mapping: Any, allowed: tuple[str, ...], what: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{what} must be a mapping, not {type(mapping).__name__}", kind="E-ATTRIBUTE-VALUE")
    for key in mapping:
        if key not in allowed:
            close = [_RENAMED[key]] if _RENAMED.get(key) in allowed else near_misses(str(key), allowed)
            hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(allowed)}"
            raise ConfigError(f"unknown key '{key}' in {what}", hint=hint, kind="E-ATTRIBUTE-UNKNOWN")


def _choice(value: Any, known: Iterable[str], key: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    hint = did_you_mean(str(value), known, f"use one of {', '.join(known)}")
    raise ConfigError(f"{key} '{value}' is unknown", hint=hint, kind="E-ATTRIBUTE-VALUE")


def _flag(value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{key} must be true or false, not {value!r}", kind="E-ATTRIBUTE-VALUE")


def _positive(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(f"{key} must be a positive whole number, not {value!r}", kind="E-ATTRIBUTE-VALUE")


def _number(value: Any, key: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{key} must be a positive number, not {value!r}", kind="E-ATTRIBUTE-VALUE")
    return float(value)


def _granularity(value: Any) -> Granularity:
    if value == "tensor":
        return PerTensor()
    if value == "token":
        return PerToken()
    if value == "channel":
        return PerChannel(0)
    if isinstance(value, Mapping) and len(value) == 1:
        ((key, size),) = value.items()
        if key == "group":
            return PerGroup(_positive(size, "granularity.group"))
        if key == "channel" and size in (0, 1, -1) and not isinstance(size, bool):
            return PerChannel(abs(size))
        if key == "tile" and isinstance(size, list) and len(size) == 2:
            return PerTile(_positive(size[0], "granularity.tile"), _positive(size[1], "granularity.tile"))
    raise ConfigError(
        f"granularity {value!r} is unknown",
        hint="use tensor, channel, {channel: 0 or 1}, token, {group: SIZE} or {tile: [ROWS, COLUMNS]}",
        kind="E-ATTRIBUTE-VALUE",
    )


def _scale(value: Any, element: Element) -> ScaleSpec:
    _only(value, _SCALE_KEYS, "scale")
    small_integer = element.kind == "integer" and element.bits <= 4
    usual = "e8m0" if element.fraction else "model" if small_integer else "f32"
    dtype = _choice(value.get("dtype", usual), SCALE_FORMATS, "scale.dtype")
    rule = _choice(value.get("rule", _usual_rule(element, dtype)), RULES, "scale.rule")
    when = _choice(value.get("when", "static"), ("static", "dynamic"), "scale.when")
    over = value.get("global_scale")
    outer = _scale(over, ELEMENTS["fp8_e4m3"]) if over is not None else None
    minimum = _number(value.get("minimum"), "scale.minimum")
    amax = _number(value.get("constant_amax"), "scale.constant_amax")
    return ScaleSpec(dtype, rule, when, outer, minimum, amax)  # type: ignore[arg-type]


def _usual_rule(element: Element, dtype: str) -> str:
    if element.name == "bfp16":
        return "fit"
    if element.sub_block:
        return "floor"
    if dtype == "e8m0":
        return "even"
    return "half_range" if element.kind == "integer" else "absmax"


def _observer(value: Any) -> ObserverSpec:
    if value is None:
        return MIN_MAX
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError(
            "observer must be a name, or a mapping with 'name'",
            hint=f"use one of {', '.join(OBSERVERS)}",
            kind="E-ATTRIBUTE-VALUE",
        )
    name = _choice(given["name"], OBSERVERS, "observer")
    known = OBSERVERS[name]
    _only(given, ("name", *known), f"observer {name}")
    numbers = {key: _number(given.get(key, usual), f"observer.{key}") for key, usual in known.items()}
    if numbers.get("percentile") is not None and not 50 <= (numbers["percentile"] or 0) <= 100:
        raise ConfigError("observer.percentile must lie between 50 and 100", kind="E-ATTRIBUTE-VALUE")
    for key in ("anchor", "upper"):
        if (numbers.get(key) or 1) > 100:
            raise ConfigError(f"observer.{key} must be a percentage, not {numbers[key]:g}", kind="E-ATTRIBUTE-VALUE")
    if (numbers.get("anchor") or 0) > (numbers.get("upper") or 100):
        raise ConfigError(
            f"observer.anchor ({numbers['anchor']:g}) must not be above observer.upper ({numbers['upper']:g})",
            kind="E-ATTRIBUTE-VALUE",
        )
    if (numbers.get("rho") or 1) >= E4M3_SPAN:
        raise ConfigError(
            f"observer.rho must be less than {E4M3_SPAN}",
            hint="use a smaller one; e4m3 scales go no higher",
            kind="E-ATTRIBUTE-VALUE",
        )
    if numbers.get("shrink") is not None and not (numbers["shrink"] or 0) < 1:
        raise ConfigError(
            "observer.shrink must lie between 0 and 1",
            hint="give the smallest share of amax to try",
            kind="E-ATTRIBUTE-VALUE",
        )
    steps = numbers.get("steps") or 1
    if steps % 1 or steps > MOST_RANGES:
        raise ConfigError(
            f"observer.steps must be a whole number from 1 to {MOST_RANGES}, not {steps:g}", kind="E-ATTRIBUTE-VALUE"
        )
    return ObserverSpec(name, tuple((key, number) for key, number in numbers.items() if number is not None))


# --- what fits together ----------------------------------------------------------------------------------------------


def _check(spec: TensorSpec) -> None:
    _check_scale(spec)
    _check_integer_words(spec)
    _check_chain(spec)
    if isinstance(spec.granularity, PerToken) and spec.scale is not None and spec.scale.when == "static":
        raise _impossible(
            "a scale per token cannot be static: it is found anew for each token", hint="write when: dynamic"
        )
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 1
    if spec.format.sub_block and size % spec.format.sub_block:
        raise _impossible(f"{spec.element} needs groups of an even size", hint="write granularity: {group: 16}")


def _impossible(what: str, *, hint: str = "") -> ConfigError:
    return ConfigError(what, hint=hint, kind="E-FORMAT-IMPOSSIBLE")


def _check_scale(spec: TensorSpec) -> None:
    scale = spec.scale
    assert scale is not None
    if (scale.rule in EXPONENT_RULES) != (scale.dtype == "e8m0"):
        raise _impossible(
            f"scale.rule '{scale.rule}' does not fit scale.dtype '{scale.dtype}'",
            hint=f"use {', '.join(EXPONENT_RULES)} with e8m0, and the other rules with other dtypes",
        )
    if scale.rule == "half_range" and spec.format.kind != "integer":
        raise _impossible("scale.rule 'half_range' works only for integers", hint="write rule: absmax")
    if scale.dtype == "e8m0" and spec.format.kind == "integer" and not spec.format.fraction:
        raise _impossible(
            f"no e8m0 scale is defined for {spec.element}", hint="use element mxint8, or scale dtype pow2"
        )
    if spec.format.fraction and scale.dtype != "e8m0":
        raise _impossible(
            f"{spec.element} has a shared exponent as its scale", hint="leave scale.dtype out, or write e8m0"
        )
    if scale.rule == "fit" and spec.format.kind != "integer":
        raise _impossible("scale.rule 'fit' works only for integers", hint="write rule: ceil, or rceil")
    if scale.rule in SEARCH_RULES and (scale.dtype, spec.element, scale.when) != ("e4m3", "fp4_e2m1", "static"):
        raise _impossible(
            f"scale.rule '{scale.rule}' works only for static e4m3 scales of fp4_e2m1", hint="write rule: absmax"
        )
    if scale.rule in SEARCH_RULES and not isinstance(spec.granularity, PerGroup):
        raise _impossible(f"scale.rule '{scale.rule}' works only for groups", hint="write granularity: {group: 16}")
    if scale.rule in SEARCH_RULES and spec.observer != MIN_MAX:
        raise _impossible(
            f"scale.rule '{scale.rule}' searches the scale itself, without an observer", hint="leave the observer out"
        )
    if scale.dtype == "e4m3" and scale.global_scale is None:
        raise _impossible("an e4m3 scale needs a global scale", hint="add global_scale: {dtype: f32}")
    if scale.global_scale is not None and (
        scale.global_scale.dtype != "f32" or scale.global_scale.global_scale is not None
    ):
        raise _impossible(
            "scale.global_scale must be one f32 scale", hint="write global_scale: {dtype: f32, when: static}"
        )
    if scale.global_scale is not None and scale.constant_amax is not None:
        raise _impossible("scale.constant_amax does not work under a global scale", hint="write it in global_scale")
    if scale.global_scale is not None and scale.dtype not in {"e4m3", "e5m3"}:
        raise _impossible(f"a global scale works only over e4m3 or e5m3 scales, not over {scale.dtype}")
    if spec.observer.name == "headroom" and not (
        (spec.element, scale.dtype, scale.when, spec.group_size) == ("fp4_e2m1", "e4m3", "dynamic", 16)
        and scale.global_scale is not None
        and scale.global_scale.when == "static"
    ):
        raise _impossible(
            "observer 'headroom' works only for inputs in nvfp4",
            hint="use dynamic e4m3 scales under a static global one",
        )
    if scale.minimum is not None and scale.dtype not in {"f32", "f16", "bf16", "model"}:
        raise _impossible(
            f"scale.minimum does not work with {scale.dtype} scales", hint="set it on a plain or a global scale"
        )
    if scale.dtype in {"e8m0", "e4m3", "e5m3"} and spec.group_size is None:
        raise _impossible(f"{scale.dtype} scales work only for groups", hint="write granularity: {group: 32}")


def _check_integer_words(spec: TensorSpec) -> None:
    """Refuses zero points, rounding and narrow ranges where they have no meaning or no scale that fits."""
    plain = spec.format.kind == "integer" and not spec.format.fraction
    if not spec.symmetric and (not plain or spec.narrow):
        raise _impossible(
            f"zero_point '{spec.zero_point}' works only for unsigned integers", hint="write element: uint4, or uint8"
        )
    if not spec.symmetric and spec.scale is not None and SCALE_FORMATS[spec.scale.dtype].bits == 8:
        raise _impossible(
            f"a zero point does not work with {spec.scale.dtype} scales", hint="write scale: {dtype: f32}, or f16, bf16"
        )
    if spec.symmetric and spec.format.kind == "integer" and spec.format.minimum >= 0:
        raise _impossible(
            f"{spec.element} without a zero point cannot hold negative values", hint="write zero_point: int"
        )
    if not spec.symmetric and spec.scale is not None and spec.scale.constant_amax is not None:
        raise _impossible("constant_amax gives no range for a zero point", hint="remove one of the two")
    if spec.rounding != "half_even" and not plain:
        raise _impossible(
            f"rounding '{spec.rounding}' works only for integers", hint="leave it out; the default is half_even"
        )
    if spec.narrow and (not plain or spec.format.minimum >= 0):
        raise _impossible("narrow works only for signed integers", hint="leave it out")


def _check_chain(spec: TensorSpec) -> None:
    if spec.then is None:
        return
    if spec.then.then is not None:
        raise ConfigError("a chain has two stages, and this one has more", hint="write one 'then'", kind="E-CHAIN")
    if spec.then.scale is None:
        raise ConfigError(
            f"the second stage {spec.then.element} has no scale", hint="use an integer or fp8 element", kind="E-CHAIN"
        )
    if any(stage.format.sub_block for stage in spec.stages):
        raise ConfigError("mx6 and mx9 cannot be part of a chain", kind="E-CHAIN")
    if spec.stored == "last" and spec.granularity not in (PerTensor(), PerChannel(0)):
        raise ConfigError(
            "with 'stored: last' the first stage has one scale per tensor or output channel", kind="E-CHAIN"
        )
