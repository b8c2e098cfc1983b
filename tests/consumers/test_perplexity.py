"""What transformers measures on a written checkpoint, against `quark eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from tests import runs

from .loading import divergence, in_float32, load, log_probabilities, perplexity, windows

WEIGHTS_ONLY = """\
schema: quark/recipe/1
metadata: {name: nvfp4-weights}
quantize:
  quant_cfg:
    - {quantizer_path: '*', enable: false}
    - quantizer_path: '*.weight_quantizer'
      cfg: {element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, global_scale: {dtype: f32}}}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.txt"
    path.write_text(runs.topics(-12, -1)[:12_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(page: Path) -> torch.Tensor:
    return windows(AutoTokenizer.from_pretrained(EMBEDDED), page.read_text(), 128)


@pytest.fixture(scope="module")
def base(rows: torch.Tensor) -> torch.Tensor:
    return log_probabilities(AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32), rows)


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory: pytest.TempPathFactory) -> runs.Made:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "recipe.yaml").write_text(WEIGHTS_ONLY)
    return runs.run("demo", folder / "out", recipe=str(folder / "recipe.yaml"))


def ours(folder: Path, page: Path) -> dict:
    return evaluate(str(folder), baseline=str(EMBEDDED), text=str(page), window=128, device="cpu", tell=silent)


def compare(result: dict, scores: torch.Tensor, base: torch.Tensor, rows: torch.Tensor, close: float = 0.01) -> None:
    """Everything `quark eval` says, measured from transformers' own logits."""
    assert result["tokens"] == rows[:, 1:].numel()
    assert result["perplexity"] == pytest.approx(perplexity(scores, rows), rel=close)
    assert result["baseline_perplexity"] == pytest.approx(perplexity(base, rows), rel=1e-4)
    assert result["kl"] == pytest.approx(divergence(base, scores), rel=0.1)
    agree = float((base.argmax(-1) == scores.argmax(-1)).float().mean())
    assert result["top1_agreement"] == pytest.approx(agree, abs=0.015)


def test_of_integers(demo: dict[str, runs.Made], page: Path, rows: torch.Tensor, base: torch.Tensor) -> None:
    model, wrong = load(demo["int4_wo_128"].folder, torch.float32)
    assert not any(wrong.values())
    compare(ours(demo["int4_wo_128"].folder, page), log_probabilities(model, rows), base, rows)


def test_of_two_level_scales(weights_only: runs.Made, page: Path, rows: torch.Tensor, base: torch.Tensor) -> None:
    assert weights_only.report["calibration"] is None
    scores = log_probabilities(in_float32(weights_only.folder), rows)
    compare(ours(weights_only.folder, page), scores, base, rows)


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8", "mxfp4"])
def test_with_quantized_inputs_and_cache(
    scheme: str, demo: dict[str, runs.Made], page: Path, rows: torch.Tensor, base: torch.Tensor
) -> None:
    """transformers simulates quantized activations too; a last bit in bfloat16 moves many 4-bit codes."""
    scores = log_probabilities(in_float32(demo[scheme].folder), rows)
    compare(ours(demo[scheme].folder, page), scores, base, rows, close=0.02)


@pytest.mark.parametrize(("scheme", "block"), [("mxfp4", 32), ("nvfp4", 128)])
def test_with_turned_inputs(
    scheme: str, block: int, page: Path, rows: torch.Tensor, base: torch.Tensor, text: Path, tmp_path: Path
) -> None:
    """compressed-tensors applies the written config to the loaded model, whose weights are turned already."""
    data = runs.data(text, 16, 128) if scheme in runs.CALIBRATED else {}
    made = runs.run("demo", tmp_path / "out", scheme=scheme, algorithm="hadamard", **data)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]["transform_config"]
    tensors = runs.read_all(made.folder)
    (matrix,) = [name for name in tensors if name.endswith(f".hadamard_{block}_input.weight")]
    model = in_float32(made.folder, frozenset({matrix}))
    lost = log_probabilities(model, rows)  # transformers 5.22 to 5.24 turn nothing
    apply_transform_config(model, TransformConfig.model_validate(config))
    scores = log_probabilities(model, rows)
    result = ours(made.folder, page)
    compare(result, scores, base, rows, close=0.02)
    assert divergence(base, lost) > 10 * result["kl"]
    for module in made.prepared.plan.online:
        applied = model.get_submodule(module).get_submodule(f"hadamard_{block}_input")
        assert torch.equal(applied.weight.float(), tensors[matrix].float())
