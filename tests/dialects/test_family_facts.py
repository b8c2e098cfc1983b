"""What family files say of the classes that servers have for their models: plans that these classes do not load.

Each was tried in transformers 5.23 and in vLLM 0.32's CPU build, and read in the sources of the others.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quarkcli import dialects, servers
from quarkcli.family import FamilyModel, known
from quarkcli.family.rewrites import Rewrites
from quarkcli.plan.model import Attention, Plan
from quarkcli.recipe import catalog
from quarkcli.spec import PerGroup, ScaleSpec, TensorSpec
from tests.tiny import Header

from .plans import FP8_GROUP, FP8_TILE, PAIRS, Module, linears, llama, plan
from .test_roundtrip import HELD

CT, QUARK = dialects.writer("compressed-tensors"), dialects.writer("quark")
BOTH = {"vllm", "transformers"}


def family(name: str) -> FamilyModel:
    return known.load(catalog.find("models", name))


def of(made: Plan, name: str) -> Plan:
    """The plan, as one of a model of a family."""
    return replace(made, rewrites=Rewrites(family(name)))


@pytest.mark.parametrize(
    ("kind", "loaders"),
    [
        ("ptpc", BOTH), ("fp8", BOTH), ("int8-token", BOTH), ("int4-32", {"vllm"}), ("int8-channel", {"vllm"}),
        ("mxfp4", {"vllm"}), ("nvfp4", {"vllm"}),
    ],
)  # fmt: skip
def test_linears_of_an_own_class_in_transformers_keep_the_name_of_the_weight(kind: str, loaders: set[str]) -> None:
    """Falcon. Packed codes have another name, and amd-quark replaces linears of torch alone."""
    made = plan(llama(), linears(PAIRS[kind]))
    assert CT.loaders(made) == BOTH and CT.loaders(of(made, "falcon")) == loaders
    assert "transformers" not in QUARK.loaders(of(made, "falcon"))


def test_a_head_to_which_vllm_gives_no_scheme() -> None:
    """Phi 3.5 MoE."""
    whole = plan(llama(), linears(PAIRS["int4-32"]))
    head = plan(llama(), lambda m: None if m.role == "embedding" else PAIRS["int4-32"])
    assert CT.loaders(of(head, "mixtral")) == CT.loaders(of(whole, "phimoe")) == BOTH
    assert CT.loaders(of(head, "phimoe")) == {"transformers"}


def test_mamba_to_which_vllm_gives_no_scheme() -> None:
    """Jamba."""
    mixer = [Module(f"model.layers.{i}.mamba.{leaf}_proj", (64, 64), "mamba") for i in (0, 1) for leaf in ("in", "out")]
    whole = plan([*llama(), *mixer], lambda m: None if m.role == "mamba" else linears(PAIRS["int4-32"])(m))
    all_of_it = plan([*llama(), *mixer], linears(PAIRS["int4-32"]))
    assert CT.loaders(of(whole, "jamba")) == CT.loaders(all_of_it) == BOTH
    assert CT.loaders(of(all_of_it, "jamba")) == {"transformers"}


@pytest.mark.parametrize(("kind", "loaders"), [("int4-32", {"vllm"}), ("mxfp4", {"vllm"}), ("ptpc", BOTH)])
def test_convolutions_that_transformers_joins_while_it_decodes_weights(kind: str, loaders: set[str]) -> None:
    """Kimi Linear. It takes them for packed weights, finds none and stops, unless the scheme leaves weights alone."""
    made = plan(llama(), linears(PAIRS[kind]))
    kept = {f"model.layers.0.self_attn.{leaf}_conv1d.weight": "conv: tiny" for leaf in "qkv"}
    assert CT.loaders(of(made, "kimi_linear")) == BOTH
    assert CT.loaders(of(replace(made, kept=kept), "kimi_linear")) == loaders


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt", "quark"])
def test_a_head_with_another_name_in_memory_is_left_out_by_both(dialect: str) -> None:
    """GPT-NeoX, in transformers and vLLM: modelopt's class there takes codes for a head that is not listed."""
    modules = [Module("gpt_neox.layers.0.attention.dense", (128, 128), "o"), Module("embed_out", (512, 128), "head")]
    made = of(plan(modules, lambda m: PAIRS["ptpc"] if m.role == "o" else None), "gpt_neox")
    writer = dialects.writer(dialect)
    config = writer.config(made)
    assert config["exclude" if dialect == "quark" else "ignore"] == ["embed_out", "lm_head"]
    assert writer.config_faults(config, "vllm", made) == [] and "vllm" in writer.loaders(made)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark", "awq", "gptq", "modelopt", "fp8"])
