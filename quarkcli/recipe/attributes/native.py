"""The native vocabulary of a `cfg`: the fields of TensorSpec in YAML.

    element: fp4_e2m1
    granularity: {group: 16}
    scale: {dtype: e4m3, rule: absmax, when: dynamic, over: {dtype: f32, when: static}}

Left out, `scale.dtype` is the model's dtype for integers of 4 bits and less and float32 otherwise; `scale.rule` is
`half_range` for integers, `even` for e8m0 and `absmax` otherwise; `scale.when` is `static`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from quarkcli.errors import ConfigError, near_misses
from quarkcli.spec import (
    ELEMENTS,
    SCALE_FORMATS,
    Element,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Rule,
    ScaleSpec,
    TensorSpec,
)

_SPEC_KEYS = ("element", "granularity", "scale")
_SCALE_KEYS = ("dtype", "rule", "when", "over", "constant_amax")
_E8M0_RULES = ("even", "floor", "ceil", "rceil")


def to_spec(cfg: Mapping[str, Any]) -> TensorSpec:
    """The TensorSpec of a native cfg. Raises ConfigError naming the key, without a place (the caller adds it)."""
    _only(cfg, _SPEC_KEYS, "cfg")
    if "element" not in cfg:
        raise ConfigError("cfg has no 'element'", hint=f"one of {', '.join(ELEMENTS)}")
    element = ELEMENTS[_choice(cfg["element"], ELEMENTS, "element")]
    granularity = _granularity(cfg.get("granularity", "tensor"))
    scale = _scale(cfg.get("scale") or {}, element)
    spec = TensorSpec(element.name, granularity, scale)
    _check(spec)
    return spec


def _only(mapping: Any, allowed: tuple[str, ...], what: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{what} must be a mapping, not {type(mapping).__name__}")
    for key in mapping:
        if key not in allowed:
            close = near_misses(str(key), allowed)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(allowed)}"
            raise ConfigError(f"unknown key '{key}' in {what}", hint=hint)


def _choice(value: Any, known: Any, key: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    close = near_misses(str(value), known)
    hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(known)}"
    raise ConfigError(f"{key} '{value}' is unknown", hint=hint)


def _positive(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(f"{key} must be a positive whole number, not {value!r}")


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
        if key == "channel" and size == 0 and not isinstance(size, bool):
            return PerChannel(0)
        if key == "tile" and isinstance(size, list) and len(size) == 2:
            return PerTile(_positive(size[0], "granularity.tile"), _positive(size[1], "granularity.tile"))
    raise ConfigError(
        f"granularity {value!r} is unknown",
        hint="tensor, channel, token, {group: SIZE} or {tile: [ROWS, COLUMNS]}",
    )


def _scale(value: Any, element: Element) -> ScaleSpec:
    _only(value, _SCALE_KEYS, "scale")
    small_integer = element.kind == "integer" and element.bits <= 4
    dtype = _choice(value.get("dtype", "model" if small_integer else "f32"), SCALE_FORMATS, "scale.dtype")
    default_rule = "even" if dtype == "e8m0" else "half_range" if element.kind == "integer" else "absmax"
    rule = _choice(value.get("rule", default_rule), get_args(Rule), "scale.rule")
    when = _choice(value.get("when", "static"), ("static", "dynamic"), "scale.when")
    amax = value.get("constant_amax")
    if amax is not None and (isinstance(amax, bool) or not isinstance(amax, int | float) or not amax > 0):
        raise ConfigError(f"scale.constant_amax must be a positive number, not {amax!r}")
    over = value.get("over")
    outer = _scale(over, ELEMENTS["fp8_e4m3"]) if over is not None else None
    return ScaleSpec(dtype, rule, when, outer, float(amax) if amax is not None else None)  # type: ignore[arg-type]


def _check(spec: TensorSpec) -> None:
    scale = spec.scale
    if (scale.rule in _E8M0_RULES) != (scale.dtype == "e8m0"):
        raise ConfigError(
            f"scale.rule '{scale.rule}' does not fit scale.dtype '{scale.dtype}'",
            hint=f"{', '.join(_E8M0_RULES)} belong to e8m0; half_range and absmax to the others",
        )
    if scale.rule == "half_range" and spec.format.kind != "integer":
        raise ConfigError("scale.rule 'half_range' is for integers", hint="use absmax")
    if scale.dtype == "e4m3" and scale.over is None:
        raise ConfigError("an e4m3 scale needs a global scale", hint="add over: {dtype: f32}")
    if scale.over is not None and (scale.over.dtype != "f32" or scale.over.over is not None):
        raise ConfigError("scale.over must be one f32 scale", hint="over: {dtype: f32, when: static}")
    if scale.over is not None and scale.dtype != "e4m3":
        raise ConfigError(f"a global scale goes over e4m3 scales, not over {scale.dtype}")
    if scale.dtype in {"e8m0", "e4m3"} and spec.group_size is None:
        raise ConfigError(f"{scale.dtype} scales belong to groups", hint="granularity: {group: 32}")
    if isinstance(spec.granularity, PerToken) and scale.when == "static":
        raise ConfigError("a scale per token cannot be static", hint="when: dynamic")
