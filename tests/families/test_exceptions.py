"""Families nobody described, experts left out, fused files, tied heads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    HeliumConfig,
    MambaConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    RwkvConfig,
)

from quarkcli import servers
from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.compare import compare
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError, ConfigError, ModelError
from quarkcli.evaluation.run import evaluate
from quarkcli.events import Message, silent
from tests import runs
from tests.families import models

PREFIX = "model.layers.0.mlp.experts"


@pytest.fixture
def unknown(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama under a name that neither quark nor transformers knows."""
    folder = tmp_path / "unknown"
    shutil.copytree(sources["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


@pytest.mark.parametrize("scheme", ["mxfp4", "int4_wo_128"])
def test_an_unknown_family_needs_no_description_without_data(
    scheme: str, unknown: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    made = runs.run(unknown, tmp_path / "out", scheme=scheme)
    assert len(made.report["warnings"]) == 1
    assert "novel" in made.report["warnings"][0] and "guessed the roles" in made.report["warnings"][0]
    assert made.report["model"]["family"] == "novel"
    assert verify.directory(str(made.folder), str(unknown))[-1].startswith("all ")
    known = runs.run(sources["llama"], tmp_path / "known", scheme=scheme)
    assert runs.same_files(made.folder, known.folder)  # the usual names are enough to find every role


def fresh(config: PreTrainedConfig, folder: Path) -> Path:
    """A model of a class of transformers that no family file describes."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    runs.tokenizer().save_pretrained(folder)
    return folder


def test_what_servers_do_with_an_unknown_family_is_unknown(unknown: Path) -> None:
    prepared = runs.prepare(unknown, scheme="nvfp4")
    what = "may load it: quark has no family file for model type 'novel', and does not know its class there"
    lines = servers.verdicts("auto", servers.planned(prepared.plan, prepared.dialect))
    assert f"vLLM 0.32 {what}" in lines and f"transformers 5.23 {what}" in lines
    assert not any("loads it" in line or "no known server" in line for line in lines)
    assert prepared.dialect.name == "compressed-tensors"
    with pytest.raises(ModelError, match=r"vLLM 0\.32 may not load it: quark has no family file") as caught:
        runs.prepare(unknown, scheme="nvfp4", target="vllm")
    assert "describe the model in a family file" in str(caught.value.hint)


def test_a_head_that_is_the_embedding_in_an_unknown_family(tmp_path: Path) -> None:
    """Helium. The config has to name the head, or compressed-tensors looks for its codes."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = HeliumConfig(**sizes, tie_word_embeddings=True)
    made = runs.run(fresh(config, tmp_path / "m"), tmp_path / "out", scheme="int4_wo_32")
    assert made.prepared.plan.guessed and made.prepared.plan.tied_head == "lm_head"
    model, told = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


def test_linears_whose_names_say_that_they_share_an_input(tmp_path: Path, text: Path) -> None:
    """Keys, values and receptances of RWKV read different mixtures of two tokens; where
    training starts, those of the first block are alike."""
    config = RwkvConfig(vocab_size=512, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2)
    source = fresh(config, tmp_path / "m")
    with pytest.raises(ModelError, match=r"reads another input than rwkv\.blocks\.1\.attention\.key") as caught:
        runs.run(source, tmp_path / "out", scheme="int4_wo_32", algorithm="gptq", **runs.data(text))
    assert caught.value.where == "rwkv.blocks.1.attention.value"


def test_an_unknown_family_cannot_be_calibrated(unknown: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        runs.run(unknown, tmp_path / "out", scheme="nvfp4", **runs.data(text))
    assert "novel" in str(error.value).lower()
    assert not (tmp_path / "out").exists()


def test_blocks_without_a_norm_behind_them(text: Path, page: Path, tmp_path: Path) -> None:
    """OPT of 350 million: norms behind attention and MLP, linears between the widths of embedding and blocks."""
    source = models.build("opt", tmp_path / "opt", do_layer_norm_before=False, word_embed_proj_dim=64)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_32", algorithm="gptq", **runs.data(text))
    result = evaluate(str(made.folder), baseline=str(source), text=str(page), window=64, device="cpu", tell=silent)
    assert 0 < result["kl"] < 0.05
    ids = torch.tensor(runs.tokenizer().encode(page.read_text(), add_special_tokens=False))
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = OPTForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert result["baseline_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    other = models.build("opt", tmp_path / "other")
    tensors = runs.read_all(other)
    del tensors["model.decoder.final_layer_norm.weight"]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.decoder\.final_layer_norm\.weight is missing"):
        runs.prepare(other, scheme="int4_wo_32")


def test_fused_and_single_experts_become_the_same_files(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for scheme in ("mxfp4", "nvfp4"):
        data = runs.data(text) if scheme == "nvfp4" else {}
        both = [
            runs.run(sources[name], tmp_path / f"{name}-{scheme}", scheme=scheme, dialect="quark", **data)
            for name in ("qwen3_moe", runs.FUSED)
        ]
        assert runs.same_files(both[0].folder, both[1].folder)
        assert both[0].report["split"] == {}
        assert set(both[1].report["split"].values()) == {4, 8}  # down; gate and up


@pytest.mark.parametrize("name", ["qwen3_moe", runs.FUSED, "gpt_oss"])
def test_an_expert_left_out_is_written_alone(
    name: str, sources: dict[str, Path], text: Path, page: Path, tmp_path: Path
) -> None:
    """No server has experts of two schemes in a layer, so that it has to be meant (`--target none`)."""
    source = sources[name]
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128", exclude=["*experts.1.*"], target="none")
    written = runs.read_all(made.folder)
    before = runs.read_all(source)
    fused = f"{PREFIX}.gate_up_proj" in before
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        found = written[f"{PREFIX}.1.{leaf}.weight"]
        assert found.dtype == torch.bfloat16
        assert found.equal(of_fused(before, leaf, name == "gpt_oss") if fused else before[f"{PREFIX}.1.{leaf}.weight"])
        assert f"{PREFIX}.1.{leaf}.weight_scale" not in written
        assert f"{PREFIX}.0.{leaf}.weight_scale" in written
    assert f"{PREFIX}.gate_up_proj" not in written
    assert made.report["experts"]["share_quantized"] == 0.75
    assert made.prepared.forecast.output_bytes == sum(f.stat().st_size for f in made.folder.glob("*.safetensors"))
    assert verify.directory(str(made.folder), str(source), "none")[-1].startswith("all ")
    result = evaluate(str(made.folder), baseline=str(source), text=str(page), window=64, device="cpu", tell=silent)
    assert 0 < result["kl"] < 0.05


def of_fused(tensors: dict[str, torch.Tensor], leaf: str, interleaved: bool) -> torch.Tensor:
    """Expert 1 by hand: gpt-oss interleaves gate and up and stores [in, out], Qwen stacks halves of [out, in]."""
    if leaf == "down_proj":
        down = tensors[f"{PREFIX}.down_proj"][1]
        return down.T if interleaved else down
    both = tensors[f"{PREFIX}.gate_up_proj"][1]
    if interleaved:
        return both.T[leaf == "up_proj" :: 2]
    return both.chunk(2)[leaf == "up_proj"]


@pytest.mark.parametrize("name", ["qwen3_moe", runs.FUSED])
def test_projections_of_one_expert_differ_only_when_it_is_meant(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    flags = {"scheme": "mxfp4", "exclude": ["*experts.1.up_proj"]}
    with pytest.raises(ModelError, match="servers multiply together have more than one scheme"):
        runs.prepare(sources[name], **flags)
    made = runs.run(sources[name], tmp_path / "out", target="none", **flags)
    written = runs.read_all(made.folder)
    assert written[f"{PREFIX}.1.up_proj.weight"].dtype == torch.bfloat16
    assert f"{PREFIX}.1.gate_proj.weight_packed" in written
    assert verify.directory(str(made.folder), str(sources[name]), "none")[-1].startswith("all ")


def test_a_tied_head_follows_the_embedding(tmp_path: Path, page: Path) -> None:
    source = runs.build("llama_tied", tmp_path / "tied", head_dim=64)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128")
    assert made.report["tied_head"] == "lm_head"
    assert "lm_head.weight" not in runs.read_all(made.folder)
    config = json.loads((made.folder / "quantization_config.json").read_text())
    assert "lm_head" in config["ignore"]
    result = evaluate(str(made.folder), baseline=str(source), text=str(page), window=64, device="cpu", tell=silent)
    assert 0 < result["kl"] < 0.05


def test_a_checkpoint_reads_back_in_the_form_of_its_source(sources: dict[str, Path], tmp_path: Path) -> None:
    """Fused or one by one as the family's published files have experts, whichever the source's own have."""
    for name in ("gpt_oss", "mixtral"):
        made = runs.run(sources[name], tmp_path / name, scheme="fp8", exclude=["*"], include=["*experts*"],
                        calib_data="builtin", calib_samples=8, calib_seqlen=64)  # fmt: skip
        checkpoint = Checkpoint(Source.open(str(made.folder)))
        before = runs.read_all(sources[name])
        assert {key: tuple(header.shape) for key, header in checkpoint.headers.items()} == {
            key: tuple(tensor.shape) for key, tensor in before.items()
        }
        read = checkpoint.read_many(before)
        for key, tensor in before.items():
            assert read[key].dtype == tensor.dtype
            error = float((read[key].float() - tensor.float()).norm() / tensor.float().norm())
            assert error == 0 if "expert" not in key or "bias" in key else 0 < error < 0.03, key


def test_experts_fused_in_the_source_read_back_one_by_one(sources: dict[str, Path], tmp_path: Path) -> None:
    """The family's published files have them one by one; what is not an expert is the same tensor."""
    made = runs.run(sources[runs.FUSED], tmp_path / "out", scheme="fp8", exclude=["*"], include=["*experts*"],
                    calib_data="builtin", calib_samples=8, calib_seqlen=64)  # fmt: skip
    found = compare(*(Checkpoint(Source.open(str(folder))) for folder in (made.folder, sources[runs.FUSED])))
    assert found.complete
    experts = [row for row in found.rows if "experts" in row.name]
    assert len(experts) == len(list(made.prepared.plan.quantized()))
    assert all(30 < row.sqnr < 50 for row in experts)  # an error of 0.3 to 3 %
    assert all(row.identical for row in found.rows if row not in experts)


def test_verify_finds_what_is_wrong(sources: dict[str, Path], tmp_path: Path) -> None:
    """Another source, a lost shard, a scale of zero: what it is, and that the manifest knew other files."""
    made = runs.run(sources["qwen3"], tmp_path / "out", scheme="fp8", calib_data="builtin",
                    calib_samples=8, calib_seqlen=64)  # fmt: skip
    with pytest.raises(CheckError, match="tensors of the original model are missing"):
        verify.directory(str(made.folder), str(sources["mixtral"]))
    spoil(made.folder, "model.layers.0.mlp.up_proj.input_scale", 0.0)
    with pytest.raises(
        CheckError, match=r"zero, negative.*up_proj.input_scale \(zero\)\nalso: 1 files have other bytes"
    ):
        verify.directory(str(made.folder))
    spoil(made.folder, "model.layers.0.mlp.up_proj.input_scale", 3.0)
    told: list[Any] = []
    with pytest.raises(CheckError, match=r"^1 files have other bytes than in the manifest: \S+block-00000\S+$"):
        verify.directory(str(made.folder), tell=told.append)
    texts = [event.text for event in told if isinstance(event, Message)]
    assert any(re.search(r"1 scale groups do not share.*gate_proj\+up_proj", text) for text in texts)
    next(made.folder.glob("*block-00001*")).unlink()
    with pytest.raises(CheckError, match=r"block-00001(.*\n)+also: 1 files of the manifest are missing: \S+00001"):
        verify.directory(str(made.folder))
    with pytest.raises(CheckError, match="no quantization_config"):
        verify.directory(str(sources["qwen3"]))


def spoil(folder: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = torch.full_like(tensors[name], value)
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [MambaConfig, FalconMambaConfig])
def test_mamba_alone_has_nothing_that_servers_take_quantized(kind: type[PreTrainedConfig], tmp_path: Path) -> None:
    """It was refused for the width of its time step alone; without that linear, vLLM was said to load it, perhaps."""
    source = fresh(kind(vocab_size=512, hidden_size=64, num_hidden_layers=2, time_step_rank=8), tmp_path / "source")
    with pytest.raises(ConfigError) as caught:
        runs.prepare(source, scheme="mxfp4")
    assert "role mamba" in caught.value.hint and "vLLM takes it in 16 bits alone" in caught.value.hint
    takes = {}
    for scheme in ("int8_dynamic", "int4_wo_32"):
        made = runs.prepare(
            source, scheme=scheme, unprotect=["mamba"], exclude=["*.dt_proj"], dialect="compressed-tensors"
        )
        assert {target.name.rpartition(".")[2] for target in made.plan.quantized()} == {"in_proj", "out_proj", "x_proj"}
        takes[scheme] = made.dialect.loaders(made.plan)
    assert takes == {"int8_dynamic": {"transformers"}, "int4_wo_32": set()}
