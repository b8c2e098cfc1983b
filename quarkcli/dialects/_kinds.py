"""Gives the specs that dialects hold short names, and turns names back into specs. Torch-free.

`<short> <where>` for numbers on a plain float scale: `int4 group`, `fp8 tensor`, `uint8 channel`, `fp8 tile`; one name
for blocks on an 8-bit scale: `mxfp4`, `nvfp4`, `mx6`; `<first> then <second>` for a chain whose last codes are stored;
`fp16` and `bf16` for casts. Names say how a tensor is stored and read: group sizes, scale rules and the rounding of a
weight are no part of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import NamedTuple, cast

from quarkcli.spec import (
    ELEMENTS,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    Rule,
    ScaleSpec,
    TensorSpec,
    When,
)

Pair = tuple[TensorSpec, TensorSpec | None]
Kinds = tuple[str, str]

TILE = PerTile(128, 128)
# Dynamic groups of 8-bit floats come in one size; those of integers in any.
FP8_INPUT_GROUP = 128
_PLAIN_SCALES = ("f32", "f16", "bf16", "model", "pow2")
_SCALE_TEXTS = {
    "f16": "F16",
    "bf16": "BF16",
    "f32": "F32",
    "pow2": "F32",
    "e8m0": "U8",
    "e5m3": "U8",
    "e4m3": "F8_E4M3",
}
_SHORT = {"fp8_e4m3": "fp8"}
_ELEMENT = {short: element for element, short in _SHORT.items()}
_THEN = " then "


class Block(NamedTuple):
    """A format of blocks on an 8-bit scale; `group` None: of any size. `rule`: the usual one."""

    element: str
    scale: str
    group: int | None
    two_level: bool
    rule: Rule


BLOCKS: dict[str, Block] = {
    "mxfp4": Block("fp4_e2m1", "e8m0", 32, False, "even"),
    "mxfp6_e2m3": Block("fp6_e2m3", "e8m0", 32, False, "even"),
    "mxfp6_e3m2": Block("fp6_e3m2", "e8m0", 32, False, "even"),
    "mxfp8": Block("fp8_e4m3", "e8m0", 32, False, "rceil"),
    "mxfp8_e5m2": Block("fp8_e5m2", "e8m0", 32, False, "rceil"),
    "mxint8": Block("mxint8", "e8m0", 32, False, "even"),
    "mx6": Block("mx6", "e8m0", None, False, "floor"),
    "mx9": Block("mx9", "e8m0", None, False, "floor"),
    "bfp16": Block("bfp16", "e8m0", None, False, "fit"),
    "nvfp4": Block("fp4_e2m1", "e4m3", 16, True, "absmax"),
    "amdfp4": Block("fp4_e2m1", "e5m3", None, False, "absmax"),
    "amdfp4_global": Block("fp4_e2m1", "e5m3", None, True, "absmax"),
}

# Formats with a float32 scale of the whole tensor over those of the blocks.
TWO_LEVEL = frozenset(name for name, block in BLOCKS.items() if block.two_level)


def weight_kind(spec: TensorSpec) -> str | None:
    """Returns the short name of a weight spec, None for one that has none."""
    if spec.then is not None:
        first, second = weight_kind(replace(spec, then=None, stored="first")), weight_kind(spec.then)
        return f"{first}{_THEN}{second}" if first and second and spec.stored == "last" else None
    if spec.scale is None:
        return spec.element
    if spec.scale.when != "static":
        return None
    block = _block_kind(spec)
    if block is not None or not _is_plain(spec):
        return block
    match spec.granularity:
        case PerTensor():
            return f"{_short(spec)} tensor"
        case PerChannel(0):
            return f"{_short(spec)} channel"
        case PerGroup():
            return f"{_short(spec)} group"
    return f"{_short(spec)} tile" if spec.granularity == TILE else None


def input_kind(spec: TensorSpec | None) -> str | None:
    """Returns the short name of an activation spec: `none`, `fp8 static`, `fp8 tensor`, `fp8 token`, `mxfp4` ..."""
    if spec is None:
        return "none"
    scale = spec.scale
    if spec.then is not None or spec.rounding != "half_even" or spec.narrow:
        return None
    if scale is None:
        return spec.element
    if scale.when == "dynamic" and (scale.minimum is not None or scale.constant_amax is not None):
        return None
    block = _block_kind(spec) if scale.when == "dynamic" else None
    if block is not None or not _is_plain(spec):
        return block
    short = _short(spec)
    match spec.granularity, scale.when:
        case PerTensor(), "static":
            return f"{short} static"
        case PerTensor(), "dynamic":
            return f"{short} tensor"
        case PerToken(), "dynamic":
            return f"{short} token"
        case PerGroup(size), "dynamic" if spec.format.kind == "integer" or size == FP8_INPUT_GROUP:
            return f"{short} group"
    return None


def _short(spec: TensorSpec) -> str:
    return _SHORT.get(spec.element, spec.element)


def _is_plain(spec: TensorSpec) -> bool:
    """True for a number on one plain float scale.

    Unsigned integers have whole zero points, and nothing else has any.
    """
    element, scale = spec.format, spec.scale
    assert scale is not None
    number = not element.fraction and (element.kind == "integer" or element.bits == 8)
    unsigned = element.kind == "integer" and element.minimum == 0
    zero_points = spec.zero_point == ("int" if unsigned else "none")
    return number and zero_points and scale.dtype in _PLAIN_SCALES and scale.global_scale is None


def _block_kind(spec: TensorSpec) -> str | None:
    scale = spec.scale
    if scale is None or not spec.symmetric or spec.group_size is None or isinstance(spec.granularity, PerTile):
        return None
    # Two levels: the outer scale is a static float32 on its own.
    over = scale.global_scale
    if over is not None and (over.dtype, over.when, over.global_scale) != ("f32", "static", None):
        return None
    for name, block in BLOCKS.items():
        same = (block.element, block.scale, block.two_level) == (spec.element, scale.dtype, over is not None)
        if same and block.group in (None, spec.group_size):
            return name
    return None


def weight_spec(kind: str, scale_dtype: str = "f32", group: int | None = None, rule: str | None = None) -> TensorSpec:
    """Returns the spec that `weight_kind` calls `kind`.

    scale_dtype   of plain scales; all stages of a chain
    group         size of groups where the name does not fix it
    rule          None: the usual one of the format; a chain has no other
    """
    if _THEN in kind:
        first, second = kind.split(_THEN, 1)
        return replace(weight_spec(first, scale_dtype), then=weight_spec(second, scale_dtype, group), stored="last")
    return _spec(kind, scale_dtype, group, rule, "static")


def input_spec(
    kind: str, rule: str | None = None, group: int | None = None, scale_dtype: str = "f32"
) -> TensorSpec | None:
    """Returns the spec that `input_kind` calls `kind`; the other arguments as in `weight_spec`."""
    if kind == "none":
        return None
    return _spec(kind, scale_dtype, group, rule, "static" if kind.endswith(" static") else "dynamic")


def _spec(kind: str, scale_dtype: str, group: int | None, rule: str | None, when: When) -> TensorSpec:
    block = BLOCKS.get(kind)
    if block is not None:
        over = ScaleSpec("f32") if block.two_level else None
        scale = ScaleSpec(block.scale, cast(Rule, rule or block.rule), when, over)
        return TensorSpec(block.element, PerGroup(block.group or group or 0), scale)
    short, _, where = kind.partition(" ")
    element = ELEMENTS[_ELEMENT.get(short, short)]
    if element.kind == "cast":
        return TensorSpec(element.name, PerTensor(), None)
    usual: Rule = "half_range" if element.kind == "integer" else "absmax"
    scale = ScaleSpec(scale_dtype, cast(Rule, rule or usual), when)
    unsigned = element.kind == "integer" and element.minimum == 0
    fixed = FP8_INPUT_GROUP if when == "dynamic" and element.kind == "float" else group
    return TensorSpec(element.name, _granularity(where, fixed), scale, zero_point="int" if unsigned else "none")


def _granularity(where: str, group: int | None) -> Granularity:
    match where:
        case "channel":
            return PerChannel(0)
        case "token":
            return PerToken()
        case "group":
            return PerGroup(group or 0)
    return TILE if where == "tile" else PerTensor()


def scale_dtype(number: str, text: str) -> str:
    """Returns the `ScaleSpec.dtype` of a stored plain scale; a 16-bit scale of an integer is in the model's dtype."""
    if text == "F32":
        return "f32"
    return "model" if number.startswith(("int", "uint")) else text.lower()


def scale_text(spec: TensorSpec, model: str) -> str:
    """Returns the safetensors dtype of a spec's scale; `model` is the source tensor's."""
    assert spec.scale is not None
    return _SCALE_TEXTS.get(spec.scale.dtype, model)


def pairs(weights: Iterable[str], inputs: Iterable[str]) -> frozenset[Kinds]:
    """Returns every weight with every input."""
    return frozenset(product(weights, inputs))


def kinds_of(pair: Pair) -> Kinds | None:
    weight, source = weight_kind(pair[0]), input_kind(pair[1])
    return (weight, source) if weight and source else None
