"""Every family file, on a tiny model that transformers builds or on headers: planned, quantized, accounted for."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from quarkcli import dialects, family
from quarkcli.dialects._patterns import WrittenNames
from quarkcli.disk import verify
from quarkcli.errors import DataError, ModelError
from quarkcli.recipe import catalog
from tests import runs, tiny
from tests.families import models

NAMES = tuple(models.RECIPES)
FILES = catalog.files("models")
BUILDABLE = {recipe["file"] for recipe in models.RECIPES.values()}
# Families of the peers without a class in transformers 5.
FROM_HEADERS = {"chatglm", "deepseek", "deepseek_vl_v2", "grok_1", "instella", "qwen"}
# All of their linears stay as they are, unless their role is unprotected (test_exceptions).
KEPT_WHOLE = {"mamba"}
# Their experts lie as no server has them, or vLLM loads none of them (`in_vllm`, `served`, `unread`).
UNSERVED = {"gemma3", "gpt_oss", "dbrx", "stablelm_parallel", "cosmos3_edge", "voxtral"}
# Linears that some members have and the tiny models do not.
ELSEWHERE = {
    "self_attn.q_proj": "DeepSeek V2 Lite",
    **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], "mixtures with dense blocks"),
}


def test_every_file_is_tried() -> None:
    assert set(FILES) == BUILDABLE | FROM_HEADERS | KEPT_WHOLE
    assert not BUILDABLE & FROM_HEADERS


@pytest.mark.parametrize("file", sorted(FILES))
def test_transformers_has_a_class_for_the_model_types(file: str) -> None:
    said = family.load(FILES[file])
    assert {kind in CONFIG_MAPPING for kind in said.model_types} == {not said.own_code}


# ---- runs


@pytest.mark.parametrize("name", NAMES)
def test_without_data(name: str, built: dict[str, Path], tmp_path: Path) -> None:
    made = runs.run(built[name], tmp_path / "out", scheme="mxfp4")
    assert made.report["model"]["family"] == models.RECIPES[name]["file"]
    assert runs.warnings_but(runs.UNSERVED, made) == []
    assert len(made.report["warnings"]) == (name in UNSERVED)
    check_accounts(made)
    check_names(name, made)


@pytest.mark.parametrize("name", NAMES)
def test_calibrated(name: str, built: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """With everything quantized that the family leaves alone by default, so that its sites are all measured."""
    options = {"unprotect": list(family.load(FILES[models.RECIPES[name]["file"]]).exclude), **runs.data(text, 8, 32)}
    made = runs.run(built[name], tmp_path / "out", scheme="nvfp4", **options)
    check_accounts(made)
    said = runs.warnings_but(runs.UNSERVED, made)
    assert all("experts saw no calibration token" in warning for warning in said)
    assert len(made.report["warnings"]) - len(said) == (name in UNSERVED)
    scaled = {key for key in runs.read_all(made.folder) if key.endswith("input_global_scale")}
    assert scaled == {f"{target.name}.input_global_scale" for target in made.prepared.plan.quantized()}


def check_accounts(made: runs.Made) -> None:
    """Every tensor of the source is quantized, or kept byte for byte for a reason that names a rule."""
    plan, source, written = made.prepared.plan, runs.read_all(made.source), runs.read_all(made.folder)
    quantized = {target.view.tensor for target in plan.quantized()}
    assert quantized | set(plan.kept) == set(source) and not quantized & set(plan.kept)
    for name, reason in plan.kept.items():
        assert runs.same_bytes(written[name], source[name]), name
        assert reason not in {"no entry matched", "not part of the family"}, name
    for target in plan.quantized():
        assert f"{target.name}.weight_packed" in written, target.name
    assert verify.directory(str(made.folder), str(made.source))[-1] == (
        f"all {len(source)} tensors of the original model are there"
    )  # fmt: skip


def check_names(name: str, made: runs.Made) -> None:
    """Of the linears in transformers' memory, a config in compressed-tensors names those that have codes."""
    dense = {target.name: target.part for target in made.prepared.plan.quantized() if target.expert is None}
    last = [module for module, part in dense.items() if part == max(dense.values())]
    plan = runs.prepare(made.source, scheme="mxfp4", exclude=last).plan
    own, config = family.load(FILES[models.RECIPES[name]["file"]]), dialects.writer("compressed-tensors").config(plan)
    codes = {own.in_memory(target.name) for target in plan.quantized() if target.expert is None}
    found = models.linears(name)
    said = WrittenNames(config["ignore"], found)
    assert {module for module in found if not said.named(module, config["ignore"])} == codes & found
    assert config["config_groups"]["group_0"]["targets"][0] == "Linear"


