"""The main job on a CUDA device; `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from quarkcli.job.run import Options, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def quantize(folder: Path, device: str, scheme: str, **options: str) -> Path:
    """The demo model in one scheme; returns the output directory."""
    out = folder / f"{scheme}-{device}-{'-'.join(options.values())}"
    run(
        Options(
            model="demo", scheme=scheme, output=out, device=device, calib_data="builtin", calib_samples=32,
            calib_seqlen=128, **options,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("scheme", ["mxfp4", "int4_wo_128"])
def test_data_free_schemes_give_the_bytes_of_a_cpu(tmp_path: Path, scheme: str) -> None:
    ours, reference = (tensors(quantize(tmp_path, device, scheme)) for device in ("cuda", "cpu"))
    assert ours.keys() == reference.keys()
    assert not [n for n in ours if not torch.equal(ours[n].view(torch.uint8), reference[n].view(torch.uint8))]


@pytest.mark.parametrize(("scheme", "options"), [("nvfp4", {}), ("fp8", {}), ("int4_wo_128", {"algorithm": "gptq"})])
def test_calibrated_schemes_lose_as_little_as_on_a_cpu(tmp_path: Path, scheme: str, options: dict[str, str]) -> None:
    def kl(device: str) -> float:
        out = quantize(tmp_path, device, scheme, **options)
        result = evaluate(
            str(out), baseline=str(EMBEDDED), dtype="float32", device=device, max_tokens=4096, tell=silent
        )
        return float(result["kl"])

    assert kl("cuda") <= 1.1 * kl("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_moments_are_exact_products_with_float32_sums(dtype: torch.dtype) -> None:
    """Tensor cores round nothing of a 16-bit activation: what is off is the order of the sums."""
    from quarkcli.forward.moments import Moments

    x = torch.randn(4096, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = Moments()
    moments.add(x.cuda())
    found = moments.means().gram
    wanted = (x.double().T @ x.double()) / len(x)
    assert found is not None and torch.equal(found, found.T)
    scale = wanted.diagonal().sqrt()
    assert float(((found.cpu().double() - wanted) / (scale[:, None] * scale)).abs().max()) < 1e-5


def test_tensors_come_and_go_through_pinned_buffers() -> None:
    from quarkcli.job.staging import Staging

    staging = Staging("cuda", 2**20)
    tensors = {str(n): torch.randn(1000 * n + 1, 257).bfloat16() for n in range(5)}
    for _ in range(3):
        made = staging.up(tensors)
        worked = {name: tensor * 2 for name, tensor in made.items()}
        del made
        assert all(torch.equal(staging.down(worked[name]), tensor * 2) for name, tensor in tensors.items())


def test_numbers_on_the_device_equal_those_on_a_cpu() -> None:
    from quarkcli.numerics.quantize import quantize as encode
    from quarkcli.recipe.attributes.native import to_spec
    from quarkcli.recipe.recipe import scheme_model

    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    for scheme in ("nvfp4", "mxfp4", "fp8", "int4_wo_128"):
        spec = to_spec(scheme_model(scheme).weight)
        ours, reference = encode(weight.cuda(), spec), encode(weight, spec)
        assert torch.equal(ours.codes.cpu().view(torch.uint8), reference.codes.view(torch.uint8)), scheme
        scale, expected = ours.params.scale.cpu(), reference.params.scale
        assert torch.equal(scale.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), scheme
