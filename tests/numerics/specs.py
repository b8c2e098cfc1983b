"""Specs to test with: the weight of every built-in scheme, and what no scheme has."""

from __future__ import annotations

from quarkcli.recipe import catalog
from quarkcli.recipe.attributes.native import to_spec
from quarkcli.spec import ObserverSpec, PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

F32 = ScaleSpec("f32")
HALF = ScaleSpec("f32", "half_range")
MSE = ObserverSpec("mse", (("steps", 20), ("shrink", 0.5)))
PERCENTILE = ObserverSpec("percentile", (("percentile", 90),))


def _weights() -> dict[str, TensorSpec]:
    """The weight specs of the built-in schemes, each once, under the name of the first scheme that has it."""
    found: dict[TensorSpec, str] = {}
    for name, path in sorted(catalog.files("schemes").items()):
        found.setdefault(to_spec(catalog.document(path).data["weight"]), name)
    return {name: spec for spec, name in found.items()}


SCHEMES = _weights()
OTHERS = {
    "int8 column": TensorSpec("int8", PerChannel(1), HALF),
    "uint8 column": TensorSpec("uint8", PerChannel(1), HALF, "int"),
    "int4 tile": TensorSpec("int4", PerTile(5, 48), HALF),
    "uint4 tile": TensorSpec("uint4", PerTile(5, 48), HALF, "int"),
    "uint8 tensor": TensorSpec("uint8", PerTensor(), HALF, "int"),
    "uint4 float zero": TensorSpec("uint4", PerGroup(32), HALF, "float"),
    "int2 float zero": TensorSpec("int2", PerGroup(32), HALF, "float"),
    "uint2": TensorSpec("uint2", PerGroup(32), HALF, "int"),
    "int8 narrow": TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "absmax"), narrow=True),
    "int4 floor": TensorSpec("int4", PerGroup(32), HALF, rounding="floor"),
    "int4 round": TensorSpec("int4", PerGroup(32), HALF, rounding="round"),
    "int8 pow2": TensorSpec("int8", PerTensor(), ScaleSpec("pow2", "absmax")),
    "int4 f16": TensorSpec("int4", PerGroup(32), ScaleSpec("f16", "half_range")),
    "int4 bf16": TensorSpec("int4", PerGroup(32), ScaleSpec("bf16", "absmax")),
    "int4 e4m3": TensorSpec("int4", PerGroup(32), ScaleSpec("e4m3", "absmax", global_scale=F32)),
    "fp8_e5m2": TensorSpec("fp8_e5m2", PerChannel(0), F32),
    "mxfp8_e5m2 floor": TensorSpec("fp8_e5m2", PerGroup(32), ScaleSpec("e8m0", "floor")),
    "mxfp6 ceil": TensorSpec("fp6_e2m3", PerGroup(32), ScaleSpec("e8m0", "ceil")),
    "nvfp4 sweep": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "sweep", global_scale=F32)),
    "nvfp4 four over six": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "four_over_six", global_scale=F32)),
    "int4 mse": TensorSpec("int4", PerGroup(32), HALF, observer=MSE),
    "int4 percentile": TensorSpec("int4", PerGroup(32), HALF, observer=PERCENTILE),
    "fp16": TensorSpec("fp16", PerTensor(), None),
    "bf16": TensorSpec("bf16", PerTensor(), None),
}  # fmt: skip
W4A8 = TensorSpec("int4", PerGroup(32), HALF, then=TensorSpec("fp8_e4m3", PerTensor(), F32))
CHAINS = {name: spec for name, spec in SCHEMES.items() if spec.then is not None} | {"w4a8": W4A8}
ALL = SCHEMES | OTHERS | {"w4a8": W4A8}
SINGLE = {name: spec for name, spec in ALL.items() if spec.then is None}