def test_matrices_that_no_recipe_can_reach_are_left_out(dialect: str) -> None:
    """The connector of SmolVLM, were it guessed: loaders took it for a linear and looked for its codes."""
    uint4 = TensorSpec("uint4", PerGroup(32), ScaleSpec("model"))
    whole = plan(llama(), linears(next(iter(HELD[dialect].values()), (uint4, None))))
    made = replace(whole, matrices=("model.connector.modality_projection.proj",))
    listed = [json.dumps(dialects.writer(dialect).config(one)) for one in (whole, made)]
    assert ["modality_projection" in text for text in listed] == [False, True]


@pytest.mark.parametrize("dialect", ["awq", "fp8", "modelopt", "quark"])
def test_what_vllm_joins_in_a_tower_is_left_out_by_that_name(dialect: str) -> None:
    """GLM-4.1V: the files have gate and up of the text model in one linear; its class knows no parts of the tower's."""
    uint4 = TensorSpec("uint4", PerGroup(32), ScaleSpec("model"))
    tower = [Module(f"model.visual.merger.{leaf}_proj", (64, 64), "vision") for leaf in ("gate", "up", "down")]
    pair = next(iter(HELD[dialect].values()), (uint4, None))
    made = plan([*llama(), *tower], lambda m: None if m.role == "vision" else linears(pair)(m))
    assert '"visual.' not in json.dumps(dialects.writer(dialect).config(made))
    text = json.dumps(dialects.writer(dialect).config(of(made, "glm4v")))
    assert '"visual.merger.gate_up_proj"' in text and '"visual.merger.down_proj"' not in text


@pytest.mark.parametrize(("head_dim", "vllm"), [(64, False), (128, True), (256, True), (None, False)])
def test_tiles_that_are_sorted_by_heads_fit_into_them(head_dim: int | None, vllm: bool) -> None:
    """Falcon: vLLM sorts the rows of q, k and v."""
    qkv = "transformer.h.0.self_attention.query_key_value"
    made = plan([Module(qkv, (768, 256), "qkv")], linears((FP8_TILE, FP8_GROUP)))
    made = replace(made, attention={qkv: Attention(qkv.rpartition(".")[0], 0, qkv, qkv, {})})
    for writer in (CT, QUARK, dialects.writer("fp8")):
        assert "vllm" in writer.loaders(made)
        sorted_ = replace(made, rewrites=Rewrites(family("falcon"), head_dim=head_dim))
        assert ("vllm" in writer.loaders(sorted_)) == vllm


@pytest.mark.parametrize(
    ("name", "architecture", "lacking"),
    [
        ("falcon", "FalconForCausalLM", ["sglang", "tensorrt-llm"]),
        ("gpt_neox", "GPTNeoXForCausalLM", ["tensorrt-llm"]), ("llama", "LlamaForCausalLM", []), ("llama", "", []),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", []),
        ("llava", "LlavaForConditionalGeneration", ["tensorrt-llm"]),
        ("llava_next", "LlavaNextForConditionalGeneration", ["sglang"]),
        ("smolvlm", "SmolVLMForConditionalGeneration", ["sglang", "tensorrt-llm"]),
        ("jamba", "JambaForCausalLM", ["sglang", "tensorrt-llm"]),
        ("hyperclovax", "HyperCLOVAXForCausalLM", ["sglang", "tensorrt-llm"]),
    ],
)  # fmt: skip
def test_servers_without_a_class(name: str, architecture: str, lacking: list[str]) -> None:
    made = replace(of(plan(llama(), linears(PAIRS["ptpc"])), name), architecture=architecture)
    told = {server.name: " ".join(server.refusals(servers.planned(made, CT))) for server in servers.servers()}
    assert sorted(one for one, found in told.items() if "it has no class for" in found) == lacking


