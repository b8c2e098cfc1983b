"""Every scheme of the catalog through `quark quantize`, `quark verify` and `quark eval`, on the embedded model.

A new YAML file in `recipes/schemes` is tested without being told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.cli import main
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.numerics.quantize import dequantize, quantize, tensor_amax
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from tests import runs

SCHEMES = sorted(catalog.files("schemes"))
DATA = ["--calib-data", "builtin", "--calib-samples", "8", "--calib-seqlen", "128"]
# vLLM has no loader for these.
SIMULATIONS = {"mx6", "mx9", "bfp16", "mxint8", "amdfp4", "amdfp4_g32", "amdfp4_global16", "amdfp4_global32"}
# Bits of a weight -> the most that a scheme may move the embedded model, in nats per token: about twice what the worst
# of them costs. KL is quadratic in the rounding noise, which halves with every bit.
KL = {2: 1.5, 3: 0.25, 4: 0.15, 6: 0.025, 8: 0.01}


def quark(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """stdout and stderr of a command that ends well."""
    capsys.readouterr()
    code = main.main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_from_weights_to_loss(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(capsys, scheme)
    data = DATA if row["needs_data"] else []
    folder = tmp_path / "out"
    _, err = quark(capsys, "quantize", "--model", "demo", "--scheme", scheme, "-o", str(folder), *data)
    prepared = runs.prepare("demo", scheme=scheme, calib_data="builtin" if data else None)

    assert prepared.forecast.output_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    quark(capsys, "verify", str(folder), "--source", str(EMBEDDED))
    assert_the_files_hold_the_numbers(folder, prepared.plan)
    answer = ["eval", str(folder), "--baseline", "demo", "--tokens", "512", "--window", "128", "--json"]
    result = json.loads(quark(capsys, *answer)[0])
    assert result["tokens"] == 4 * 127
    assert 0 < result["kl"] < KL[max(bits for bits in KL if bits <= row["bits"])]
    assert_servers_are_told(prepared, scheme, folder, err)


def rows(capsys: pytest.CaptureFixture[str], scheme: str) -> list[dict[str, Any]]:
    found = json.loads(quark(capsys, "schemes", "show", scheme, "--json")[0])["schemes"]
    return [row for row in found if row["kind"] == "weights"]


def assert_the_files_hold_the_numbers(folder: Path, plan: Plan) -> None:
    """What the reader decodes is what the numerics make of the source, bit for bit, with the specs of the plan."""
    checkpoint, source = Checkpoint(Source.open(str(folder))), Source.open(str(EMBEDDED))
    shared: dict[str, torch.Tensor] = {}
    for target in plan.quantized():
        amax = tensor_amax(source.read(f"{target.name}.weight"))
        shared[target.group] = torch.maximum(shared.get(target.group, amax), amax)
    assert set(checkpoint.view.targets) == {target.name for target in plan.quantized()}
    for target in plan.quantized():
        spec = target.weight
        assert spec is not None
        amax = shared[target.group] if spec.has_tensor_scale else None
        made = quantize(source.read(f"{target.name}.weight"), spec, amax=amax)
        stored = checkpoint.view.targets[target.name]
        decoded = checkpoint.decode(stored).weight
        assert runs.same_bytes(decoded.codes, made.codes), target.name
        if made.params.global_scale is not None:  # compressed-tensors stores its reciprocal
            torch.testing.assert_close(decoded.params.global_scale, made.params.global_scale, rtol=2.0**-23, atol=0)
            made.params.global_scale = decoded.params.global_scale
        assert runs.same_bytes(checkpoint.weight(target.name), dequantize(made, spec)), target.name
        assert (stored.weight, stored.input) == (target.weight, target.input)


def assert_servers_are_told(prepared: Any, scheme: str, folder: Path, err: str) -> None:
    """A checkpoint that nothing loads says so in the plan, on the screen and in the report."""
    served = "vllm" in prepared.dialect.loaders(prepared.plan)
    assert not served or scheme not in SIMULATIONS
    report = json.loads((folder / "quark" / "report.json").read_text())
    for text in (" ".join(prepared.warnings), err, " ".join(report["warnings"])):
        assert ("no server loads this plan" in text) != served, text
