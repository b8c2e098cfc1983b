"""Specs <-> the spec dictionaries of AMD Quark's `quantization_config` (release 0.13, printed by running it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.dialects import _shared as shared
from quarkcli.dialects._shared import Pair
from quarkcli.errors import ModelError
from quarkcli.spec import TensorSpec

Specs = dict[str, Any] | list[dict[str, Any]] | None

# Every key is always present; readers compare the dictionaries of q, k and v key by key.
_BLANK: dict[str, Any] = {
    "dtype": None,
    "is_dynamic": False,
    "qscheme": None,
    "ch_axis": None,
    "group_size": None,
    "block_size": None,
    "symmetric": True,
    "round_method": "half_even",
    "scale_type": "float32",
    "scale_format": None,
    "scale_calculation_mode": None,
    "mx_element_dtype": None,
    "observer_cls": None,
    "is_scale_quant": False,
    "zero_point_type": "int32",
    "enable_buffer_reuse": False,
    "max_input_numel": 4194304,
}
_OBSERVERS = {
    "per_tensor": "PerTensorMinMaxObserver",
    "per_channel": "PerChannelMinMaxObserver",
    "per_group": "PerGroupMinMaxObserver",
}
_DTYPES = {"int4": "int4", "int8": "int8", "fp8": "fp8_e4m3"}
_SHORT = {dtype: short for short, dtype in _DTYPES.items()}
# Quark has no word for the exponent rule `rceil`; readers of stored exponents do not ask how they were found.
_MODES = ("even", "floor", "ceil")


def layer(pair: Pair | None, output: TensorSpec | None = None) -> dict[str, Any]:
    """The `LAYER` dictionary of a (weight, input) pair, and of an output where the cache is quantized."""
    spec, source = pair if pair is not None else (None, None)
    return {
        "weight": None if spec is None else _weight(spec),
        "input_tensors": None if source is None else _input(source),
        "output_tensors": None if output is None else _input(output),
        "bias": None,
        "target_device": None,
    }


def _weight(spec: TensorSpec) -> Specs:
    kind = shared.weight_kind(spec) or ""
    if kind in ("mxfp4", "nvfp4"):
        return _fp4(kind, spec, dynamic=False)
    short, where = kind.split()
    qscheme = f"per_{where}"
    return {
        **_BLANK,
        "dtype": _DTYPES[short],
        "qscheme": qscheme,
        "ch_axis": {"channel": 0, "group": -1}.get(where),
        "group_size": spec.group_size,
        "scale_type": "float" if spec.scale.dtype == "model" else _SCALE_TYPES[spec.scale.dtype],
        "observer_cls": _OBSERVERS[qscheme],
    }


_SCALE_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def _input(spec: TensorSpec) -> Specs:
    kind = shared.input_kind(spec) or ""
    if kind in ("mxfp4", "nvfp4"):
        return _fp4(kind, spec, dynamic=True)
    short, how = kind.split()
    # Quark calls one scale per token `per_channel` along axis 1.
    qscheme = "per_channel" if how == "token" else "per_tensor"
    return {
        **_BLANK,
        "dtype": _DTYPES[short],
        "is_dynamic": how != "static",
        "qscheme": qscheme,
        "ch_axis": 1 if how == "token" else None,
        "observer_cls": _OBSERVERS[qscheme],
    }


def _fp4(kind: str, spec: TensorSpec, *, dynamic: bool) -> Specs:
    group = {
        **_BLANK,
        "dtype": "fp4",
        "is_dynamic": dynamic,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": spec.group_size,
        "symmetric": None,
        "observer_cls": "PerBlockMXObserver",
    }
    if kind == "nvfp4":
        outer = {**_BLANK, "dtype": "fp8_e4m3", "qscheme": "per_tensor", "observer_cls": _OBSERVERS["per_tensor"]}
        return [{**group, "scale_format": "float32"}, {**outer, "is_scale_quant": True}]
    mode = spec.scale.rule if spec.scale.rule in _MODES else "even"
    return {**group, "scale_type": "float", "scale_format": "e8m0", "scale_calculation_mode": mode}


def read_weight(module: str, specs: Specs, scale: str) -> TensorSpec:
    """The spec of a weight; `scale` is the safetensors dtype of its scale. Raises ModelError for one not held here."""
    fp4 = _read_fp4(specs, dynamic=False)
    if fp4 is not None:
        return shared.weight_spec(fp4, rule=_mode(specs))
    spec = _single(specs)
    short, qscheme = _SHORT.get(str(spec.get("dtype"))), spec.get("qscheme")
    where = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}.get(str(qscheme))
    plain = spec.get("symmetric") is True and not spec.get("is_dynamic") and spec.get("ch_axis") in (None, 0, -1)
    grouped = short == "int4"
    if short is None or where is None or not plain or grouped != (where == "group" and bool(spec.get("group_size"))):
        raise ModelError(f"weights of {_words(specs)} are not read by this version", where=module)
    dtype = shared.scale_dtype(short, scale)
    return shared.weight_spec(f"{short} {where}", dtype, spec.get("group_size"))


def read_input(module: str, specs: Specs) -> TensorSpec | None:
    """The spec of an input or output, None when it is not quantized. Raises ModelError for one not held here."""
    if specs is None:
        return None
    fp4 = _read_fp4(specs, dynamic=True)
    if fp4 is not None:
        return shared.input_spec(fp4, _mode(specs))
    spec = _single(specs)
    short = _SHORT.get(str(spec.get("dtype")))
    how = {("per_tensor", False): "static", ("per_tensor", True): "tensor", ("per_channel", True): "token"}.get(
        (str(spec.get("qscheme")), bool(spec.get("is_dynamic")))
    )
    if short not in ("fp8", "int8") or how is None or spec.get("symmetric") is not True:
        raise ModelError(f"inputs of {_words(specs)} are not read by this version", where=module)
    return shared.input_spec(f"{short} {how}")


def _stages(specs: Specs) -> list[Mapping[str, Any]]:
    return list(specs) if isinstance(specs, list) else [specs] if specs else []


def _single(specs: Specs) -> Mapping[str, Any]:
    stages = _stages(specs)
    return stages[0] if len(stages) == 1 else {}


def _mode(specs: Specs) -> str | None:
    mode: str | None = _stages(specs)[0].get("scale_calculation_mode")
    return mode


def _read_fp4(specs: Specs, *, dynamic: bool) -> str | None:
    """`mxfp4`, `nvfp4` or None."""
    stages = _stages(specs)
    if not stages or stages[0].get("dtype") != "fp4" or stages[0].get("qscheme") != "per_group":
        return None
    if bool(stages[0].get("is_dynamic")) != dynamic:
        return None
    size, scale = stages[0].get("group_size"), stages[0].get("scale_format")
    if len(stages) == 1 and size == 32 and scale == "e8m0" and _mode(specs) in (None, *_MODES):
        return "mxfp4"
    outer = stages[-1]
    two_level = len(stages) == 2 and outer.get("dtype") == "fp8_e4m3" and outer.get("qscheme") == "per_tensor"
    return "nvfp4" if two_level and size == 16 and not outer.get("is_dynamic") else None


def _words(specs: Specs) -> str:
    keys = ("dtype", "qscheme", "group_size", "symmetric", "scale_format")
    stages = [
        " ".join(f"{key}={stage.get(key)}" for key in keys if stage.get(key) is not None) for stage in _stages(specs)
    ]
    return " over ".join(stages) or "nothing"