def test_an_architecture_that_servers_do_not_know() -> None:
    """transformers writes another one for Phi 3.5 MoE than its published files have."""
    own = family("phimoe")
    config = {"attention_bias": True, "lm_head_bias": True, "architectures": ["PhiMoEForCausalLM"]}
    assert own.unserved(config) == ""
    assert own.unserved(config | {"architectures": ["PhimoeForCausalLM"]}) == "architectures: ['PhimoeForCausalLM']"
    assert own.unserved(config | {"lm_head_bias": False}) == "lm_head_bias: False"


@pytest.mark.parametrize(
    ("name", "loaders"),
    [("gpt_neox", {"vllm"}), ("falcon", {"vllm"}), ("lfm2_moe", {"transformers"}), ("phimoe", BOTH)],
)
def test_scales_of_a_cache_have_a_place_in_some_classes(name: str, loaders: set[str]) -> None:
    cached = plan(llama(), linears(PAIRS["ptpc"]), kv=PAIRS["fp8"][0])
    assert CT.loaders(cached) == BOTH and CT.loaders(of(cached, name)) == loaders


def test_gptq_names_the_parts_by_which_vllm_knows_a_linear() -> None:
    """GLM-4: vLLM asks for gate_proj and up_proj, found no codes of theirs in the headers, and stopped at gate_up."""
    joined = Module("model.layers.0.mlp.gate_up_proj", (256, 128), "gate_up")
    made = plan([*llama(), joined], linears(HELD["gptq"]["int4-32"]))
    assert "modules_in_block_to_quantize" not in dialects.writer("gptq").config(made)
    listed = dialects.writer("gptq").config(of(made, "glm4"))["modules_in_block_to_quantize"]
    quantized = [target.name for target in made.quantized()]
    assert listed == [*quantized, "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    kept = plan([*llama(), joined], lambda m: None if m is joined else linears(HELD["gptq"]["int4-32"])(m))
    assert "modules_in_block_to_quantize" not in dialects.writer("gptq").config(of(kept, "glm4"))


@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3"])
def test_towers_whose_names_the_classes_of_servers_lack(name: str) -> None:
    """transformers 5.23 saves a tower without `vision_model`: vLLM stopped at vision_tower.embeddings."""
    saved, published = "vision_tower.embeddings.patch_embedding.weight", "vision_tower.vision_model.embeddings."
    told = {}
    for tensor in (saved, f"model.{saved}", f"{published}patch_embedding.weight"):
        headers = {"lm_head.weight": Header("BF16", (8, 8)), tensor: Header("BF16", (8, 3, 2, 2))}
        made = replace(plan(llama(), linears(PAIRS["ptpc"])), rewrites=Rewrites(family(name), headers=headers))
        found = {server.name: server.refusals(servers.planned(made, CT)) for server in servers.servers()}
        told[tensor] = {server for server, faults in found.items() if any("no place for it" in one for one in faults)}
        assert ("vllm" in CT.loaders(made)) == ("vllm" not in told[tensor]) and "transformers" in CT.loaders(made)
        assert all(len(found[server]) == 1 and tensor in found[server][0] for server in told[tensor])
    assert list(told.values()) == [{"vllm", "sglang"}, {"vllm", "sglang"}, set()]


def test_the_tower_of_internvl_has_its_own_names() -> None:
    headers = {"vision_tower.embeddings.patch_embeddings.projection.weight": Header("BF16", (8, 3, 2, 2))}
    made = replace(plan(llama(), linears(PAIRS["ptpc"])), rewrites=Rewrites(family("internvl"), headers=headers))
    assert CT.loaders(made) == BOTH


@pytest.mark.parametrize(
    ("value", "said"),
    [("default", "vision_feature_select_strategy: default"), (None, "no vision_feature_select_strategy"), ("full", "")],
)
def test_values_at_which_the_class_of_one_server_stops(value: str | None, said: str) -> None:
    """SGLang's class of LLaVA raises ValueError while it loads weights; transformers' default is 'default'."""
    config = {"vision_feature_select_strategy": value} if value else {}
    rewrites = Rewrites(family("llava"), unserved_by=family("llava").unserved_by(config))
    made = replace(plan(llama(), linears(PAIRS["ptpc"])), rewrites=rewrites)
    found = {server.name: server.refusals(servers.planned(made, CT)) for server in servers.servers()}
    assert found["sglang"] == ([f"its class does not know models with {said}"] if said else [])
    assert not found["vllm"] and not found["transformers"]


@pytest.mark.parametrize(
    ("inside", "stops"), [("block_sparse_moe.gate_proj", True), ("block_sparse_moe.shared_experts.gate_proj", False)]
)
def test_the_dense_block_of_kimi_linear_as_transformers_saves_it(inside: str, stops: bool) -> None:
    """vLLM's class has it below mlp, as published files do (read)."""
    tensor = f"model.layers.0.{inside}.weight"
    rewrites = Rewrites(family("kimi_linear"), headers={tensor: Header("BF16", (64, 32))})
    made = replace(plan(llama(), linears(PAIRS["ptpc"])), rewrites=rewrites)
    (vllm,) = [server for server in servers.servers() if server.name == "vllm"]
    assert (f"{tensor}: its class has no place for it" in vllm.refusals(servers.planned(made, CT))) == stops


def test_no_server_leaves_out_the_tower_of_voxtral() -> None:
    """SGLang's class gives it a scheme under empty names (read); vLLM's reads Mistral's files alone (it stopped)."""
    headers = {"audio_tower.layers.0.fc1.weight": Header("BF16", (64, 32))}
    made = replace(plan(llama(), linears(PAIRS["ptpc"])), rewrites=Rewrites(family("voxtral"), headers=headers))
    found = {server.name: server.refusals(servers.planned(made, CT)) for server in servers.servers()}
    assert found["sglang"] == ["audio_tower.layers.0.fc1.weight: its class has no place for it"]
    assert found["vllm"] and not found["transformers"]


def test_family_files_name_servers_that_there_are() -> None:
    models = [family(name) for name in catalog.names("models")]
    assert {server for model in models for server in (*model.unread, *model.served_by)} <= set(servers.names())


def test_patterns_that_vllm_does_not_match_because_it_has_the_tower_beside_model() -> None:
    """Checkpoints written before, and by others: vLLM maps names of a config to its own, and no patterns."""
    tower = [Module(f"model.visual.blocks.{i}.attn.proj", (64, 64), "vision") for i in range(2)]
    made = plan([*llama(), *tower], lambda m: None if m.role == "vision" else linears(PAIRS["fp8"])(m))
    config, vl = CT.config(made), of(made, "qwen3_vl")
    old = {**config, "ignore": [r"re:(.*\.)?model\.visual\.", "lm_head"]}
    assert CT.config_faults(config, "vllm", vl) == []
    told = CT.config_faults(old, "vllm", vl)
    assert len(told) == 1 and told[0].endswith("not quantized: visual.blocks.0.attn.proj, visual.blocks.1.attn.proj")
    named = {**config, "ignore": [module.name for module in tower]}  # names are mapped
    others = {**old, "config_groups": {"group_0": {**config["config_groups"]["group_0"], "targets": ["re:.*mlp.*"]}}}
    for fine in (named, others):
        assert CT.config_faults(fine, "vllm", vl) == []
    for elsewhere in (of(made, "smolvlm"), made, replace(vl, guessed=True)):
        assert CT.config_faults(old, "vllm", elsewhere) == []
    assert CT.config_faults(old, "transformers", vl) == []


def test_a_gptq_config_that_does_not_list_what_vllm_asks_for() -> None:
    """GLM-4: it asks for the parts of gate_up, and the headers have the whole."""
    writer, joined = dialects.writer("gptq"), Module("model.layers.0.mlp.gate_up_proj", (256, 128), "gate_up")
    others = [module for module in llama() if module.role not in ("gate", "up")]
    made = of(plan([*others, joined], linears(HELD["gptq"]["int4-32"])), "glm4")
    config, key = writer.config(made), "modules_in_block_to_quantize"
    said = f"{key} does not list what it asks for: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"
    assert writer.config_faults(config, "vllm", made) == []
    assert writer.config_faults({**config, key: None}, "vllm", made) == [said]
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert writer.config_faults({**config, key: [leaves[:3], leaves[3:]]}, "vllm", made) == []
    short = writer.config_faults({**config, key: [leaves[:3], leaves[4:]]}, "vllm", made)
    assert len(short) == 1 and "model.layers.0.self_attn.o_proj" in short[0]
    other = of(made, "llama")
    assert writer.config_faults(writer.config(other), "vllm", other) == []