# ---- what the files say


@pytest.mark.parametrize("file", sorted(BUILDABLE))
def test_names_exist(file: str, built: dict[str, Path]) -> None:
    """Roles, sites, groups, exclusions and rewrites name tensors of one of the family's tiny models."""
    leaves: set[str] = set()
    modules: set[str] = set()
    for name in (name for name in NAMES if models.RECIPES[name]["file"] == file):
        found, layout = models.described(built[name])
        modules |= {tensor.removesuffix(".weight") for tensor in runs.read_all(built[name])} | set(layout.weights)
        leaves |= {re.sub(rf"^{re.escape(found.blocks)}\.\d+\.", "", module) for module in modules}
    said = family.load(FILES[file])
    listed = [*said.sites, *(said.scale_groups or []), *([pair.source, *pair.readers] for pair in said.scaling)]
    listed += [[*rule.writers, *rule.readers] for rule in said.channels]
    listed += [[said.heads.writer, said.heads.reader]] if said.heads else []
    if said.residual and said.residual.no_permutation is None:
        listed += [said.residual.reads, said.residual.writes, said.residual.norms]
    unknown = {leaf for group in listed for leaf in group if not any(fnmatchcase(known, leaf) for known in leaves)}
    assert unknown <= set(ELSEWHERE)
    for role, patterns in found.exclude.items():
        assert all(any(fnmatchcase(module, pattern) for module in modules) for pattern in patterns), role


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_experts_are_found(name: str, built: dict[str, Path]) -> None:
    found, layout = models.described(built[name])
    config = models.RECIPES[name]["config"]
    text = config.get("text_config", config)
    count = next((text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), 0)
    layers = {weight.expert[0] for weight in layout.weights.values() if weight.expert}
    if found.experts is not None and count:
        assert layers
        per_expert = 3 if found.experts.gate else 2
        assert sum(weight.expert is not None for weight in layout.weights.values()) == len(layers) * count * per_expert
    assert layout.attention
    assert all(module.k_proj in layout.weights and module.v_proj in layout.weights for module in layout.attention)


# ---- families without a class


