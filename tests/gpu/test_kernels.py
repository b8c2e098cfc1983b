"""Kernels on a CUDA device against the reference on a CPU, bit for bit; `make test-gpu`.

Rows whose scales are float32 subnormals (`cases.SUBNORMAL_ROWS`) are compared apart: a device may take them for zero.
"""

from __future__ import annotations

import pytest
import torch

from quarkcli.errors import DataError
from quarkcli.numerics import kernels
from quarkcli.numerics.packed import Packed, dequantize_packed, quantize_packed
from quarkcli.numerics.quantize import QParams, fake_quantize, static_scale
from quarkcli.spec import PerChannel, PerTile, TensorSpec
from tests.numerics.kernels.cases import DTYPES, SPECS, SUBNORMAL_ROWS, awkward, differing, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = ((4097, 3840), (1, 11008 - 8), (257, 192))


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(kernels.SWITCH, raising=False)


def random(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).mul_(0.02).to(dtype)


def fits(spec: TensorSpec, cols: int) -> bool:
    return spec.group_size is None or isinstance(spec.granularity, PerTile) or cols % spec.group_size == 0


def on(packed: Packed, device: str) -> Packed:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    params = packed.params
    return Packed(
        packed.data.to(device), QParams(moved(params.scale), moved(params.global_scale), moved(params.zero_point))
    )


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_values(name: str, dtype: str) -> None:
    spec = SPECS[name]
    assert kernels.find(spec, torch.device("cuda")) is not None
    x = awkward(DTYPES[dtype], spec.element)
    if spec.granularity not in (PerChannel(1),) and not isinstance(spec.granularity, PerTile):
        x = x[[row for row in range(len(x)) if row not in SUBNORMAL_ROWS]]
    want = quantize_packed(x, spec)
    assert not differing(quantize_packed(x.cuda(), spec), want)
    shape = (x.shape[0], x.shape[1])
    for out in DTYPES.values():
        got = dequantize_packed(on(want, "cuda"), spec, shape, out)
        assert same(got, dequantize_packed(want, spec, shape, out)), out
    assert same(fake_quantize(x.cuda(), spec), fake_quantize(x, spec))


@pytest.mark.parametrize("name", [name for name in SPECS if "tile" not in name and "column" not in name])
def test_subnormal_scales(name: str) -> None:
    """Rows of subnormals by themselves: nothing but their own values may suffer, and no NaN may come of them."""
    spec = SPECS[name]
    x = awkward(torch.float32, spec.element)[list(SUBNORMAL_ROWS)]
    values = fake_quantize(x.cuda(), spec).cpu()
    assert bool(values.isfinite().all())
    assert float(values.abs().max()) <= 1.5 * float(x.abs().max())


# A sweep would take minutes on a CPU.
LARGE = [(name, shape) for shape in SHAPES for name, spec in SPECS.items()
         if fits(spec, shape[1]) and "sweep" not in name]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), LARGE, ids=[f"{shape}-{name}" for name, shape in LARGE])
def test_large(name: str, shape: tuple[int, int]) -> None:
    spec = SPECS[name]
    x = random(shape, torch.bfloat16)
    want = quantize_packed(x, spec)
    assert not differing(quantize_packed(x.cuda(), spec), want)
    got = dequantize_packed(on(want, "cuda"), spec, shape, torch.bfloat16)
    assert same(got, dequantize_packed(want, spec, shape, torch.bfloat16))
    assert same(fake_quantize(x.cuda(), spec), fake_quantize(x, spec))


@pytest.mark.parametrize("name", ["fp8-tensor", "nvfp4", "int8-channel"])
def test_static_activations(name: str) -> None:
    spec, x = SPECS[name], random((129, 4096), torch.bfloat16)
    static = static_scale(torch.tensor(0.05), spec)
    assert same(fake_quantize(x.cuda(), spec, static.cuda()), fake_quantize(x, spec, static))


def test_offsets_beyond_32_bits() -> None:
    """More values than an int32 counts."""
    spec = SPECS["mxfp4-even"]
    x = torch.zeros(1 << 16, (1 << 15) + 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = random((1, x.shape[1]), torch.bfloat16)[0].cuda()
    assert x.numel() > 1 << 31
    got, want = quantize_packed(x, spec), quantize_packed(x[-1:].cpu(), spec)
    assert same(got.data[-1:], want.data)
    assert same(got.params.scale[-1:], want.params.scale)
    values = dequantize_packed(got, spec, (x.shape[0], x.shape[1]), torch.bfloat16)
    assert same(values[-1:], dequantize_packed(want, spec, (1, x.shape[1]), torch.bfloat16))


@pytest.mark.parametrize("name", ["mxfp4-even", "nvfp4", "fp8-channel"])
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    x = torch.ones(64, 4096, device="cuda")
    x[5, 70] = torch.nan
    with pytest.raises(DataError, match=r"at \[5, 70\] is not finite"):
        quantize_packed(x, SPECS[name])
