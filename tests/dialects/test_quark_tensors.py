"""The quark dialect's bytes, decoded here by hand from what amd-quark 0.13 documents and exports; names and shapes."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch

from quarkcli import dialects
from quarkcli.numerics.quantize import dequantize, quantize
from quarkcli.plan.model import Target
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

from .plans import FP8, Module, Pair, linears, plan, target
from .test_quark_roundtrip import SCHEMES, awkward, statics
from .test_roundtrip import TEXTS, headers

QUARK = dialects.writer("quark")
OUT, IN = 16, 256
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN = tuple(range(8))


def written(pair: Pair) -> tuple[Target, np.ndarray, dict[str, torch.Tensor]]:
    """(target, the values a reader must find in float64, tensors without their module's name)."""
    item = target(Module("m", (OUT, IN), "up"), pair)
    assert item.weight is not None
    quantized = quantize(awkward(item.shape), item.weight)
    tensors = QUARK.tensors(item, quantized, statics(item))
    values = dequantize(quantized, item.weight).double().numpy()
    return item, values, {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


# AMD Quark's exports of W = [OUT, IN] (its table of tensors); scales are float32 where it stores the model's dtype,
# but for int4.
TABLE: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "fp8": {"weight": ("F8_E4M3", (OUT, IN)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
    "ptpc_fp8": {"weight": ("F8_E4M3", (OUT, IN)), "weight_scale": ("F32", (OUT,))},
    "int8": {
        "weight": ("I8", (OUT, IN)), "weight_scale": ("F32", ()), "weight_zero_point": ("I8", ()),
        "input_scale": ("F32", ()), "input_zero_point": ("I8", ()),
    },
    "int4_wo_64": {
        "weight": ("I32", (IN, OUT // 8)), "weight_scale": ("BF16", (IN // 64, OUT)),
        "weight_zero_point": ("I32", (IN // 64, OUT // 8)),
    },
    "uint4_wo_128": {
        "weight": ("I32", (IN, OUT // 8)), "weight_scale": ("BF16", (IN // 128, OUT)),
        "weight_zero_point": ("I32", (IN // 128, OUT // 8)),
    },
    "uint4_wo_per_channel": {
        "weight": ("I32", (OUT, IN // 8)), "weight_scale": ("BF16", (OUT,)), "weight_zero_point": ("I32", (OUT // 8,)),
    },
    "mxfp4": {"weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 32))},
    "mxfp4_fp8": {
        "weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 32)), "input_scale": ("F32", ()),
    },
    "mxfp6_e3m2": {"weight": ("U8", (OUT, IN * 3 // 4)), "weight_scale": ("U8", (OUT, IN // 32))},
    "amdfp4": {"weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 16))},
    "amdfp4_global32": {
        "weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 32)), "weight_scale_2": ("F32", ()),
        "input_scale_2": ("F32", ()),
    },
    "nvfp4": {
        "weight": ("U8", (OUT, IN // 2)), "weight_scale": ("F8_E4M3", (OUT, IN // 16)), "weight_scale_2": ("F32", ()),
        "input_scale_2": ("F32", ()),
    },
    "int4_fp8": {
        "weight": ("I32", (OUT, IN // 8)), "weight_scale": ("F32", ()), "weight_scale_2": ("F32", (OUT,)),
        "weight_zero_point_2": ("I32", (OUT // 8,)),
    },
    # Our own.
    "mx6": {
        "weight": ("U8", (OUT, IN * 5 // 8)), "weight_scale": ("U8", (OUT, IN // 16)),
        "weight_shift": ("U8", (OUT, IN // 16)),
    },
    "bfp16": {"weight": ("I8", (OUT, IN)), "weight_scale": ("U8", (OUT, IN // 8))},
    "int3_wo_128": {"weight": ("U8", (OUT, IN * 3 // 8)), "weight_scale": ("BF16", (IN // 128, OUT))},
    "fp8_block128": {"weight": ("F8_E4M3", (OUT, IN)), "weight_scale": ("F32", (1, IN // 128))},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_tensors_are_those_of_the_peer(name: str) -> None:
    _, _, tensors = written(SCHEMES[name])
    assert {key: (TEXTS[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()} == TABLE[name]


def words(packed: torch.Tensor, order: tuple[int, ...]) -> np.ndarray:
    """The nibbles of int32 words [..., n] as 0..15 [..., 8 n]: slot i of a word holds element `order[i]`."""
    raw = packed.numpy().view(np.uint32)
    out = np.zeros((*raw.shape[:-1], raw.shape[-1] * 8), dtype=np.int64)
    for slot, element in enumerate(order):
        out[..., element::8] = (raw >> np.uint32(4 * slot)) & np.uint32(15)
    return out


def stream(packed: torch.Tensor, width: int) -> np.ndarray:
    """Codes of `width` bits from bytes [rows, n], the lowest bits first."""
    found = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
    found = found.reshape(*packed.shape[:-1], -1, width).astype(np.int64)
    return (found << np.arange(width)).sum(-1)


def signed(codes: np.ndarray, width: int) -> np.ndarray:
    return np.where(codes >= 1 << (width - 1), codes - (1 << width), codes)


def spread(scales: np.ndarray, size: int) -> np.ndarray:
    return np.repeat(scales, size, axis=1)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def test_int4_groups_are_transposed_words() -> None:
    _, values, found = written(SCHEMES["int4_wo_32"])
    codes = signed(words(found["weight"], AWQ), 4).T
    np.testing.assert_array_equal(codes * spread(numbers(found["weight_scale"]).T, 32), values)
    assert not found["weight_zero_point"].any()


def test_uint4_zero_points_are_packed_like_the_codes() -> None:
    _, values, found = written(SCHEMES["uint4_wo_32"])
    zeros = words(found["weight_zero_point"], AWQ).T
    assert len(np.unique(zeros)) > 4
    codes = words(found["weight"], AWQ).T
    np.testing.assert_array_equal((codes - spread(zeros, 32)) * spread(numbers(found["weight_scale"]).T, 32), values)


def test_channels_of_four_bits_are_not_transposed() -> None:
    _, values, found = written(SCHEMES["uint4_wo_per_channel"])
    zeros = words(found["weight_zero_point"], AWQ)[:, None]
    codes = words(found["weight"], AWQ)
    np.testing.assert_array_equal((codes - zeros) * numbers(found["weight_scale"])[:, None], values)


def test_int4_over_fp8() -> None:
    _, values, found = written(SCHEMES["int4_fp8"])
    codes = signed(words(found["weight"], AWQ), 4).astype(np.float32)
    real = codes * found["weight_scale_2"].numpy()[:, None] * found["weight_scale"].numpy()
    np.testing.assert_allclose(real, values, rtol=2e-7)


def test_three_bits_little_endian() -> None:
    _, values, found = written(SCHEMES["int3_wo_128"])
    codes = signed(stream(found["weight"], 3), 3)
    np.testing.assert_array_equal(codes * spread(numbers(found["weight_scale"]).T, 128), values)


def test_two_bits_most_significant_first() -> None:
    spec = TensorSpec("uint2", PerGroup(32), ScaleSpec("model", "half_range"), "int")
    _, values, found = written((spec, None))

    def fours(packed: torch.Tensor) -> np.ndarray:
        return np.stack([(packed.numpy() >> shift) & 3 for shift in (6, 4, 2, 0)], -1).reshape(len(packed), -1).T

    codes, zeros = fours(found["weight"]).astype(int), fours(found["weight_zero_point"]).astype(int)
    np.testing.assert_array_equal((codes - spread(zeros, 32)) * spread(numbers(found["weight_scale"]).T, 32), values)


@pytest.mark.parametrize(
    ("name", "dtype", "width"),
    [("mxfp4", "float4_e2m1fn", 4), ("mxfp6_e3m2", "float6_e3m2fn", 6), ("mxfp6_e2m3", "float6_e2m3fn", 6)],
)
def test_small_floats_are_streams_under_exponent_bytes(name: str, dtype: str, width: int) -> None:
    _, values, found = written(SCHEMES[name])
    codes = stream(found["weight"], width).astype(np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float64)
    scale = 2.0 ** (found["weight_scale"].numpy().astype(int) - 127)
    np.testing.assert_array_equal(codes * spread(scale, 32), values)


@pytest.mark.parametrize(("name", "size"), [("amdfp4", 16), ("amdfp4_g32", 32), ("amdfp4_global16", 16)])
def test_scales_of_amdfp4_are_bits_of_e5m3(name: str, size: int) -> None:
    _, values, found = written(SCHEMES[name])
    codes = stream(found["weight"], 4).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    raw = found["weight_scale"].numpy().astype(int)
    exponent, mantissa = raw >> 3, raw & 7
    normal, subnormal = 2.0 ** (exponent - 15) * (1 + mantissa / 8), 2.0**-14 * mantissa / 8
    scale = np.where(exponent > 0, normal, subnormal).astype(np.float32)
    if "weight_scale_2" in found:
        scale = scale * found["weight_scale_2"].numpy()
    np.testing.assert_array_equal(codes * spread(scale, size), values)


@pytest.mark.parametrize(("name", "width"), [("mx6", 5), ("mx9", 8)])
def test_micro_exponents_by_their_definition(name: str, width: int) -> None:
    """A code counts steps of 2^(E - b - width + 2), E the block's exponent and b the pair's shift bit."""
    _, values, found = written(SCHEMES[name])
    raw = stream(found["weight"], 5) if width == 5 else found["weight"].numpy().view(np.uint8).astype(int)
    exponent = spread(found["weight_scale"].numpy().astype(int) - 127, 16)
    shift = spread(np.unpackbits(found["weight_shift"].numpy(), axis=1, bitorder="little").astype(int), 2)
    np.testing.assert_array_equal(signed(raw, width) * 2.0 ** (exponent - shift - width + 2), values)


def test_tiles_are_rows_by_columns() -> None:
    spec = TensorSpec("fp8_e4m3", PerTile(12, 128), ScaleSpec("f32"))
    _, values, found = written((spec, None))
    assert found["weight_scale"].shape == (2, 2)
    scale = np.repeat(spread(found["weight_scale"].numpy(), 128), 12, axis=0)[:OUT]
    real = found["weight"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(real, values)


def in_order(packed: torch.Tensor) -> torch.Tensor:
    """The same codes in words whose slot i holds element i."""
    codes = words(packed, AWQ).astype(np.uint32)
    raw = sum(codes[..., slot::8] << np.uint32(4 * slot) for slot in PLAIN)
    return torch.from_numpy(np.ascontiguousarray(raw).view(np.int32))


@pytest.mark.parametrize("name", ["int4_wo_32", "uint4_wo_128", "uint4_wo_per_channel", "int4_fp8"])
def test_words_in_plain_order_are_read(name: str) -> None:
    made = plan([Module("m", (OUT, IN), "up")], linears(SCHEMES[name]))
    item, values, found = written(SCHEMES[name])
    tensors = {f"m.{key}": in_order(t) if t.dtype == torch.int32 else t for key, t in found.items()}
    config = QUARK.config(made)
    config["export"]["pack_method"] = "order"
    stored = QUARK.reader.view(config, headers(tensors)).targets["m"]
    assert item.weight is not None
    again = dequantize(QUARK.reader.decode(stored, tensors).weight, item.weight)
    np.testing.assert_array_equal(numbers(again), values)


def integer_slots() -> Iterator[tuple[TensorSpec, str]]:
    for element, dtype in (("int8", "I8"), ("int4", "I32")):
        yield TensorSpec(element, PerTensor(), ScaleSpec("f32", "half_range")), dtype


@pytest.mark.parametrize(("spec", "dtype"), integer_slots())
def test_static_integers_have_a_stored_zero(spec: TensorSpec, dtype: str) -> None:
    _, _, found = written((FP8, spec))
    assert (TEXTS[found["input_zero_point"].dtype], found["input_zero_point"].item()) == (dtype, 0)


def test_one_scale_per_column_is_a_vector() -> None:
    spec = TensorSpec("int8", PerChannel(1), ScaleSpec("f32", "half_range"))
    _, values, found = written((spec, None))
    np.testing.assert_array_equal(found["weight"].numpy() * found["weight_scale"].numpy(), values)
