"""Puts a plan's decisions into plain words: what a weight becomes, and why."""

from __future__ import annotations

from pathlib import PurePath

from quarkcli.plan.model import Plan, Target
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, PerToken, TensorSpec

_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_EXCLUSION = "default exclusion, role "
PROTECTED = "kept by default: "


def how(target: Target) -> str:
    """Returns what a weight becomes: `nvfp4, groups of 16; inputs nvfp4, static scale`."""
    if target.weight is None:
        return stored(target.dtype)
    text = f"{_number(target.weight)}{_where(target.weight)}"
    if target.input is None:
        return text
    when = "static scale" if target.input.is_static else "dynamic scale"
    return f"{text}; inputs {_number(target.input)}, {when}"


def stored(dtype: str) -> str:
    """Returns the words for a tensor that stays as it is."""
    return f"kept {_FLOATS.get(dtype, dtype.lower())}"


def why(plan: Plan, target: Target) -> str:
    """Returns the reason for what a weight becomes: the entry that decided, in its own words."""
    if target.name in plan.carried:
        return "quantized in the original already"
    entry = target.slots["weight"].entry
    if entry is None:
        return "no entry matches it"
    decider = plan.entries[entry]
    origin = reason(str(decider.origin))
    if target.weight is None or origin.startswith(("scheme ", PROTECTED)):
        return origin
    return f"{origin}: {decider.quantizer_path.removesuffix('.weight_quantizer')}"


def why_cached(plan: Plan) -> str:
    """Returns the reason for the scales of attention and its cache: the entries that decided."""
    deciders = (d.entry for module in plan.attention.values() for d in module.slots.values() if d.spec is not None)
    origins = {reason(str(plan.entries[entry].origin)): None for entry in deciders if entry is not None}
    return "; ".join(origins)


def reason(text: str) -> str:
    """Returns the text of an entry's origin for people; a file without its folders."""
    if text.startswith(_EXCLUSION):
        return f"{PROTECTED}{text.partition(': ')[2]}"
    if text == "built-in: deny all":
        return "not asked for"
    place, _, column = text.rpartition(":")
    file, _, line = place.rpartition(":")
    if column.isdecimal() and line.isdecimal():
        return f"{PurePath(file).name} line {line}"
    return text


def _number(spec: TensorSpec) -> str:
    """Returns the name that people know a format by: `nvfp4`, `mxfp6`, `int4`, `fp8`."""
    codes = spec.codes
    if codes.scale is None or codes.format.kind == "integer":
        return codes.element
    name = f"fp{codes.format.bits}"
    if codes.scale.dtype == "e8m0":
        return f"mx{name}"
    return f"nv{name}" if codes.scale.global_scale is not None and codes.format.bits == 4 else name


def _where(spec: TensorSpec) -> str:
    """Returns the values that share a scale."""
    if spec.codes.format.kind == "cast":
        return ""
    match spec.granularity:
        case PerTensor():
            return ", one scale"
        case PerChannel():
            return ", a scale per row"
        case PerToken():
            return ", a scale per token"
        case PerGroup(size):
            return f", groups of {size}"
        case PerTile():
            return ", tiles"
