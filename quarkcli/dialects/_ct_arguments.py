"""Specs <-> the QuantizationArgs of compressed-tensors (`quantization/quant_args.py`, release 0.20). Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.dialects import _shared as shared
from quarkcli.dialects._shared import Pair
from quarkcli.errors import ModelError
from quarkcli.spec import TensorSpec

KV_CACHE: dict[str, Any] = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None, "symmetric": True, "dynamic": False,
}  # fmt: skip
_FP4_SCALES = {"mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}
_DYNAMIC: dict[str, bool | str] = {"mxfp4": True, "nvfp4": "local", "static": False, "token": True, "tensor": True}


def _arguments(spec: TensorSpec, kind: str, dynamic: bool | str) -> dict[str, Any]:
    """The QuantizationArgs of a spec; keys in the library's own order."""
    fp4 = kind in _FP4_SCALES
    where = kind.split()[-1]
    strategy = {"mxfp4": "group", "nvfp4": "tensor_group", "static": "tensor"}.get(where, where)
    arguments: dict[str, Any] = {
        "num_bits": spec.format.bits,
        "type": "int" if spec.format.kind == "integer" else "float",
        "strategy": strategy,
        "group_size": spec.group_size,
        "symmetric": True,
        "dynamic": dynamic,
    }
    return {**arguments, "scale_dtype": _FP4_SCALES[kind]} if fp4 else arguments


def scheme_group(pair: Pair, format_: str, targets: list[str]) -> dict[str, Any]:
    """One config group; `format_` is the compressor's name."""
    spec, source = pair
    inputs = None
    if source is not None:
        kind = shared.input_kind(source) or ""
        inputs = _arguments(source, kind, _DYNAMIC[kind.split()[-1]])
    return {
        "targets": targets,
        "weights": _arguments(spec, shared.weight_kind(spec) or "", False),
        "input_activations": inputs,
        "output_activations": None,
        "format": format_,
    }


def read_weight(module: str, arguments: Mapping[str, Any], scale: str) -> TensorSpec:
    """The spec of a weight; `scale` is the safetensors dtype of its scale. Raises ModelError for one not held here."""
    number = f"{arguments.get('type', 'int')}{arguments.get('num_bits', 8)}"
    group = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("group" if group else "tensor")
    kind = {
        ("int4", "group"): "int4 group",
        ("int4", "channel"): "int4 channel",
        ("int8", "channel"): "int8 channel",
        ("int8", "tensor"): "int8 tensor",
        ("float8", "channel"): "fp8 channel",
        ("float8", "tensor"): "fp8 tensor",
        ("float4", "group"): "mxfp4",
        ("float4", "tensor_group"): "nvfp4",
    }.get((number, strategy))
    fixed = {"mxfp4": 32, "nvfp4": 16, "int4 group": group or -1}.get(kind or "", group)
    if kind is None or arguments.get("symmetric", True) is not True or group != fixed or arguments.get("dynamic"):
        raise ModelError(
            f"weights of {number}, strategy {strategy}, group {group}, symmetric {arguments.get('symmetric', True)} "
            "are not read by this version",
            where=module,
        )
    return shared.weight_spec(kind, shared.scale_dtype(number, scale), group)


def read_input(module: str, arguments: Mapping[str, Any]) -> str:
    """The kind of an input. Raises ModelError for one not held here."""
    number = f"{arguments.get('type', 'int')}{arguments.get('num_bits', 8)}"
    dynamic, strategy, group = arguments.get("dynamic", False), arguments.get("strategy"), arguments.get("group_size")
    short = {"float8": "fp8", "int8": "int8"}.get(number)
    if short and arguments.get("symmetric", True) and (strategy, dynamic) in (("token", True), ("tensor", True)):
        return f"{short} {strategy}"
    if short and arguments.get("symmetric", True) and (strategy or "tensor", dynamic) == ("tensor", False):
        return f"{short} static"
    fp4: dict[tuple[Any, Any, Any], str] = {("group", 32, True): "mxfp4", ("tensor_group", 16, "local"): "nvfp4"}
    if number == "float4" and (strategy, group, dynamic) in fp4:
        return fp4[strategy, group, dynamic]
    raise ModelError(
        f"inputs of {number}, strategy {strategy}, group {group}, dynamic {dynamic} are not read by this version",
        where=module,
    )
