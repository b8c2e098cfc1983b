"""Turns specs into the dictionaries of AMD Quark's `quantization_config` (release 0.13) and back.

A spec is one dictionary per stage, and one more (`is_scale_quant`) for a scale over the scales of the stage before; two
or more make a list. Facts that Quark has no word for (a rule such as `rceil`, a chain whose first codes are stored, an
observer's parameters) stand as the native cfg under `tensor_spec` in the first dictionary, beside the nearest words
that Quark has. No reader of Quark's looks at that key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.errors import ConfigError, ModelError
from quarkcli.recipe.attributes import quark
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.spec import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)

Entry = dict[str, Any]
Specs = Entry | list[Entry] | None

OWN_KEY = quark.OWN_KEY

# Every key is always present; readers compare the dictionaries of q, k and v key by key.
_NOTHING: Entry = {
    "dtype": None,
    "is_dynamic": None,
    "qscheme": None,
    "ch_axis": None,
    "group_size": None,
    "block_size": None,
    "symmetric": None,
    "round_method": None,
    "scale_type": None,
    "scale_format": None,
    "scale_calculation_mode": None,
    "mx_element_dtype": None,
    "observer_cls": None,
    "is_scale_quant": False,
    "zero_point_type": "int32",
    "enable_buffer_reuse": False,
    "max_input_numel": 4194304,
}
_DTYPES = {element: dtype for dtype, element in quark.DTYPES.items()}
_MX_ELEMENTS = {element: dtype for dtype, element in quark.MX_ELEMENTS.items()}
_SCALE_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "model": "float", "pow2": "pof2"}
# The dtype of the second dictionary of a scale over scales.
_BLOCK_DTYPES = {scale: dtype for dtype, scale in quark.BLOCK_SCALES.items()}
_BLOCK_OBSERVER = "PerBlockMXObserver"
_OBSERVERS = {
    "per_tensor": "PerTensorMinMaxObserver",
    "per_channel": "PerChannelMinMaxObserver",
    "per_group": "PerGroupMinMaxObserver",
    "per_block": "PerBlock2DMinMaxObserver",
}
_POWER_OBSERVERS = {"per_tensor": "PerTensorPowOf2MinMaxObserver", "per_channel": "PerChannelPowOf2MinMaxObserver"}
_TENSOR_OBSERVERS = {
    "percentile": "PerTensorPercentileObserver",
    "histogram": "PerTensorHistogramObserver",
    "mse": "PerTensorMSEObserver",
}


# --- writing ---------------------------------------------------------------------------------------------------------


def specs_of(spec: TensorSpec | None, *, activation: bool) -> Specs:
    """Returns the dictionary, or the list of them, that says `spec`; `activation`: of an input or output."""
    if spec is None:
        return None
    entries = [entry for stage in spec.stages for entry in _stage(stage)]
    found = entries[0] if len(entries) == 1 else entries
    try:
        same = read_spec("", found, activation=activation) == spec
    except ModelError:
        same = False
    if not same:
        entries[0][OWN_KEY] = spec_to_yaml(spec)
    return found


def _stage(stage: TensorSpec) -> list[Entry]:
    """Returns the dictionary of one stage, and that of the scale over its scales."""
    element, scale = stage.format, stage.scale
    if scale is None:
        return [{**_NOTHING, "dtype": _DTYPES[element.name], "observer_cls": quark.PLACEHOLDER}]
    if element.fraction:
        return [_shared_exponent(stage, scale)]
    entry = {**_NOTHING, **_where(stage.granularity), **_scale(stage, scale)}
    entry |= {
        "dtype": _DTYPES.get(element.name, element.name),
        "is_dynamic": scale.when == "dynamic",
        "symmetric": None if _is_block(stage) else stage.symmetric,
        "round_method": stage.rounding,
        "zero_point_type": "float32" if stage.zero_point == "float" else "int32",
        "observer_cls": _observer(stage, entry["qscheme"]),
    }
    return [entry] if scale.global_scale is None else [entry, _over(scale.dtype, scale.global_scale)]


def _shared_exponent(stage: TensorSpec, scale: ScaleSpec) -> Entry:
    """Returns the dictionary of mx6, mx9, bfp16 and mxint8.

    Quark leaves its keys for granularity, rounding and time empty.
    """
    wrapped = _MX_ELEMENTS.get(stage.element)
    return {
        **_NOTHING,
        "dtype": quark.MX if wrapped else stage.element,
        "mx_element_dtype": wrapped,
        "ch_axis": -1,
        "group_size": stage.group_size,
        "scale_calculation_mode": scale.rule if wrapped and scale.rule in quark.MODES else "even",
    }


def _where(granularity: Granularity) -> Entry:
    match granularity:
        case PerTensor():
            return {"qscheme": "per_tensor"}
        case PerToken():  # Quark's name for the token axis of [batch, token, feature]
            return {"qscheme": "per_channel", "ch_axis": 1}
        case PerChannel(axis):
            return {"qscheme": "per_channel", "ch_axis": -axis}
        case PerGroup(size):
            return {"qscheme": "per_group", "ch_axis": -1, "group_size": size}
        case PerTile(rows, cols):
            return {"qscheme": "per_block", "block_size": [rows, cols]}


def _is_block(stage: TensorSpec) -> bool:
    """True for specs that Quark's block observer takes: groups of small floats, or any floats under 8-bit scales."""
    assert stage.scale is not None
    small = stage.format.bits < 8 or stage.scale.dtype not in _SCALE_TYPES
    return stage.format.kind == "float" and small and isinstance(stage.granularity, PerGroup)


