"""Says whether the scales of a spec may have a sign. Torch-free, so that checks of files can ask."""

from __future__ import annotations

from quarkcli.spec import TensorSpec

_PLAIN = {"f32", "f16", "bf16", "model"}


def is_plain(spec: TensorSpec) -> bool:
    """True when the scale is stored as a float of 16 or 32 bits, and is no power of two by rule."""
    return spec.scale is not None and spec.scale.dtype in _PLAIN


def may_be_negative(spec: TensorSpec) -> bool:
    """True for symmetric integers with a plain scale: their lowest code has no opposite, so a scale may have a sign."""
    element = spec.format
    lopsided = element.kind == "integer" and -element.minimum > element.maximum and not element.fraction
    return lopsided and spec.symmetric and spec.then is None and is_plain(spec)
