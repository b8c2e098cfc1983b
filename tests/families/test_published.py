"""Models as they are published: tensors that the class does not load, loads transposed, or loads twice; no head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quarkcli.disk import verify
from quarkcli.errors import ModelError
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from tests import runs
from tests.families import models
from tests.plan.layouts import Shapes, lay_out, plan


def measured(made: runs.Made, page: Path) -> dict[str, Any]:
    return evaluate(
        str(made.folder), baseline=str(made.source), text=str(page), window=64, device="cpu", tell=silent
    )  # fmt: skip


# ---- not loaded: keys and values of blocks that share an earlier cache


def with_shared_keys(name: str, folder: Path) -> tuple[Path, list[str]]:
    """A source whose last blocks have k and v all the same, and the names of these tensors."""
    source = models.build(name, folder)
    file = source / "model.safetensors"
    tensors = load_file(file)
    blocks = sorted({int(found[1]) for key in tensors if (found := re.search(r"layers\.(\d+)\.", key))})
    added = {
        key.replace(f"layers.{index - 2}.", f"layers.{index}."): tensors[key].clone()
        for index in blocks
        for key in tensors
        if f"layers.{index - 2}.self_attn." in key and re.search(r"[kv]_proj|[kv]_norm", key)
    }
    added = {key: tensor for key, tensor in added.items() if key not in tensors}
    save_file(tensors | added, file, metadata={"format": "pt"})
    return source, sorted(added)


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text", "gemma4"])
@pytest.mark.parametrize(
    "options", [{"scheme": "nvfp4"}, {"scheme": "int8", "algorithm": "gptq"}, {"scheme": "fp8", "kv_cache": "fp8"}]
)
def test_keys_that_no_forward_reads_are_quantized_like_their_neighbours(
    name: str, options: dict[str, str], text: Path, page: Path, tmp_path: Path
) -> None:
    source, added = with_shared_keys(name, tmp_path / "m")
    assert any(key.endswith("k_proj.weight") for key in added)
    made = runs.run(source, tmp_path / "out", **options, **runs.data(text, 8, 32))
    unread = [key.removesuffix(".weight") for key in added if key.endswith("_proj.weight")]
    [warning] = [text for text in made.report["warnings"] if "does not load" in text]
    assert f"{len(unread)} of the quantized weights" in warning and unread[0] in warning
    written = runs.read_all(made.folder)
    for key in unread:
        query = re.sub("[kv]_proj$", "q_proj", key)
        for leaf in {found.removeprefix(f"{query}.") for found in written if found.startswith(f"{query}.input")}:
            assert torch.equal(written[f"{key}.{leaf}"], written[f"{query}.{leaf}"])
        assert f"{key.rpartition('.')[0]}.k_scale" not in written
    assert any(found.endswith(".k_scale") for found in written) == ("kv_cache" in options)
    assert verify.directory(str(made.folder), str(source))[-1].startswith("all ")
    assert 0 < measured(made, page)["kl"] < 0.3


def test_an_activation_that_only_unloaded_weights_read_is_refused_before_the_work(text: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.extra_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        runs.run(source, tmp_path / "out", scheme="fp8", **runs.data(text, 4, 32))
    assert "does not load the layers that read it" in caught.value.what
    assert caught.value.where == "model.layers.0.mlp.extra_proj.input"
    assert list(tmp_path.glob("out*")) == []


# ---- loaded twice: one block at two depths


@pytest.fixture(scope="module")
def zamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    config = transformers.Zamba2Config(
        vocab_size=272, hidden_size=64, num_hidden_layers=4, layers_block_type=kinds, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=128, mamba_d_state=16, mamba_expand=2, n_mamba_heads=8,
        mamba_ngroups=1, num_mem_blocks=1, use_mem_rope=True, adapter_rank=8, bos_token_id=0, eos_token_id=1,
        use_mem_eff_path=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Zamba2ForCausalLM(config)
    folder = tmp_path_factory.mktemp("zamba") / "m"
    model.to(torch.bfloat16).save_pretrained(folder)
    runs.tokenizer().save_pretrained(folder)
    return folder


def test_a_block_used_at_two_depths_is_quantized_without_data_and_measured(
    zamba: Path, page: Path, tmp_path: Path
) -> None:
    made = runs.run(zamba, tmp_path / "out", scheme="int8_dynamic")
    assert any("shared_transformer" in target.name for target in made.prepared.plan.quantized())
    assert 0 < measured(made, page)["kl"] < 0.01


@pytest.mark.parametrize("options", [{}, {"exclude": ["*adapter_list*"]}])
def test_a_block_used_at_two_depths_is_not_calibrated(
    options: dict[str, Any], zamba: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="decoder blocks 1 and 3 share weights"):
        runs.run(zamba, tmp_path / "out", scheme="fp8", **options, **runs.data(text, 4, 32))
    assert list(tmp_path.glob("out*")) == []


# ---- loaded transposed: Conv1D


def names_of_gpt2(linear: bool, stem: str = "transformer.h") -> Shapes:
    """Shapes of GPT-2, stored [in, out]; or of GPT-BigCode, which has its names, nn.Linear and one key head."""
    wide = {"attn.c_attn": 96 + 48 if linear else 288, "mlp.c_fc": 384}
    shapes: Shapes = {"transformer.wte.weight": (272, 96), "transformer.wpe.weight": (64, 96)}
    for block in (f"{stem}.{index}" for index in range(2)):
        for leaf, out, inner in [(leaf, out, 96) for leaf, out in wide.items()] + [
            ("attn.c_proj", 96, 96), ("mlp.c_proj", 96, 384),
        ]:  # fmt: skip
            shapes[f"{block}.{leaf}.weight"] = (out, inner) if linear else (inner, out)
            shapes[f"{block}.{leaf}.bias"] = (out,)
        shapes |= {f"{block}.ln_1.weight": (96,), f"{block}.ln_1.bias": (96,)}
    return shapes


GPT2 = {"n_embd": 96, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "imagegpt"])
@pytest.mark.parametrize("scheme", ["int4_wo_32", "mxfp4", "fp8"])
@pytest.mark.parametrize("biases", [True, False])
def test_weights_stored_in_out_are_refused_from_headers(kind: str, scheme: str, biases: bool) -> None:
    for stem in ("transformer.h", "h"):
        shapes = {name: shape for name, shape in names_of_gpt2(False, stem).items() if biases or "bias" not in name}
        with pytest.raises(ModelError, match=r"stored transposed.*like 7 more"):
            plan(scheme, lay_out(shapes, kind, **GPT2))


def test_linears_with_conv1d_names_are_quantized() -> None:
    made = plan("mxfp4", lay_out(names_of_gpt2(True), "gpt_bigcode", **GPT2))
    assert {target.name.rpartition(".")[2] for target in made.quantized()} == {"c_attn", "c_fc", "c_proj"}


# ---- without a head


def test_a_base_model_keeps_its_names_is_calibrated_and_has_nothing_to_measure(
    sources: dict[str, Path], text: Path, page: Path, tmp_path: Path
) -> None:
    """As encoders and embedding models are published: no first step in names, no head, class LlamaModel."""
    transformers.LlamaModel.from_pretrained(sources["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    runs.tokenizer().save_pretrained(tmp_path / "m")
    full = runs.run(sources["llama"], tmp_path / "full", scheme="nvfp4", **runs.data(text, 8, 32))
    base = runs.run(tmp_path / "m", tmp_path / "base", scheme="nvfp4", **runs.data(text, 8, 32))
    ours, theirs = runs.read_all(base.folder), runs.read_all(full.folder)
    assert {f"model.{name}" for name in ours} == set(theirs) - {"lm_head.weight"}
    assert all(runs.same_bytes(ours[name], theirs[f"model.{name}"]) for name in ours)
    with pytest.raises(ModelError, match="the model has no head, so it gives no probabilities to measure"):
        measured(base, page)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_wrapped_names_are_refused(prefix: str, sources: dict[str, Path], tmp_path: Path) -> None:
    tensors = {prefix + name: tensor for name, tensor in runs.read_all(sources["llama"]).items()}
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text((sources["llama"] / "config.json").read_text())
    with pytest.raises(ModelError, match=prefix[:-1]) as caught:
        runs.prepare(tmp_path / "m", scheme="mxfp4")
    assert caught.value.hint is not None and "lm_head.weight" in caught.value.hint
