"""Turns the QuantizationArgs of compressed-tensors (release 0.20) into a TensorSpec. Torch-free.

Its rules: integer scales are amax / half of the range, exponents of MX scales round to `even`, and asymmetric integers
are those of the unsigned format of the same width. Scales have the usual dtype of their format; the config is silent on
those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.recipe.attributes import native
from quarkcli.spec import TensorSpec

FIELDS = (
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
)  # fmt: skip
_FLOATS = {8: "fp8_e4m3", 6: "fp6_e3m2", 4: "fp4_e2m1"}
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group")
_E8M0, _E4M3 = "torch.uint8", "torch.float8_e4m3fn"
# How a range was found; `memoryless` observers are those of weights and of dynamic activations.
_OBSERVERS = {
    **dict.fromkeys(("minmax", "memoryless", "memoryless_minmax", "static_minmax"), "min_max"),
    **dict.fromkeys(("mse", "memoryless_mse"), "mse"),
}


def to_spec(args: Mapping[str, Any], *, weight: bool) -> TensorSpec:
    """Returns the TensorSpec of QuantizationArgs. Raises ConfigError naming the field."""
    if not isinstance(args, Mapping):
        raise ConfigError(f"arguments must be a mapping, not {args!r}", kind="E-ATTRIBUTE-VALUE")
    for key in args:
        if key not in FIELDS:
            hint = did_you_mean(str(key), FIELDS)
            raise ConfigError(f"unknown argument '{key}'", hint=hint, kind="E-ATTRIBUTE-UNKNOWN")
    dynamic = args.get("dynamic", False)
    if dynamic not in (True, False, "local") or (weight and dynamic):
        raise ConfigError(
            f"dynamic {dynamic!r} does not fit {'a weight' if weight else 'an activation'}", kind="E-ATTRIBUTE-CONFLICT"
        )
    strategy = _strategy(args)
    cfg: dict[str, Any] = {
        "element": _element(args),
        "granularity": _granularity(strategy, args),
        "scale": _scale(strategy, args, "dynamic" if dynamic else "static"),
    }
    if not args.get("symmetric", True):
        cfg["zero_point"] = "int"
    if not dynamic and not weight:
        cfg["observer"] = _observer(args)
    return native.to_spec(cfg)


def _element(args: Mapping[str, Any]) -> str:
    bits, kind = args.get("num_bits", 8), str(args.get("type", "int")).lower()
    if kind == "float" and type(bits) is int and bits in _FLOATS:
        return _FLOATS[bits]
    if kind == "int" and type(bits) is int and bits in (2, 3, 4, 8):
        return f"int{bits}" if args.get("symmetric", True) else f"uint{bits}"
    raise ConfigError(
        f"type {kind} with num_bits {bits!r} is not supported",
        hint="use 2, 3, 4 or 8 bits with int, and 4, 6 or 8 with float",
        kind="E-ATTRIBUTE-UNSUPPORTED",
    )


def _strategy(args: Mapping[str, Any]) -> str:
    """Returns the strategy. One that is left out follows from the group size: none a tensor, -1 a channel."""
    size = args.get("group_size")
    usual = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(args.get("strategy") or usual).lower()
    if strategy not in _STRATEGIES:
        raise ConfigError(
            f"strategy '{strategy}' is not supported",
            hint=f"use one of {', '.join(_STRATEGIES)}",
            kind="E-ATTRIBUTE-UNSUPPORTED",
        )
    return strategy


def _granularity(strategy: str, args: Mapping[str, Any]) -> Any:
    if strategy in {"group", "tensor_group"}:
        return {"group": args.get("group_size")}
    if strategy == "block":
        structure = args.get("block_structure")
        return {"tile": list(structure) if isinstance(structure, list | tuple) else structure}
    return {"channel": 0} if strategy == "channel" else strategy


def _scale(strategy: str, args: Mapping[str, Any], when: str) -> dict[str, Any]:
    dtype = args.get("scale_dtype")
    if strategy == "tensor_group" or dtype == _E4M3:
        return {"dtype": "e4m3", "rule": "absmax", "when": when, "global_scale": {"dtype": "f32", "when": "static"}}
    if dtype == _E8M0:
        return {"dtype": "e8m0", "rule": "even", "when": when}
    return {"when": when}


def _observer(args: Mapping[str, Any]) -> str:
    name = str(args.get("observer") or "minmax")
    if name in _OBSERVERS:
        return _OBSERVERS[name]
    raise ConfigError(
        f"observer '{name}' is not supported",
        hint=f"use one of {', '.join(_OBSERVERS)}",
        kind="E-ATTRIBUTE-UNSUPPORTED",
    )
