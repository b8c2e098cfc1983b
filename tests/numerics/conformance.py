"""What our code gives for every case of the conformance vectors: field -> tensor, named and shaped as in the files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quarkcli.numerics import packing, scales
from quarkcli.numerics.quantize import Quantized, decode_grid, dequantize, encode_grid, quantize
from quarkcli.spec import ELEMENTS, PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec

from . import vectors

F32 = ScaleSpec("f32")
NVFP4 = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32))
INT4_FP8 = TensorSpec(
    "fp8_e4m3", PerTensor(), F32,
    then=TensorSpec("int4", PerChannel(0), ScaleSpec("f32", "half_range")), stored="last",
)  # fmt: skip
SHARED_EXPONENT = {
    "mx6": TensorSpec("mx6", PerGroup(16), ScaleSpec("e8m0", "floor")),
    "mx9": TensorSpec("mx9", PerGroup(16), ScaleSpec("e8m0", "floor")),
    "bfp16": TensorSpec("bfp16", PerGroup(8), ScaleSpec("e8m0", "fit")),
}
GRANULARITIES = {"tensor": PerTensor(), "channel": PerChannel(0), "group": PerGroup(32)}
Fields = dict[str, Tensor]


def cast(case: str) -> Fields:
    """`cast.<element>` and `table.<element>`."""
    kind, short = case.split(".")
    if kind == "table":
        codes = torch.arange(len(vectors.load("cast")[case]), dtype=torch.uint8)
        return {"": _values(codes, short)}
    x = vectors.tensor("cast", f"x.{case}")
    codes = scales.e5m3_bytes(x) if short == "e5m3" else encode_grid(x, ELEMENTS[vectors.ELEMENTS[short]])
    return {"codes": vectors.code_bytes(codes), "dq": _values(vectors.code_bytes(codes), short)}


def _values(codes: Tensor, short: str) -> Tensor:
    if short == "e5m3":
        return scales.decode_scale(codes, "e5m3")
    element = ELEMENTS[vectors.ELEMENTS[short]]
    native = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(short, torch.uint8)
    return decode_grid(codes.view(native), element)


def mx(case: str) -> Fields:
    """`mx.<element>.<rule>`."""
    _, short, rule = case.split(".")
    spec = mx_spec(short, rule)
    result = quantize(vectors.tensor("mx", "x"), spec)
    codes = vectors.code_bytes(result.codes)
    fields = {"scale": result.params.scale, "codes": codes, "dq": dequantize(result, spec)}
    if spec.format.bits < 8:
        fields["packed"] = packing.pack_bits(codes, spec.format.bits)
    return fields


def mx_spec(short: str, rule: str) -> TensorSpec:
    element = "mxint8" if short == "int8" else vectors.ELEMENTS[short]
    return TensorSpec(element, PerGroup(32), ScaleSpec("e8m0", rule))  # type: ignore[arg-type]


def nvfp4(case: str) -> Fields:
    return _two_level(quantize(vectors.tensor("nvfp4", "x"), NVFP4), NVFP4)


def amdfp4(case: str) -> Fields:
    """`amdfp4.g<size>.global<0 or 1>`."""
    _, size, outer = case.split(".")
    scale = ScaleSpec("e5m3", global_scale=F32 if outer == "global1" else None)
    spec = TensorSpec("fp4_e2m1", PerGroup(int(size[1:])), scale)
    return _two_level(quantize(vectors.tensor("amdfp4", "x"), spec), spec)


def _two_level(result: Quantized, spec: TensorSpec) -> Fields:
    outer = result.params.global_scale
    return {
        "scale2": torch.tensor(1.0) if outer is None else outer,
        "scale": vectors.code_bytes(result.params.scale),
        "codes": result.codes,
        "packed": packing.pack_bits(result.codes, 4),
        "dq": dequantize(result, spec),
    }


def shared_exponent(case: str) -> Fields:
    """`mx6`, `mx9`, `bfp16`: the exponent itself, where we store it with its bias."""
    spec = SHARED_EXPONENT[case]
    result = quantize(vectors.tensor(case, "x"), spec)
    fields = {"scale": result.params.scale.int() - 127, "codes": result.codes, "dq": dequantize(result, spec)}
    if result.params.shift is not None:
        fields["sub"] = result.params.shift.unflatten(1, (-1, 8))
    return fields


def integer(case: str) -> Fields:
    """`int.<element>.<sym or asym>.<granularity>.<rule>`."""
    _, name, kind, where, rule = case.split(".")
    zero = "none" if kind == "sym" else "int"
    spec = TensorSpec(name, GRANULARITIES[where], ScaleSpec("f32", rule), zero)  # type: ignore[arg-type]
    result = quantize(vectors.tensor("int", "x"), spec)
    zeros = torch.zeros_like(result.params.scale) if kind == "sym" else result.params.zero_point
    return {"scale": result.params.scale, "zp": zeros, "codes": result.codes, "dq": dequantize(result, spec)}


def int4_fp8(case: str) -> Fields:
    x = vectors.tensor("int4fp8", "x")
    result = quantize(x, INT4_FP8)
    first = quantize(x, TensorSpec("fp8_e4m3", PerTensor(), F32))
    assert result.params.then is not None
    return {
        "scale1": result.params.scale,
        "codes8": vectors.code_bytes(first.codes),
        "scale": result.params.then.scale,
        "codes": result.codes,
        "dq": dequantize(result, INT4_FP8),
    }


PACK: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "pack.i4.awq": ("i4", packing.pack_awq),
    "pack.i4.seq": ("i4", lambda codes: packing.pack_bits(codes, 4).view(torch.int32)),
    "pack.u4.awq": ("u4", packing.pack_awq),
    "pack.u4.seq": ("u4", lambda codes: packing.pack_bits(codes, 4).view(torch.int32)),
    "pack.i4.offset_seq": ("i4", lambda codes: packing.pack_int32(codes, 4)),
    "pack.i8.offset_seq": ("i8", lambda codes: packing.pack_int32(codes, 8)),
    "pack.i3": ("i3", lambda codes: packing.pack_bits(codes, 3)),
    "pack.u2.msb": ("u2", lambda codes: packing.pack_msb(codes, 2)),
    "pack.f4": ("f4", lambda codes: packing.pack_bits(codes, 4)),
    "pack.f6": ("f6", packing.pack_fp6),
}


def pack(case: str) -> Fields:
    source, call = PACK[case]
    return {"packed": call(vectors.tensor("pack", f"x.pack.{source}"))}


FAMILIES: dict[str, Callable[[str], Fields]] = {
    "cast": cast,
    "mx": mx,
    "nvfp4": nvfp4,
    "amdfp4": amdfp4,
    "mx6": shared_exponent,
    "mx9": shared_exponent,
    "bfp16": shared_exponent,
    "int": integer,
    "int4fp8": int4_fp8,
    "pack": pack,
}
