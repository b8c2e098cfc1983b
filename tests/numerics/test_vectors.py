"""Every field of every conformance vector, bit for bit, signed zeros included where the vectors keep them."""

from __future__ import annotations

import pytest
import torch

from quarkcli.numerics import packing
from quarkcli.numerics.formats import codec, minifloat
from quarkcli.numerics.quantize import QParams, decode, encode, fake_quantize, quantize
from quarkcli.numerics.scales import decode_scale
from quarkcli.spec import ELEMENTS

from . import conformance, vectors

CASES = [(family, case) for family in conformance.FAMILIES for case in vectors.cases(family)]


def test_every_file_is_covered() -> None:
    assert {path.stem for path in vectors.FOLDER.glob("*.npz")} == set(conformance.FAMILIES)
    assert len(CASES) == 82


@pytest.mark.parametrize(("family", "case"), CASES, ids=[case for _, case in CASES])
def test_every_field(family: str, case: str) -> None:
    fields = conformance.FAMILIES[family](case)
    assert set(fields) == vectors.cases(family)[case]
    for name, actual in fields.items():
        want = vectors.expected(family, case, name)
        if name == "dq" and family != "cast":  # the oracle's zeros have no sign where codes have none
            actual, want = actual + 0.0, want + 0.0
        wrong = vectors.differences(actual, want) & ~free(family, case, name)
        assert not wrong.any(), (name, wrong.nonzero()[:5].tolist())


def free(family: str, case: str, name: str) -> torch.Tensor:
    """Where a field has no one right value, and our documented choice differs from the vectors'."""
    none = torch.zeros((), dtype=torch.bool)
    if family == "amdfp4" and name == "scale":  # any scale does for an all-zero block: ours is 1.0
        size = int(case.split(".")[1][1:])
        return vectors.tensor(family, "x").unflatten(1, (-1, size)).eq(0).all(-1)
    if family == "bfp16":  # exponents that do not fit a byte: no checkpoint can hold them
        beyond = (vectors.expected(family, case, "scale") + 127).clamp(0, 254) - 127
        beyond = beyond != vectors.expected(family, case, "scale")
        assert not vectors.agreement(family, case, "scale")[beyond].any()
        return beyond if name == "scale" else beyond.repeat_interleave(8, 1)
    return none


def test_bfp16_exponents_are_bytes() -> None:
    """Below 2^-127 values vanish on the smallest grid, at the top the largest code is as near as it gets."""
    x = vectors.tensor("bfp16", "x")
    spec = conformance.SHARED_EXPONENT["bfp16"]
    outside = free("bfp16", "bfp16", "dq")
    got = fake_quantize(x, spec)[outside]
    assert torch.allclose(got, x[outside], rtol=2.0**-6, atol=2.0**-133)
    assert bool(got.isfinite().all())
    assert set(quantize(x, spec).params.scale[free("bfp16", "bfp16", "scale")].tolist()) == {0, 254}


@pytest.mark.parametrize("case", sorted(vectors.cases("mx")))
def test_mx_from_bfloat16_equals_float32(case: str) -> None:
    _, short, rule = case.split(".")
    x = vectors.tensor("mx", "x")
    rows = (x.view(torch.int32) & 0xFFFF).eq(0).all(1)
    assert rows.sum() > 2
    result = quantize(x[rows].bfloat16(), conformance.mx_spec(short, rule))
    assert torch.equal(result.params.scale, vectors.expected("mx", case, "scale")[rows])
    assert torch.equal(vectors.code_bytes(result.codes), vectors.expected("mx", case, "codes")[rows])


@pytest.mark.parametrize("case", sorted(vectors.cases("mx")))
def test_fake_quantization_gives_the_decoded_values(case: str) -> None:
    _, short, rule = case.split(".")
    got = fake_quantize(vectors.tensor("mx", "x"), conformance.mx_spec(short, rule))
    assert torch.equal(got, vectors.expected("mx", case, "dq"))


@pytest.mark.parametrize("short", vectors.ELEMENTS)
def test_the_generic_encoder_and_rounding(short: str) -> None:
    """The paths that `encode_grid` does not take for fp8."""
    element = ELEMENTS[vectors.ELEMENTS[short]]
    x = vectors.tensor("cast", f"x.cast.{short}")
    generic = torch.empty(x.shape, dtype=torch.uint8)
    minifloat.encode_bits_(x.clone(), element, generic)
    assert torch.equal(generic, vectors.tensor("cast", f"cast.{short}.codes"))
    assert vectors.same_bits(minifloat.round_(x.clone(), element), vectors.tensor("cast", f"cast.{short}.dq"))


@pytest.mark.parametrize("case", sorted(vectors.cases("pack")))
def test_unpacking(case: str) -> None:
    source, _ = conformance.PACK[case]
    packed, want = vectors.expected("pack", case, "packed"), vectors.tensor("pack", f"x.pack.{source}")
    signed, bits, count = source[0] == "i", int(source[1]), want.shape[1]
    got = {
        "awq": lambda: packing.unpack_awq(packed, signed),
        "seq": lambda: packing.unpack_order(packed, signed),
        "offset_seq": lambda: packing.unpack_int32(packed, bits),
        "msb": lambda: packing.unpack_msb(packed, bits, count),
    }.get(case.rsplit(".", 1)[1], lambda: packing.unpack_bits(packed, bits, count, signed))()
    assert not vectors.differences(got, want).any()


def test_codes_of_given_scales_do_not_depend_on_how_the_scale_was_found() -> None:
    """`encode` and `decode` take any stored scale: here the vectors' own."""
    x = vectors.tensor("nvfp4", "x")
    scale = vectors.tensor("nvfp4", "nvfp4.scale").view(torch.float8_e4m3fn)
    params = QParams(scale, vectors.tensor("nvfp4", "nvfp4.scale2"))
    codes = encode(x, conformance.NVFP4, params)
    assert torch.equal(codes, vectors.tensor("nvfp4", "nvfp4.codes"))
    assert torch.equal(decode(codes, conformance.NVFP4, params), vectors.tensor("nvfp4", "nvfp4.dq"))


def test_e8m0_bytes_decode_to_powers_of_two() -> None:
    values = decode_scale(torch.arange(256, dtype=torch.int32).to(torch.uint8), "e8m0")
    assert torch.equal(values[:255].double(), torch.pow(2.0, torch.arange(255, dtype=torch.float64) - 127))
    assert values[255].isnan()


def test_codec_is_chosen_by_kind() -> None:
    assert codec(ELEMENTS["fp4_e2m1"]) is minifloat
    assert codec(ELEMENTS["int4"]) is not minifloat
