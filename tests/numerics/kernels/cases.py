"""Specs that kernels know and inputs that are hard to get right; for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.numerics.packed import Packed
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, PerToken, ScaleSpec, TensorSpec, ZeroPoint
from tests.numerics import reference

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
F32 = ScaleSpec("f32")


def _mx(element: str, rule: str) -> TensorSpec:
    return TensorSpec(element, PerGroup(32), ScaleSpec("e8m0", rule))  # type: ignore[arg-type]


def _int(element: str, where: object, dtype: str = "f32", rule: str = "half_range", zero: ZeroPoint = "none"):
    return TensorSpec(element, where, ScaleSpec(dtype, rule), zero)  # type: ignore[arg-type]


# Scales, codes and bytes in one kernel.
FUSED: dict[str, TensorSpec] = {
    **{f"mxfp4-{rule}": _mx("fp4_e2m1", rule) for rule in ("even", "floor", "ceil", "rceil")},
    "mxfp6_e2m3-even": _mx("fp6_e2m3", "even"),
    "mxfp6_e2m3-rceil": _mx("fp6_e2m3", "rceil"),
    "mxfp6_e3m2-even": _mx("fp6_e3m2", "even"),
    "mxfp6_e3m2-ceil": _mx("fp6_e3m2", "ceil"),
    "mxfp8_e4m3-even": _mx("fp8_e4m3", "even"),
    "mxfp8_e5m2-floor": _mx("fp8_e5m2", "floor"),
    "nvfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=F32)),
    "fp4-e4m3": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3")),
    "amdfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e5m3")),
    "amdfp4-global": TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e5m3", global_scale=F32)),
    **{f"int4-{dtype}": _int("int4", PerGroup(64), dtype) for dtype in ("f32", "f16", "bf16", "model")},
    "int4-absmax": _int("int4", PerGroup(32), rule="absmax"),
    "int4-zero": _int("int4", PerGroup(64), zero="int"),
    **{f"uint4-{dtype}": _int("uint4", PerGroup(64), dtype, zero="int") for dtype in ("f32", "f16", "bf16")},
    "int8-group": _int("int8", PerGroup(64)),
    "fp8-group": TensorSpec("fp8_e4m3", PerGroup(64), ScaleSpec("bf16")),
}
# Scales first, by a kernel that only finds ranges or by the reference.
SCALES_FIRST: dict[str, TensorSpec] = {
    "fp8-tensor": TensorSpec("fp8_e4m3", PerTensor(), F32),
    "fp8-channel": TensorSpec("fp8_e4m3", PerChannel(0), F32),
    "fp8-token": TensorSpec("fp8_e4m3", PerToken(), F32),
    "e5m2-tensor": TensorSpec("fp8_e5m2", PerTensor(), F32),
    "fp8-column": TensorSpec("fp8_e4m3", PerChannel(1), F32),
    "fp8-tile": TensorSpec("fp8_e4m3", PerTile(4, 64), F32),
    "fp8-ragged-tile": TensorSpec("fp8_e4m3", PerTile(2, 80), F32),
    "fp4-group48": TensorSpec("fp4_e2m1", PerGroup(48), F32),
    "int8-channel": _int("int8", PerChannel(0)),
    "int4-channel": _int("int4", PerChannel(0), rule="absmax"),
    "uint4-channel": _int("uint4", PerChannel(0), zero="int"),
    "uint8-tensor": _int("uint8", PerTensor(), zero="int"),
    "int8-pow2": _int("int8", PerGroup(64), "pow2"),
    "nvfp4-sweep": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "sweep", global_scale=F32)),
    "fp8-minimum": TensorSpec("fp8_e4m3", PerGroup(64), ScaleSpec("f32", minimum=0.01)),
}
SPECS = FUSED | SCALES_FIRST
COLS = 192
# Rows of `awkward` with a float32-subnormal scale; devices that flush subnormals may differ there.
SUBNORMAL_ROWS = (6, 7)


def awkward(dtype: torch.dtype, element: str) -> Tensor:
    """[9, COLS]: zeros of both signs, ties and their neighbours on a unit scale, outliers, both ends of the dtype."""
    rng = torch.Generator().manual_seed(7)
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    noise = torch.randn(6, COLS, generator=rng)
    zeros = torch.zeros(COLS)
    zeros[1::2] = -0.0
    outlier = noise[1].clone()
    outlier[37] = 1e30 if dtype != torch.float16 else 6e4
    spread = noise[2] * torch.exp2(torch.randint(-14, 14, (COLS,), generator=rng).float())
    ends = torch.where(noise[3] > 0, largest, -largest * 0.77)
    rows = [zeros, _ties(element), noise[0] * 0.02, outlier, spread, ends, noise[4] * tiny, noise[5] * tiny / 64]
    rows.append(torch.cat([zeros[: COLS // 2], noise[5][: COLS // 2].abs() + 1]))  # a zero group, and one sign only
    return torch.stack(rows).to(dtype)


def _ties(element: str) -> Tensor:
    """Midpoints between codes and the float32 next to them, in groups of 16 that begin with the largest value."""
    if element in reference.FLOATS:
        values = torch.from_numpy(reference.ties(element))
        top = float(reference.table(element)[-1])
    else:
        middle = torch.arange(-8, 8) + 0.5
        up, down = (torch.nextafter(middle, torch.tensor(end)) for end in (torch.inf, -torch.inf))
        values, top = torch.cat([middle, up, down]), 7.5
    row = values[torch.arange(COLS) * 7 % len(values)].clone()
    row[::16] = top
    return row


def same(actual: Tensor | None, expected: Tensor | None) -> bool:
    """The same dtype, shape and bits; a NaN is a NaN."""
    if actual is None or expected is None:
        return actual is expected
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    actual, expected = actual.cpu(), expected.cpu()
    if actual.dtype in DTYPES.values():
        nan = expected.isnan()
        if not torch.equal(actual.isnan(), nan):
            return False
        actual, expected = actual[~nan], expected[~nan]
    actual, expected = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected))
    return torch.equal(actual, expected)


def differing(actual: Packed, expected: Packed) -> list[str]:
    """Names of the parts that differ."""
    wrong = [] if same(actual.data, expected.data) else ["data"]
    for name in ("scale", "global_scale", "zero_point"):
        if not same(getattr(actual.params, name), getattr(expected.params, name)):
            wrong.append(name)
    return wrong