def _scale(stage: TensorSpec, scale: ScaleSpec) -> Entry:
    mode = (scale.rule if scale.rule in quark.MODES else "even") if scale.dtype == "e8m0" else None
    if scale.dtype == "e8m0":
        kind = "float" if _is_block(stage) else quark.E8M0_TYPE
        return {"scale_type": kind, "scale_format": "e8m0", "scale_calculation_mode": mode}
    if scale.dtype == "e5m3" and scale.global_scale is None:
        return {"scale_type": quark.E5M3_TYPE, "scale_format": "e5m3"}
    return {
        "scale_type": _SCALE_TYPES.get(scale.dtype, "float32"),
        "scale_format": "float32" if _is_block(stage) else None,
    }


def _observer(stage: TensorSpec, qscheme: str) -> str:
    assert stage.scale is not None
    if _is_block(stage):
        return _BLOCK_OBSERVER
    if qscheme == "per_tensor" and stage.observer.name in _TENSOR_OBSERVERS:
        return _TENSOR_OBSERVERS[stage.observer.name]
    known = _POWER_OBSERVERS if stage.scale.dtype == "pow2" and qscheme in _POWER_OBSERVERS else _OBSERVERS
    return known[qscheme]


def _over(dtype: str, over: ScaleSpec) -> Entry:
    """Returns the second dictionary: one scale per tensor over block scales of `dtype`."""
    return {
        **_NOTHING,
        "dtype": _BLOCK_DTYPES[dtype],
        "is_dynamic": over.when == "dynamic",
        "qscheme": "per_tensor",
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": _SCALE_TYPES[over.dtype],
        "observer_cls": _OBSERVERS["per_tensor"],
        "is_scale_quant": True,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def read_spec(module: str, specs: Any, *, activation: bool) -> TensorSpec | None:
    """Returns the spec that dictionaries say, None for null.

    Raises ModelError, at `module`, for a spec that the dialect does not hold.
    """
    if not specs:
        return None
    entries = specs if isinstance(specs, list) else [specs]
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise ModelError(
            f"a spec is a dictionary or a list of them, not {specs!r}", where=module, kind="E-SOURCE-CONFIG"
        )
    # Later releases may write more keys.
    known = [{key: value for key, value in entry.items() if key in (*quark.FIELDS, OWN_KEY)} for entry in entries]
    try:
        return quark.to_spec(known, weight=not activation)
    except ConfigError as error:
        slot = "activations" if activation else "weights"
        what = f"this version cannot read {slot} of {_words(entries)}: {error.what}"
        raise ModelError(what, where=module, kind="E-SOURCE-FORMAT") from error


def _words(entries: list[Entry]) -> str:
    keys = ("dtype", "mx_element_dtype", "qscheme", "group_size", "symmetric", "scale_format")
    texts = [" ".join(f"{key}={entry.get(key)}" for key in keys if entry.get(key) is not None) for entry in entries]
    return " and ".join(text or "nothing" for text in texts)
