"""How families store experts, against the modules that transformers fills from the file; read back after quantizing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError, DataError
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from tests import runs, tiny
from tests.families import models

# One of each kind: one by one, fused, transposed, interleaved, stacked in 2-D, below another module, without a gate.
STORED = (
    "qwen2_moe", "minimax_m2", "deepseek_v4", "qwen3_5_moe", "qwen3_vl_moe", "llama4", "gpt_oss", "dbrx",
    "granitemoehybrid", "gemma4_moe_text", "nemotron_h_latent", "minimax_m3_vl",
)  # fmt: skip


def experts_of(model: Any) -> list[Any]:
    """Experts modules in the order of the blocks."""
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


def of_module(module: Any, index: int, role: str) -> Tensor:
    """[out, in] of one expert, as the module's own forward uses its parameters."""
    if hasattr(module, "mlp"):  # dbrx: x @ w1.T, x @ v1.T, h @ w2
        leaf = {"expert_gate": "w1", "expert_up": "v1", "expert_down": "w2"}[role]
        whole = getattr(module.mlp, leaf)
        own = whole.view(4, -1, whole.shape[-1])[index]
        return own.T if role == "expert_down" else own
    transposed = getattr(module, "is_transposed", not hasattr(module, "has_gate"))
    if role == "expert_down":
        return module.down_proj[index].T if transposed else module.down_proj[index]
    if not getattr(module, "has_gate", True):
        return module.up_proj[index]
    both = module.gate_up_proj[index].T if transposed else module.gate_up_proj[index]
    if not getattr(module, "is_concatenated", True):
        return both[role == "expert_up" :: 2]
    return both.chunk(2)[role == "expert_up"]


@pytest.mark.parametrize("name", STORED)
def test_views_find_what_transformers_computes_with(name: str, built: dict[str, Path]) -> None:
    _, layout = models.described(built[name])
    tensors = runs.read_all(built[name])
    model = getattr(transformers, models.RECIPES[name]["model"]).from_pretrained(built[name], dtype=torch.bfloat16)
    layers = list(dict.fromkeys(weight.expert[0] for weight in layout.weights.values() if weight.expert))
    modules = dict(zip(layers, experts_of(model), strict=True))
    for weight in (weight for weight in layout.weights.values() if weight.expert):
        prefix, index = weight.expert
        found = weight.view.of(tensors[weight.view.tensor])
        assert tuple(found.shape) == weight.shape
        assert torch.equal(found, of_module(modules[prefix], index, weight.role)), weight.name


@pytest.mark.parametrize("name", STORED)
def test_a_quantized_checkpoint_is_read_back_and_measured(
    name: str, built: dict[str, Path], page: Path, tmp_path: Path
) -> None:
    made = runs.run(built[name], tmp_path / "out", scheme="mxfp4")
    result = evaluate(
        str(made.folder), baseline=str(built[name]), text=str(page), window=64, device="cpu", tell=silent
    )  # fmt: skip
    assert 0 < result["kl"] < 0.2


# ---- square experts


@pytest.mark.parametrize("inner", [64, 128])  # gate and up together, or down, are as wide as high
def test_square_experts_are_read_the_way_their_layer_tells(inner: int, page: Path, text: Path, tmp_path: Path) -> None:
    """Published files hold [in, out], transformers saves [out, in]: both must become the same checkpoint."""
    made = {}
    for published in (True, False):
        source = models.build("qwen3_vl_moe", tmp_path / f"m{published}", published, moe_intermediate_size=inner)
        made[published] = runs.run(source, tmp_path / f"out{published}", scheme="nvfp4", **runs.data(text, 8, 32))
    assert runs.same_files(made[True].folder, made[False].folder)
    scores = [
        evaluate(str(made[True].folder), baseline=str(made[form].source), text=str(page), window=64, tell=silent)
        for form in (True, False)
    ]
    assert 0 < scores[0]["kl"] < 0.2
    assert scores[0]["kl"] == scores[1]["kl"]
    assert scores[0]["baseline_perplexity"] == scores[1]["baseline_perplexity"]


# ---- caches


@pytest.mark.parametrize("name", ["phi3", "dbrx", "gemma4_text", "llama4", "nemotron_h"])
def test_caches_of_fused_and_shared_projections(name: str, built: dict[str, Path], text: Path, tmp_path: Path) -> None:
    made = runs.run(built[name], tmp_path / "out", scheme="mxfp4", kv_cache="fp8", **runs.data(text, 8, 32))
    owners = {key.rsplit(".", 1)[0] for key in runs.read_all(made.folder) if key.endswith("k_scale")}
    _, layout = models.described(built[name])
    assert owners == {module.name for module in layout.attention}


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k25", "deepseek_v4"])
def test_a_latent_cache_gets_no_scales_of_k_and_v(name: str, built: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="compressed latent") as caught:
        runs.prepare(built[name], scheme="mxfp4", kv_cache="fp8")
    assert caught.value.where.endswith("attn.k_bmm_quantizer")


