"""The main job on a CUDA device; `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quarkcli.evaluate.run import evaluate
from quarkcli.events import silent
from quarkcli.job.run import EMBEDDED, Options, run

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
