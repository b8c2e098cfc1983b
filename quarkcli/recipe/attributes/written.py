"""Writes a spec as a native `cfg`: `native` reads it again."""

from __future__ import annotations

from typing import Any

from quarkcli.spec import (
    MIN_MAX,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)


def granularity_to_yaml(granularity: Granularity) -> str | dict[str, Any]:
    """Returns the YAML of a granularity: `tensor`, `token`, `{channel: 0}`, `{group: 16}`, `{tile: [128, 128]}`."""
    match granularity:
        case PerTensor():
            return "tensor"
        case PerToken():
            return "token"
        case PerChannel(axis):
            return {"channel": axis}
        case PerGroup(size):
            return {"group": size}
        case PerTile(rows, cols):
            return {"tile": [rows, cols]}


def scale_to_yaml(scale: ScaleSpec) -> dict[str, Any]:
    out: dict[str, Any] = {"dtype": scale.dtype, "rule": scale.rule, "when": scale.when}
    if scale.global_scale:
        out["global_scale"] = scale_to_yaml(scale.global_scale)
    for key in ("minimum", "constant_amax"):
        if getattr(scale, key) is not None:
            out[key] = getattr(scale, key)
    return out


def spec_to_yaml(spec: TensorSpec) -> dict[str, Any]:
    """Returns the native `cfg` that resolves to `spec` again; defaults are left out."""
    if spec.scale is None:
        return {"element": spec.element}
    out: dict[str, Any] = {"element": spec.element, "granularity": granularity_to_yaml(spec.granularity)}
    out["scale"] = scale_to_yaml(spec.scale)
    if not spec.symmetric:
        out["zero_point"] = spec.zero_point
    if spec.rounding != "half_even":
        out["rounding"] = spec.rounding
    if spec.narrow:
        out["narrow"] = True
    if spec.observer != MIN_MAX:
        out["observer"] = {"name": spec.observer.name, **dict(spec.observer.parameters)}
    if spec.then is not None:
        out |= {"then": spec_to_yaml(spec.then), "stored": spec.stored}
    return out
