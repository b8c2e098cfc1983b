"""Kernels under Triton's interpreter: bit for bit what the reference gives, and what the conformance vectors say."""

from __future__ import annotations

import pytest
import torch

from quarkcli.errors import DataError, ModelError
from quarkcli.numerics.packed import dequantize_packed, quantize_packed
from quarkcli.numerics.packing import pack_bits
from quarkcli.numerics.quantize import dequantize, fake_quantize, quantize, static_scale, tensor_amax
from quarkcli.spec import PerGroup, PerTensor, PerToken, ScaleSpec, TensorSpec
from tests.numerics import conformance, vectors

from . import cases
from . import interpreter as there
from .cases import DTYPES, SPECS, awkward, differing, same
from .interpreter import Interpreter

# Values are loaded and stored in the same way for every spec: these are tried in every dtype, the rest in bfloat16.
EVERY_DTYPE = ("nvfp4", "mxfp6_e3m2-even", "uint4-f32", "fp8-channel")
MX = sorted(case for case in vectors.cases("mx") if case.split(".")[1] != "int8")
INTEGERS = sorted(case for case in vectors.cases("int") if "int2" not in case)


def outputs(name: str) -> list[torch.dtype]:
    return list(DTYPES.values()) if name in EVERY_DTYPE else [torch.bfloat16]


@pytest.mark.parametrize("name", SPECS)
def test_quantize_and_pack(interpreter: Interpreter, name: str) -> None:
    spec = SPECS[name]
    for dtype in DTYPES.values():
        weight = awkward(dtype, spec.element)
        got = interpreter.call(there.quantize_packed, weight, spec)
        assert not differing(got, quantize_packed(weight, spec)), dtype


@pytest.mark.parametrize("name", SPECS)
def test_dequantize(interpreter: Interpreter, name: str) -> None:
    spec = SPECS[name]
    weight = awkward(torch.float32, spec.element)
    packed = quantize_packed(weight, spec)
    for dtype in outputs(name):
        got = interpreter.call(there.dequantize_packed, packed, spec, tuple(weight.shape), dtype)
        assert same(got, dequantize_packed(packed, spec, tuple(weight.shape), dtype)), dtype


@pytest.mark.parametrize("name", SPECS)
def test_fake_quantize(interpreter: Interpreter, name: str) -> None:
    spec = SPECS[name]
    for dtype in outputs(name):
        x = awkward(dtype, spec.element)
        assert same(interpreter.call(there.fake_quantize, x, spec), fake_quantize(x, spec)), dtype