@pytest.mark.parametrize("name", ["phi3", "dbrx", "deepseek_v3"])
def test_one_scale_for_all_that_a_linear_makes(name: str, built: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """In the dialect that has one: the largest of what the others would store, and of q where the linear makes it."""
    how = {"scheme": "mxfp4", "kv_cache": "fp8", **runs.data(text, 8, 32)}
    made = runs.run(built[name], tmp_path / "out", dialect="quark", **how)
    modules = made.prepared.plan.attention.values()
    scales = {key: float(value) for key, value in runs.read_all(made.folder).items() if key.endswith("output_scale")}
    assert set(scales) == {f"{module.k_proj}.output_scale" for module in modules}
    read = Checkpoint(Source.open(str(made.folder))).view.attention
    assert {stored.scales["k"] for stored in read.values()} == {stored.scales["v"] for stored in read.values()}
    assert {stored.scales["k"] for stored in read.values()} == set(scales)
    assert verify.directory(str(made.folder), str(built[name]))
    evaluate(str(made.folder), text=str(text), window=32, max_tokens=64, device="cpu", tell=silent)
    if name == "deepseek_v3":
        return
    own = runs.read_all(runs.run(built[name], tmp_path / "ct", dialect="compressed-tensors", **how).folder)
    first = min(modules, key=lambda module: module.part)  # later blocks read what other scales make of it
    of_cache = max(float(own[f"{first.name}.{kind}_scale"]) for kind in "kv")
    assert scales[f"{first.k_proj}.output_scale"] >= of_cache
    with pytest.raises(ConfigError, match="these need two plans"):
        runs.prepare(built[name], dialect="compressed-tensors,quark", **how)


def test_the_one_scale_covers_queries_too(built: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """amd-quark rounds all that the linear makes with it."""
    how = {"scheme": "mxfp4", "kv_cache": "fp8", "dialect": "quark", "exclude": ["*qkv_proj"], **runs.data(text, 8, 32)}
    source = shutil.copytree(built["phi3"], tmp_path / "source")
    name = "model.layers.0.self_attn.qkv_proj"
    plain = runs.read_all(runs.run(source, tmp_path / "plain", **how).folder)
    tensors = runs.read_all(source)
    config = json.loads((source / "config.json").read_text())
    queries = config["num_attention_heads"] * (config["hidden_size"] // config["num_attention_heads"])
    tensors[f"{name}.weight"][:queries] *= 64
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    loud = runs.read_all(runs.run(source, tmp_path / "loud", **how).folder)
    assert float(loud[f"{name}.output_scale"]) > 8 * float(plain[f"{name}.output_scale"])


def test_a_cache_that_cannot_be_seen(
    built: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = built["llama"]
    tiny.hide_attention(monkeypatch)
    with pytest.raises(DataError, match="no calibration token reached"):
        runs.run(source, tmp_path / "out", scheme="mxfp4", kv_cache="fp8", **runs.data(text, 8, 32))


@pytest.mark.parametrize(("name", "extra"), [("glm4_moe", "model.layers.2"), ("qwen3_5_moe_text", "mtp.layers.0")])
def test_extra_layers_are_written_as_they_are(name: str, extra: str, tmp_path: Path) -> None:
    """An MTP layer behind the blocks or beside them, its experts one by one whatever those of the blocks are."""
    source = models.build(name, tmp_path / "source")
    tensors = runs.read_all(source)
    single = tensors if name == "glm4_moe" else runs.read_all(models.build("qwen2_moe", tmp_path / "other"))
    start = "model.layers.1."
    copies = {f"{extra}.{key.removeprefix(start)}": value for key, value in single.items() if key.startswith(start)}
    assert any(".experts.3." in key for key in copies)
    tensors |= {key: value.clone() for key, value in copies.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = runs.run(source, tmp_path / "out", scheme="mxfp4")
    written = runs.read_all(made.folder)
    for key, value in copies.items():
        assert "mtp" in made.report["kept"][key]
        assert runs.same_bytes(written[key], value)
    assert (
        verify.directory(str(made.folder), str(source))[-1]
        == f"all {len(tensors)} tensors of the original model are there"
    )
