"""Bit for bit against the conformance vectors, signed zeros included where the vectors keep them."""

from __future__ import annotations

import pytest
import torch

from quarkcli.numerics.formats import codec, minifloat
from quarkcli.numerics.packing import pack_awq, pack_fp6, pack_int32, pack_nibbles
from quarkcli.numerics.quantize import QParams, decode, decode_grid, dequantize, encode, quantize
from quarkcli.numerics.scales import decode_scale
from quarkcli.spec import ELEMENTS, PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec

from . import vectors

NVFP4 = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", over=ScaleSpec("f32")))
RULES = ("floor", "ceil", "even", "rceil")
GRANULARITIES = {"tensor": PerTensor(), "channel": PerChannel(0), "group": PerGroup(32)}


@pytest.mark.parametrize("short", vectors.ELEMENTS)
def test_every_code_decodes_to_its_table_value(short: str) -> None:
    element = ELEMENTS[vectors.ELEMENTS[short]]
    table = vectors.tensor("cast", f"table.{short}")
    codes = torch.arange(len(table), dtype=torch.uint8).view(minifloat.code_dtype(element))
    assert vectors.same_bits(decode_grid(codes, element), table)
    finite = table.isfinite()
    assert vectors.same_bits(decode_grid(codes[finite], element), table[finite])


@pytest.mark.parametrize("short", vectors.ELEMENTS)
def test_casts(short: str) -> None:
    element = ELEMENTS[vectors.ELEMENTS[short]]
    x = vectors.tensor("cast", f"x.cast.{short}")
    want = vectors.tensor("cast", f"cast.{short}.codes")
    codes = torch.empty(x.shape, dtype=minifloat.code_dtype(element))
    minifloat.encode_(x.clone(), element, codes)
    assert torch.equal(vectors.code_bytes(codes), want)
    generic = torch.empty(x.shape, dtype=torch.uint8)
    minifloat.encode_bits_(x.clone(), element, generic)
    assert torch.equal(generic, want)
    values = vectors.tensor("cast", f"cast.{short}.dq")
    assert vectors.same_bits(minifloat.round_(x.clone(), element), values)
    assert vectors.same_bits(decode_grid(codes, element), values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("short", vectors.ELEMENTS)
def test_mx(short: str, rule: str) -> None:
    key = f"mx.{short}.{rule}"
    spec = TensorSpec(vectors.ELEMENTS[short], PerGroup(32), ScaleSpec("e8m0", rule))  # type: ignore[arg-type]
    result = quantize(vectors.tensor("mx", "x"), spec)
    assert torch.equal(result.params.scale, vectors.tensor("mx", f"{key}.scale"))
    assert torch.equal(vectors.code_bytes(result.codes), vectors.tensor("mx", f"{key}.codes"))
    assert torch.equal(dequantize(result, spec), vectors.tensor("mx", f"{key}.dq"))
    if spec.format.bits < 8:
        pack = pack_nibbles if spec.format.bits == 4 else pack_fp6
        assert torch.equal(pack(result.codes), vectors.tensor("mx", f"{key}.packed"))


@pytest.mark.parametrize("rule", RULES)
def test_mx_from_bfloat16_equals_float32(rule: str) -> None:
    spec = TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", rule))  # type: ignore[arg-type]
    x = vectors.tensor("mx", "x")
    rows = (x.view(torch.int32) & 0xFFFF).eq(0).all(1)
    assert rows.sum() > 2
    result = quantize(x[rows].bfloat16(), spec)
    assert torch.equal(result.params.scale, vectors.tensor("mx", f"mx.e2m1.{rule}.scale")[rows])
    assert torch.equal(result.codes, vectors.tensor("mx", f"mx.e2m1.{rule}.codes")[rows])


def test_nvfp4() -> None:
    x = vectors.tensor("nvfp4", "x")
    result = quantize(x, NVFP4)
    assert result.params.global_scale is not None
    assert torch.equal(result.params.global_scale, vectors.tensor("nvfp4", "nvfp4.scale2"))
    assert torch.equal(vectors.code_bytes(result.params.scale), vectors.tensor("nvfp4", "nvfp4.scale"))
    assert torch.equal(result.codes, vectors.tensor("nvfp4", "nvfp4.codes"))
    assert torch.equal(dequantize(result, NVFP4), vectors.tensor("nvfp4", "nvfp4.dq"))
    assert torch.equal(pack_nibbles(result.codes), vectors.tensor("nvfp4", "nvfp4.packed"))


@pytest.mark.parametrize("rule", ["half_range", "absmax"])
@pytest.mark.parametrize("where", GRANULARITIES)
@pytest.mark.parametrize("name", ["int2", "int4", "int8"])
def test_symmetric_integers(name: str, where: str, rule: str) -> None:
    key = f"int.{name}.sym.{where}.{rule}"
    spec = TensorSpec(name, GRANULARITIES[where], ScaleSpec("f32", rule))  # type: ignore[arg-type]
    x = vectors.tensor("int", "x")
    result = quantize(x, spec)
    scale = vectors.tensor("int", f"{key}.scale")
    assert torch.equal(result.params.scale, scale.reshape(result.params.scale.shape))
    assert torch.equal(result.codes.to(torch.int16), vectors.tensor("int", f"{key}.codes"))
    assert torch.equal(dequantize(result, spec), vectors.tensor("int", f"{key}.dq"))


def test_packing_layouts() -> None:
    def want(case: str) -> torch.Tensor:
        return vectors.tensor("pack", f"pack.{case}.packed")

    signed, eight = vectors.tensor("pack", "x.pack.i4"), vectors.tensor("pack", "x.pack.i8")
    assert torch.equal(pack_awq(signed), want("i4.awq"))
    assert torch.equal(pack_awq(vectors.tensor("pack", "x.pack.u4")), want("u4.awq"))
    assert torch.equal(pack_int32(signed, 4), want("i4.offset_seq"))
    assert torch.equal(pack_int32(eight, 8), want("i8.offset_seq"))
    assert torch.equal(pack_nibbles(vectors.tensor("pack", "x.pack.f4")), want("f4"))
    assert torch.equal(pack_fp6(vectors.tensor("pack", "x.pack.f6")), want("f6"))


def test_codes_of_given_scales_do_not_depend_on_how_the_scale_was_found() -> None:
    """`encode` and `decode` take any stored scale: here the vectors' own."""
    x = vectors.tensor("nvfp4", "x")
    scale = vectors.tensor("nvfp4", "nvfp4.scale").view(torch.float8_e4m3fn)
    params = QParams(scale, vectors.tensor("nvfp4", "nvfp4.scale2"))
    codes = encode(x, NVFP4, params)
    assert torch.equal(codes, vectors.tensor("nvfp4", "nvfp4.codes"))
    assert torch.equal(decode(codes, NVFP4, params), vectors.tensor("nvfp4", "nvfp4.dq"))


def test_e8m0_bytes_decode_to_powers_of_two() -> None:
    values = decode_scale(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert torch.equal(values[:255].double(), torch.pow(2.0, torch.arange(255, dtype=torch.float64) - 127))
    assert values[255].isnan()


def test_codec_is_chosen_by_kind() -> None:
    assert codec(ELEMENTS["fp4_e2m1"]) is minifloat
    assert codec(ELEMENTS["int4"]) is not minifloat