def block(prefix: str, **shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{leaf.replace('__', '.')}.weight": shape for leaf, shape in shapes.items()}


def gated(prefix: str, gate: str, up: str, down: str, inner: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{prefix}.{leaf}.weight": (inner, 128) for leaf in (gate, up)}
    return {**wide, f"{prefix}.{down}.weight": (128, inner)}


def plain_attention(prefix: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{leaf}_proj.weight": (128, 128) for leaf in "qkvo"}


def outside(embed: str, norm: str, head: str) -> dict[str, tuple[int, ...]]:
    return {f"{embed}.weight": (512, 128), norm: (128,), f"{head}.weight": (512, 128)}


def mixture(prefix: str, moe: str, leaves: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
    found = {f"{prefix}.{moe}.gate.weight": (4, 128)}
    for expert in range(4):
        found |= gated(f"{prefix}.{moe}.experts.{expert}", *leaves, 96)
    return found


USUAL = ("gate_proj", "up_proj", "down_proj")


def deepseek(text: str) -> dict[str, tuple[int, ...]]:
    """A dense block, a block with experts, and a vision tower where the text is inside a wrapper."""
    head = "lm_head" if text == "model" else "language.lm_head"
    shapes = outside(f"{text}.embed_tokens", f"{text}.norm.weight", head)
    for index in range(2):
        shapes |= plain_attention(f"{text}.layers.{index}.self_attn")
    shapes |= gated(f"{text}.layers.0.mlp", *USUAL, 256)
    shapes |= mixture(f"{text}.layers.1", "mlp", USUAL) | gated(f"{text}.layers.1.mlp.shared_experts", *USUAL, 96)
    if text != "model":
        shapes |= {"vision.blocks.0.attn.qkv.weight": (96, 32), "projector.layers.0.weight": (128, 32)}
    return shapes


def published(file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small model as its published files have them."""
    if file == "deepseek":
        return deepseek("model")
    if file == "deepseek_vl_v2":
        return deepseek("language.model")
    shapes: dict[str, tuple[int, ...]] = {}
    if file == "chatglm":
        for index in range(2):
            inside = f"transformer.encoder.layers.{index}"
            shapes |= block(
                inside, self_attention__query_key_value=(192, 128), self_attention__dense=(128, 128),
                mlp__dense_h_to_4h=(512, 128), mlp__dense_4h_to_h=(128, 256), input_layernorm=(128,),
                post_attention_layernorm=(128,),
            ) | {f"{inside}.self_attention.query_key_value.bias": (192,)}  # fmt: skip
        ends = outside(
            "transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm.weight",
            "transformer.output_layer",
        )  # fmt: skip
    elif file == "qwen":
        for index in range(2):
            shapes |= block(
                f"transformer.h.{index}", attn__c_attn=(384, 128), attn__c_proj=(128, 128), mlp__w1=(256, 128),
                mlp__w2=(256, 128), mlp__c_proj=(128, 256), ln_1=(128,), ln_2=(128,),
            )  # fmt: skip
        ends = outside("transformer.wte", "transformer.ln_f.weight", "lm_head")
    else:
        for index in range(2):
            inside = f"model.layers.{index}"
            if file == "instella":
                shapes |= plain_attention(f"{inside}.self_attn") | gated(f"{inside}.mlp", *USUAL, 256)
                shapes |= block(inside, self_attn__q_norm=(128,), pre_attention_layernorm=(128,))
                shapes |= block(inside, pre_feedforward_layernorm=(128,))
            else:
                shapes |= plain_attention(f"{inside}.attn") | {f"{inside}.pre_attn_norm.scale": (128,)}
                shapes |= mixture(inside, "moe_block", ("linear", "linear_v", "linear_1"))
        norm = "model.norm.weight" if file == "instella" else "model.norm.scale"
        ends = outside("model.embed_tokens", norm, "lm_head")
    return ends | shapes


def written(file: str, folder: Path) -> Path:
    """A checkpoint of random numbers under the published names."""
    said = family.load(FILES[file])
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in published(file).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": said.architectures[:1], "model_type": said.model_types[0]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("file", sorted(FROM_HEADERS))
def test_families_without_a_class_run_data_free(file: str, text: Path, tmp_path: Path) -> None:
    source = written(file, tmp_path / "source")
    made = runs.run(source, tmp_path / "out", scheme="mxfp4")
    assert made.report["model"]["family"] == file and made.report["warnings"] == []
    check_accounts(made)
    plan = made.prepared.plan
    assert len([part for part in plan.parts if part.kind == "block"]) == len(plan.attention) == 2
    assert all(target.role != "linear" for target in plan.targets.values())
    runs.tokenizer().save_pretrained(source)
    with pytest.raises(ModelError, match="does not know the model type"):
        runs.run(source, tmp_path / "never", scheme="nvfp4", **runs.data(text, 8, 32))


@pytest.mark.parametrize("file", sorted(FROM_HEADERS))
def test_what_is_said_of_families_without_a_class(file: str) -> None:
    """Names of sites, pairs and rotation are names of the published files."""
    said = family.load(FILES[file])
    leaves = {re.sub(r"^.*?\.(layers|h)\.\d+\.", "", name).rpartition(".")[0] for name in published(file)}
    listed = [*said.sites, *([pair.source, *pair.readers] for pair in said.scaling)]
    unknown = {leaf for group in listed for leaf in group if not any(fnmatchcase(known, leaf) for known in leaves)}
    optional = {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "input_layernorm", "post_attention_layernorm"}
    assert unknown <= {*ELSEWHERE, *optional, "ln_2"}


CONSTANT = """\
schema: quark/recipe/1
quantize:
  quant_cfg:
    - {quantizer_path: '*', enable: false}
    - {quantizer_path: '*.weight_quantizer', cfg: {element: fp8_e4m3}}
    - {quantizer_path: '*.[kv]_bmm_quantizer', cfg: {element: fp8_e4m3, scale: {constant_amax: 448}}}
"""


def test_a_cache_that_cannot_be_seen(
    built: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama with attention in code of its own."""
    source = built["llama"]
    tiny.hide_attention(monkeypatch)
    with pytest.raises(DataError, match="no calibration token reached") as caught:
        runs.run(source, tmp_path / "out", scheme="fp8", kv_cache="fp8", **runs.data(text, 8, 32))
    assert caught.value.where == "model.layers.0.self_attn.k" and "--kv-cache none" in caught.value.hint
    (tmp_path / "own.yaml").write_text(CONSTANT)
    made = runs.run(source, tmp_path / "constant", recipe=str(tmp_path / "own.yaml"))
    scales = [float(t) for name, t in runs.read_all(made.folder).items() if name.endswith((".k_scale", ".v_scale"))]
    assert scales == [1.0] * 4