@pytest.mark.parametrize("name", ["fp8-tensor", "int8-channel", "nvfp4", "fp8-token"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_static_activations(interpreter: Interpreter, name: str, dtype: str) -> None:
    spec = SPECS[name]
    x = awkward(DTYPES[dtype], spec.element)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    static = static_scale(torch.tensor(3.3), spec)
    got, want = interpreter.call(there.fake_quantize, x, spec, static), fake_quantize(x, spec, static)
    beside = 16 if name == "nvfp4" else 1  # a NaN takes its group with it
    assert same(got[:, beside:], want[:, beside:])
    assert bool(got[0, 0].isnan())


@pytest.mark.parametrize("granularity", [PerTensor(), PerToken()], ids=["tensor", "token"])
def test_constant_amax(interpreter: Interpreter, granularity: object) -> None:
    spec = TensorSpec("fp8_e4m3", granularity, ScaleSpec("f32", constant_amax=448.0))  # type: ignore[arg-type]
    x = awkward(torch.bfloat16, spec.element)
    assert same(interpreter.call(there.fake_quantize, x, spec), fake_quantize(x, spec))


@pytest.mark.parametrize("shape", [(1, 64), (5, 3, 128), (128,), (0, 64)])
def test_activations_of_any_shape(interpreter: Interpreter, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    for name in ("mxfp4-even", "fp8-token", "fp8-tensor", "nvfp4"):
        got = interpreter.call(there.fake_quantize, x, SPECS[name])
        assert same(got, fake_quantize(x, SPECS[name])), name
        assert got.shape == shape


def test_a_chain_of_activations(interpreter: Interpreter) -> None:
    """Two known stages, one after the other; a chain itself is no kernel's."""
    chain = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32"), then=SPECS["int4-f32"])
    x = awkward(torch.float32, "int4")
    assert interpreter.call(there.found, chain) is None
    assert interpreter.call(there.launches, fake_quantize, x, chain) == ["ranges", "given", "groups"]
    assert same(interpreter.call(fake_quantize, x, chain), fake_quantize(x, chain))


@pytest.mark.parametrize("cols", [2, 6, 100, 4100])
def test_columns_that_do_not_fill_a_piece(interpreter: Interpreter, cols: int) -> None:
    weight = torch.randn(2, cols, generator=torch.Generator().manual_seed(cols))
    for name in ("int4-channel", "uint4-channel", "fp8-tensor"):
        spec = SPECS[name]
        got = interpreter.call(there.quantize_packed, weight, spec)
        want = quantize_packed(weight, spec)
        assert not differing(got, want), name
        decoded = interpreter.call(there.dequantize_packed, want, spec, (2, cols), torch.float32)
        assert same(decoded, dequantize_packed(want, spec, (2, cols), torch.float32)), name


def test_rows_that_end_within_a_byte_are_left_to_the_reference(interpreter: Interpreter) -> None:
    spec, weight = SPECS["int4-channel"], torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    assert interpreter.call(there.launches, quantize_packed, weight, spec) == []
    packed = quantize_packed(weight, spec)
    assert packed.data.shape == (3, 4)
    assert same(dequantize_packed(packed, spec, (3, 7), torch.float32), dequantize(quantize(weight, spec), spec))


def test_strided_weights(interpreter: Interpreter) -> None:
    weight = awkward(torch.float32, "int4").t().contiguous().t()
    assert not weight.is_contiguous()
    for name in ("mxfp4-even", "int8-channel"):
        got = interpreter.call(there.quantize_packed, weight, SPECS[name])
        assert not differing(got, quantize_packed(weight, SPECS[name]))


def test_float64_is_rounded_first(interpreter: Interpreter) -> None:
    x = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    spec = SPECS["mxfp4-even"]
    assert not differing(interpreter.call(there.quantize_packed, x, spec), quantize_packed(x, spec))
    assert same(interpreter.call(there.fake_quantize, x, spec).float(), fake_quantize(x, spec).float())


@pytest.mark.parametrize("name", ["nvfp4", "amdfp4-global", "fp8-tensor", "int8-channel", "nvfp4-sweep"])
def test_shared_ranges(interpreter: Interpreter, name: str) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    amax = tensor_amax(weight) * 3
    got = interpreter.call(there.quantize_packed, weight, SPECS[name], amax)
    assert not differing(got, quantize_packed(weight, SPECS[name], amax=amax))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["mxfp4-even", "nvfp4", "uint4-f32", "fp8-tensor", "int8-channel", "fp8-tile"])
def test_weights_that_are_not_finite_are_refused(interpreter: Interpreter, name: str, value: float) -> None:
    weight = torch.ones(8, 128)
    weight[5, 70] = value
    for amax in (None, torch.tensor(2.0)):
        with pytest.raises(DataError, match=r"at \[5, 70\] is not finite"):
            interpreter.call(there.quantize_packed, weight, SPECS[name], amax)


def test_groups_must_fit(interpreter: Interpreter) -> None:
    weight = torch.ones(4, 40)
    for call in (there.quantize_packed, there.fake_quantize):
        with pytest.raises(ModelError, match="not divisible by the group size 32"):
            interpreter.call(call, weight, SPECS["mxfp4-even"])


# ---- conformance vectors


@pytest.mark.parametrize("case", MX)
def test_mx_vectors(interpreter: Interpreter, case: str) -> None:
    _, short, rule = case.split(".")
    _conforms(interpreter, "mx", case, conformance.mx_spec(short, rule))


def test_nvfp4_vectors(interpreter: Interpreter) -> None:
    got = _conforms(interpreter, "nvfp4", "nvfp4", conformance.NVFP4)
    assert torch.equal(got.params.global_scale, vectors.expected("nvfp4", "nvfp4", "scale2"))


@pytest.mark.parametrize("case", sorted(vectors.cases("amdfp4")))
def test_amdfp4_vectors(interpreter: Interpreter, case: str) -> None:
    _, size, outer = case.split(".")
    scale = ScaleSpec("e5m3", global_scale=conformance.F32 if outer == "global1" else None)
    _conforms(interpreter, "amdfp4", case, TensorSpec("fp4_e2m1", PerGroup(int(size[1:])), scale))


@pytest.mark.parametrize("case", INTEGERS)
def test_integer_vectors(interpreter: Interpreter, case: str) -> None:
    _, name, kind, where, rule = case.split(".")
    zero = "none" if kind == "sym" else "int"
    spec = TensorSpec(name, conformance.GRANULARITIES[where], ScaleSpec("f32", rule), zero)  # type: ignore[arg-type]
    got = _conforms(interpreter, "int", case, spec)
    if zero == "int":
        assert not vectors.differences(got.params.zero_point, vectors.expected("int", case, "zp")).any()


def _conforms(interpreter: Interpreter, family: str, case: str, spec: TensorSpec) -> cases.Packed:
    """Scales, bytes and values of a case through the kernels."""
    x = vectors.tensor(family, "x")
    got = interpreter.call(there.quantize_packed, x, spec)
    scale = got.params.scale
    if scale.dtype == torch.float8_e4m3fn:
        scale = vectors.code_bytes(scale)
    wrong = vectors.differences(scale, vectors.expected(family, case, "scale"))
    if family == "amdfp4":  # any scale does for an all-zero block: ours is 1.0
        wrong &= ~x.unflatten(1, (-1, spec.group_size)).eq(0).all(-1)
    assert not wrong.any()
    bits = spec.format.bits
    if "packed" in vectors.cases(family)[case]:
        data = vectors.expected(family, case, "packed")
    else:
        codes = vectors.expected(family, case, "codes").to(torch.int16).to(torch.uint8)
        data = codes if bits == 8 else pack_bits(codes & (1 << bits) - 1, bits)
    assert torch.equal(got.data.view(torch.uint8), data)
    values = interpreter.call(there.dequantize_packed, got, spec, tuple(x.shape), torch.float32)
    # The oracle's zeros have no sign where codes have none.
    assert not vectors.differences(values + 0.0, vectors.expected(family, case, "dq") + 0.0).any()
    return got
