"""Turns specs into QuantizationArgs of compressed-tensors 0.20 (`quantization/quant_args.py`) and back. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects._ct_kinds import INPUTS, WEIGHTS
from quarkcli.errors import ModelError
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, PerToken, TensorSpec

# Scales that are not plain floats are named; fp4, fp6 and the 8-bit floats of MX are told from others by it.
_SCALE_DTYPES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}


def arguments(spec: TensorSpec, *, weight: bool) -> dict[str, Any]:
    """Returns the QuantizationArgs of a spec; keys in the library's own order."""
    assert spec.scale is not None
    dynamic: bool | str = not weight and spec.scale.when == "dynamic"
    found: dict[str, Any] = {
        "num_bits": spec.format.bits,
        "type": "int" if spec.format.kind == "integer" else "float",
        "strategy": _strategy(spec),
        "group_size": spec.granularity.size if isinstance(spec.granularity, PerGroup) else None,
        "symmetric": spec.symmetric,
        # Under a static global scale only the block scales are dynamic.
        "dynamic": "local" if dynamic and spec.is_two_level else dynamic,
    }
    if isinstance(spec.granularity, PerTile):
        found["block_structure"] = [spec.granularity.rows, spec.granularity.cols]
    if spec.scale.dtype in _SCALE_DTYPES:
        found["scale_dtype"] = _SCALE_DTYPES[spec.scale.dtype]
    return found


def _strategy(spec: TensorSpec) -> str:
    assert spec.scale is not None
    match spec.granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "channel"
        case PerToken():
            return "token"
        case PerTile():
            return "block"
    return "group" if spec.scale.global_scale is None else "tensor_group"


def scheme_group(
    weight: TensorSpec, source: TensorSpec | None, output: TensorSpec | None, format_: str, targets: list[str]
) -> dict[str, Any]:
    """Returns one config group; `format_` is the compressor's name."""
    return {
        "targets": targets,
        "weights": arguments(weight, weight=True),
        "input_activations": None if source is None else arguments(source, weight=False),
        "output_activations": None if output is None else arguments(output, weight=False),
        "format": format_,
    }


def read_weight(module: str, given: Mapping[str, Any], scale: str) -> TensorSpec:
    """Returns the spec of a weight; `scale` is the safetensors dtype of its scale.

    Raises ModelError for a spec that the dialect does not hold.
    """
    spec = _weight(json.dumps(given), scale)
    if spec is not None:
        return spec
    raise ModelError(f"this version cannot read weights of {_words(given)}", where=module, kind="E-SOURCE-FORMAT")


@cache
def _weight(given: str, scale: str) -> TensorSpec | None:
    """Returns the spec of arguments in JSON: all weights of a group have the same ones."""
    found = json.loads(given)
    dtype = kinds.scale_dtype(str(found.get("type", "int")), scale)
    specs = (kinds.weight_spec(kind, dtype, found.get("group_size")) for kind in WEIGHTS)
    return next((spec for spec in specs if _same(found, arguments(spec, weight=True))), None)


def read_input(module: str, given: Mapping[str, Any] | None, what: str = "inputs") -> TensorSpec | None:
    """Returns the spec of an input or output, None when it is not quantized.

    Raises ModelError for a spec that the dialect does not hold.
    """
    if not given:
        return None
    spec = _input(json.dumps(given))
    if spec is not None:
        return spec
    raise ModelError(f"this version cannot read {what} of {_words(given)}", where=module, kind="E-SOURCE-FORMAT")


@cache
def _input(given: str) -> TensorSpec | None:
    found = json.loads(given)
    specs = _inputs(found.get("group_size"))
    return next((spec for spec in specs if _same(found, arguments(spec, weight=False))), None)


def _inputs(group: int | None) -> Iterable[TensorSpec]:
    for kind in INPUTS:
        # No scale is stored; in groups of integers it has the model's dtype, as that of their weights.
        integers = kind.endswith("group") and kind.startswith("int")
        spec = kinds.input_spec(kind, group=group, scale_dtype="model" if integers else "f32")
        if spec is not None:
            yield spec


def _same(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """True when `given`, with the library's defaults, says what `wanted` says; a scale dtype may be left out."""
    group = given.get("group_size")
    group = None if group == -1 else group
    usual = "tensor" if given.get("group_size") is None else "channel" if group is None else "group"
    full = {
        "num_bits": given.get("num_bits", 8),
        "type": given.get("type", "int"),
        "strategy": given.get("strategy") or usual,
        "group_size": group,
        "symmetric": given.get("symmetric", True),
        "dynamic": given.get("dynamic", False),
        "block_structure": given.get("block_structure"),
    }
    return full == {"block_structure": None} | {key: wanted[key] for key in wanted if key != "scale_dtype"}


def _words(given: Mapping[str, Any]) -> str:
    keys = ("strategy", "group_size", "block_structure", "symmetric", "dynamic")
    found = ", ".join(f"{key} {given[key]}" for key in keys if given.get(key) is not None)
    return f"{given.get('type', 'int')}{given.get('num_bits', 8)}, {found}"
