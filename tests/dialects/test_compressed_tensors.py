"""The compressed-tensors dialect against the compressed-tensors library."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name

from quarkcli import dialects, servers
from quarkcli.family import known
from quarkcli.family.rewrites import Rewrites
from quarkcli.numerics.quantize import dequantize
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog

from .plans import (
    FP8,
    FP8_CHANNEL,
    FP8_TOKEN,
    INT4_CHANNEL,
    INT8_TENSOR,
    NVFP4,
    NVFP4_INPUT,
    PAIRS,
    Module,
    Pair,
    attention,
    int4,
    linears,
    llama,
    moe,
    plan,
    target,
)  # fmt: skip
from .test_roundtrip import HELD, written

CT = dialects.writer("compressed-tensors")
INT4_STATIC = replace(INT8_TENSOR, element="int4")
MIXED: dict[str, Pair | None] = {"q": PAIRS["fp8"], "k": PAIRS["fp8"], "v": PAIRS["fp8"], "o": PAIRS["int4-32"]}
BOTH = {"vllm", "transformers"}


def validated(config: dict) -> QuantizationConfig:
    """The config as the library reads it, after a trip through JSON; unknown keys of a group are refused by it."""
    return QuantizationConfig.model_validate(json.loads(json.dumps(config)))


def chosen(config: dict, name: str, *, linear: bool = True) -> list[str]:
    """The groups that target a module of that name, unless it is ignored; the library's own name matching."""
    if any(match_name(name, pattern) for pattern in config["ignore"]):
        return []
    return [
        group
        for group, scheme in config["config_groups"].items()
        if any(match_name(name, t) or (t == "Linear" and linear) for t in scheme["targets"])
    ]


@pytest.mark.parametrize("scheme", HELD["compressed-tensors"])
@pytest.mark.parametrize("shape", [(96, 64), (40, 192)])
def test_the_library_decompresses_to_our_values(scheme: str, shape: tuple[int, int]) -> None:
    item = target(Module("m", shape, "up"), HELD["compressed-tensors"][scheme])
    quantized, source, tensors = written(CT, item)
    made = plan([Module("m", shape, "up")], linears(HELD["compressed-tensors"][scheme]))
    group = CT.config(made)["config_groups"]["group_0"]
    arguments = QuantizationScheme.model_validate(json.loads(json.dumps(group)))
    local = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    known = BaseCompressor.get_value_from_registry(group["format"]).compression_param_names(arguments)
    assert set(known) <= {*local, "input_global_scale"}
    if local["weight_scale"].is_floating_point() and local["weight_scale"].itemsize == 2:
        local["weight_scale"] = local["weight_scale"].float()  # the library's result has the dtype of the scale
    found = BaseCompressor.get_value_from_registry(group["format"]).decompress(local, arguments)["weight"]
    wanted = dequantize(quantized, item.weight)
    # The library expands fp4 in bfloat16: exact for power-of-two scales, rounded under a global scale.
    tolerance = 2**-7 if item.weight.scale.global_scale else 0
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=0)
    if "input_global_scale" in local:
        torch.testing.assert_close(local["input_global_scale"], 1 / source.reshape(1))


@pytest.mark.parametrize("scheme", HELD["compressed-tensors"])
def test_config_is_valid_and_covers_the_linears(scheme: str) -> None:
    made = plan(llama(), linears(HELD["compressed-tensors"][scheme]), kv=FP8, tied_head="model.head")
    config = CT.config(made)
    read = validated(config)
    assert read.quantization_status == "compressed"
    assert read.kv_cache_scheme.num_bits == 8 and read.kv_cache_scheme.strategy == "tensor"
    assert read.format == read.config_groups["group_0"].format
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head", "model.head"]
    assert read.model_dump()["config_groups"].keys() == {"group_0"}


def test_two_level_arguments() -> None:
    scheme = validated(CT.config(plan(llama(), linears((NVFP4, NVFP4_INPUT))))).config_groups["group_0"]
    assert (scheme.weights.strategy, scheme.weights.scale_dtype) == ("tensor_group", torch.float8_e4m3fn)
    assert (scheme.input_activations.dynamic, scheme.input_activations.group_size) == ("local", 16)


def test_mixed_plan_names_its_modules() -> None:
    made = plan(llama(), lambda m: MIXED.get(m.role))
    config = CT.config(made)
    validated(config)
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"float-quantized", "pack-quantized"}
    for item in made.targets.values():
        groups = chosen(config, item.name)
        assert len(groups) == (item.weight is not None), item.name
    unquantized = [t.name for t in made.targets.values() if t.weight is None and t.role != "embedding"]
    assert config["ignore"] == unquantized


def test_a_quantized_head_is_named_because_it_is_no_linear_to_vllm() -> None:
    made = plan(llama(), lambda m: None if m.role == "embedding" else PAIRS["int4-32"])
    config = CT.config(made)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert config["ignore"] == []


@pytest.mark.parametrize("mixtral", [False, True])
def test_experts_become_one_exact_pattern(mixtral: bool) -> None:
    made = plan(moe(layers=12, mixtral=mixtral), lambda m: PAIRS["mxfp4"] if m.expert else MIXED.get(m.role))
    config = CT.config(made)
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    patterns = [target for target in targets if target.startswith("re:")]
    assert len(patterns) == 1
    assert "experts" in patterns[0]  # how transformers finds the group of the experts
    assert_exact(made, config)


def test_patterns_of_some_layers_and_some_projections() -> None:
    def choose(module: Module) -> Pair | None:
        if module.expert is None:
            return None
        return PAIRS["fp8"] if re.search(r"layers\.(1|10)\.", module.name) else PAIRS["mxfp4"]

    made = plan(moe(layers=12), choose)
    config = CT.config(made)
    assert sum(len(group["targets"]) for group in config["config_groups"].values()) == 2
    assert_exact(made, config)
    down = plan(moe(layers=3), lambda m: PAIRS["mxfp4"] if m.role == "expert_down" else None)
    assert_exact(down, CT.config(down))
    one = plan(moe(layers=3), lambda m: PAIRS["mxfp4"] if m.expert and m.expert[1] == 2 else PAIRS["fp8"])
    assert_exact(one, CT.config(one))


def test_a_tree_beside_the_decoder_is_ignored_under_any_prefix() -> None:
    """gemma3: the file says `vision_tower.`, the module in memory is `model.vision_tower.`."""
    tower = [Module(f"vision_tower.encoder.layers.{i}.self_attn.q_proj", (64, 64), "vision") for i in range(2)]
    made = plan([*llama(), *tower, Module("projector.linear", (64, 64), "projector")], linears(PAIRS["fp8"]))
    for module in (*tower, Module("projector.linear", (64, 64), "projector")):
        made.targets[module.name] = target(module, None)
    config = CT.config(made)
    assert config["ignore"] == [r"re:(.*\.)?vision_tower\.", r"re:(.*\.)?projector\.", "lm_head"]
    assert_exact(made, config)
    assert not chosen(config, f"model.{tower[0].name}")


def test_a_tree_below_model_is_ignored_by_servers_that_have_it_beside() -> None:
    """Qwen3-VL and GLM-4.1V: the file and transformers say `model.visual.`, vLLM and SGLang say `visual.`.

    vLLM took such a tower for quantized, and stopped at its first weight.
    """
    tower = [Module(f"model.visual.blocks.{i}.attn.proj", (64, 64), "vision") for i in range(2)]
    made = plan([*llama(), *tower], lambda m: None if m.role == "vision" else linears(PAIRS["fp8"])(m))
    config = CT.config(made)
    assert config["ignore"] == [r"re:(.*\.)?visual\.", "lm_head"]
    assert_exact(made, config)
    for name in (tower[1].name, tower[1].name.removeprefix("model.")):
        assert not chosen(config, name)
    other = Module("audio.visual.proj", (64, 64), "up")  # quantized: the short pattern would take it too
    both = plan([*llama(), *tower, other], lambda m: None if m.role == "vision" else linears(PAIRS["fp8"])(m))
    assert_exact(both, CT.config(both))
    assert chosen(CT.config(both), other.name)


def test_a_wrapped_decoder_is_named_as_in_memory_too() -> None:
    """mllama: the file says `language_model.model.layers`, transformers `model.language_model.layers`."""
    wrapped = [replace(m, name=f"language_model.{m.name}") for m in llama()]
    made = plan([*wrapped, Module("multi_modal_projector", (64, 64), "projector")], lambda m: PAIRS["fp8"])
    for module in (wrapped[1], Module("multi_modal_projector", (64, 64), "projector")):
        made.targets[module.name] = target(module, None)
    mllama, llama4 = (
        replace(made, rewrites=Rewrites(known.load(catalog.find("models", name)))) for name in ("mllama", "llama4")
    )
    config = CT.config(mllama)
    inner = wrapped[1].name.removeprefix("language_model.model.")
    assert {f"model.language_model.{inner}", "model.multi_modal_projector"} < set(config["ignore"])
    assert CT.config_faults(config, "transformers", mllama) == []
    config["ignore"] = [wrapped[1].name]
    assert "under another name" in CT.config_faults(config, "transformers", mllama)[0]
    assert CT.config_faults(config, "transformers", llama4) == []  # which has the names of its files in memory


def test_a_tree_is_left_out_by_the_name_that_it_has_in_memory() -> None:
    """PaddleOCR-VL: the file says `mlp_AR.`, transformers `model.projector.`; it took these linears for quantized."""
    joint = [Module(f"mlp_AR.linear_{i}", (64, 64), "projector") for i in (1, 2)]
    made = plan([*llama(), *joint], lambda m: None if m.role == "projector" else linears(PAIRS["fp8"])(m))
    made = replace(made, rewrites=Rewrites(known.load(catalog.find("models", "paddleocr_vl"))))
    config = CT.config(made)
    assert config["ignore"] == [r"re:(.*\.)?mlp_AR\.", r"re:(.*\.)?projector\.", "lm_head"]
    assert CT.config_faults(config, "transformers", made) == []
    config["ignore"].remove(r"re:(.*\.)?projector\.")
    assert CT.config_faults(config, "transformers", made) == [
        "patterns in ignore match one of its two names for a module: mlp_AR.linear_1, mlp_AR.linear_2"
    ]


def test_a_pattern_does_not_leave_out_what_is_quantized_by_its_name_in_memory() -> None:
    """Cosmos 3 Edge: files have the text model at the top and the tower below `model`, transformers has both there."""
    text = [replace(m, name=m.name.removeprefix("model.")) for m in llama()]
    tower = Module("model.visual.encoder.layers.0.mlp.fc1", (64, 64), "vision")
    made = plan([*text, tower], lambda m: None if m.role == "vision" else linears(PAIRS["fp8"])(m))
    made = replace(made, rewrites=Rewrites(known.load(catalog.find("models", "cosmos3_edge"))))
    config = CT.config(made)
    assert config["ignore"] == [r"re:(.*\.)?visual\.", "lm_head"]
    assert CT.config_faults(config, "transformers", made) == []
    config["ignore"][0] = r"re:(.*\.)?model\."
    assert "its two names" in CT.config_faults(config, "transformers", made)[0]


def test_a_second_list_of_layers_does_not_slip_into_the_pattern() -> None:
    extra = [
        Module(m.name.replace("model.", "mtp."), m.shape, m.role, m.expert and ("mtp." + m.expert[0][6:], m.expert[1]))
        for m in moe()
        if m.expert
    ]
    made = plan([*moe(), *extra], lambda m: PAIRS["fp8"] if m.expert and m.name.startswith("model.") else None)
    assert_exact(made, CT.config(made))


def assert_exact(made: Plan, config: dict) -> None:
    validated(config)
    for item in made.targets.values():
        groups = chosen(config, item.name, linear=item.role != "embedding")
        assert len(groups) == (item.weight is not None), item.name


def test_only_a_cache() -> None:
    made = plan(llama(), lambda m: None, kv=FP8)
    config = CT.config(made)
    assert config["config_groups"] == {}
    assert validated(config).kv_cache_scheme is not None
    infos = [info for module in made.attention.values() for info in CT.attention_infos(module)]
    assert [info.name for info in infos[:2]] == ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    assert CT.config(plan(llama(), linears(PAIRS["fp8"])))["kv_cache_scheme"] is None


@pytest.mark.parametrize(
    ("pair", "loaders"),
    [
        (PAIRS["fp8"], BOTH),
        (PAIRS["ptpc"], BOTH),
        (PAIRS["fp8-weight-only"], BOTH),
        (PAIRS["int4-32"], BOTH),
        ((INT4_CHANNEL, None), BOTH),
        (PAIRS["int8-static"], BOTH),
        (PAIRS["int8-channel"], BOTH),
        (PAIRS["int8-tensor"], {"transformers"}),
        (PAIRS["mxfp4"], BOTH),
        (PAIRS["nvfp4"], BOTH),
        (PAIRS["nvfp4-weight-only"], BOTH),
    ],
)
def test_loaders_of_dense_models(pair: Pair, loaders: set[str]) -> None:
    assert CT.loaders(plan(llama(), linears(pair))) == loaders


@pytest.mark.parametrize(
    ("experts", "rest", "loaders"),
    [
        (PAIRS["ptpc"], PAIRS["ptpc"], BOTH),
        (PAIRS["int4-32"], PAIRS["int4-32"], BOTH),
        (PAIRS["mxfp4"], PAIRS["mxfp4"], BOTH),
        (PAIRS["mxfp4"], PAIRS["fp8"], BOTH),
        (PAIRS["mxfp4"], None, BOTH),
        (PAIRS["fp8"], PAIRS["fp8"], {"vllm"}),  # transformers: input_scale of the experts is unexpected
        (PAIRS["nvfp4"], PAIRS["nvfp4"], {"vllm"}),  # transformers: forgets the global scale
        (PAIRS["int8-token"], PAIRS["int8-token"], {"vllm"}),
        (PAIRS["int8-static"], PAIRS["int8-static"], set()),
        (PAIRS["fp8-weight-only"], PAIRS["fp8-weight-only"], {"transformers"}),
        (None, PAIRS["fp8"], BOTH),
        (None, PAIRS["int4-32"], {"vllm"}),  # transformers: drops weights it finds no packed tensors for
    ],
)
def test_loaders_of_expert_models(experts: Pair | None, rest: Pair | None, loaders: set[str]) -> None:
    made = plan(moe(), lambda m: experts if m.expert else linears(rest)(m) if rest else None)
    assert CT.loaders(made) == loaders


def test_what_a_release_of_a_loader_passes_over_is_said() -> None:
    cached = plan(llama(), linears(PAIRS["fp8"]), kv=FP8)
    assert "transformers 5.24 with compressed-tensors 0.20 ignores the scales of the KV cache" in CT.caveat(cached)
    for asked, why in (("compressed-tensors", "asked for;"), ("auto", "auto:")):
        assert dialects.choose(asked, cached) == [CT]
        reason = dialects.reason(CT, cached, auto=asked == "auto")
        assert reason == f"{why} loads in vLLM and transformers; {CT.caveat(cached)}"
    assert CT.caveat(plan(llama(), linears(PAIRS["fp8"]))) == ""
    hidden = replace(cached, rewrites=Rewrites(known.load(catalog.find("models", "gemma4"))))
    assert CT.loaders(hidden) == {"vllm"} and CT.caveat(hidden) == ""  # it asks the config for one width of heads
    unscaled = replace(cached, rewrites=Rewrites(known.load(catalog.find("models", "lfm2"))))
    assert CT.loaders(unscaled) == {"transformers"}
    assert "its class has no place for scales of the cache" in reasons(servers.server("sglang"), unscaled)
    served = plan(moe(), linears(PAIRS["fp8"]), kv=FP8)
    assert CT.loaders(served) == {"vllm"} and CT.caveat(served) == ""


def test_loaders_see_what_a_server_fuses() -> None:
    split = plan(llama(), lambda m: PAIRS["fp8"] if m.role == "q" else None)
    assert CT.loaders(split) == {"transformers"}
    layers = plan(moe(), lambda m: PAIRS["int4-32" if ".0." in m.name[:16] else "mxfp4"] if m.expert else None)
    assert CT.loaders(layers) == {"vllm"}
    for fused in (False, True):  # in the source; the checkpoint has single ones
        made = plan(moe(fused=fused), linears(PAIRS["ptpc"]))
        # Nothing fuses single experts where published files have fused ones, but for those that load with the values
        # that quark decodes.
        for name, loaders in (("gemma4", {"vllm"}), ("llama4", BOTH), ("qwen3_5_moe", BOTH), ("qwen3_moe", BOTH)):
            assert CT.loaders(replace(made, rewrites=Rewrites(known.load(catalog.find("models", name))))) == loaders
    untouched = plan(moe(fused=True), lambda m: None if m.expert else linears(PAIRS["int4-32"])(m))
    assert CT.loaders(untouched) == BOTH
    for name, loaders in (("qwen3_5_moe", BOTH), ("llama4", {"vllm"})):  # which has a linear for every expert then
        assert CT.loaders(replace(untouched, rewrites=Rewrites(known.load(catalog.find("models", name))))) == loaders


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("gptj", "whole head less"), ("stablelm", "whole less"), ("dbrx", ""), ("gemma3n", "whole head less mixed"),
        ("llama", "whole head less mixed"),
    ],
)  # fmt: skip
def test_families_whose_linears_have_other_names_in_vllm(name: str, loads: str) -> None:
    """These names are said of linears that are left out (`test_vllm_names`), and not of those of a scheme."""
    own = Rewrites(known.load(catalog.find("models", name)))
    plans = {
        "whole": plan(llama(), linears(PAIRS["ptpc"])),
        "head": plan(llama(), lambda m: None if m.role == "embedding" else PAIRS["ptpc"]),
        "less": plan(llama(), lambda m: None if ".1." in m.name else linears(PAIRS["ptpc"])(m)),
        "mixed": plan(llama(), lambda m: linears(PAIRS["int4-32" if ".1." in m.name else "ptpc"])(m)),
    }
    found = {kind for kind, made in plans.items() if "vllm" in CT.loaders(replace(made, rewrites=own))}
    assert found == set(loads.split())
    quark = dialects.writer("quark").loaders(replace(plans["less"], rewrites=own))
    assert ("vllm" in quark) == ("less" in found)


def reasons(server: servers.Server, made: Plan) -> str:
    return "; ".join(server.refusals(servers.planned(made, CT)))


def test_members_that_the_classes_of_servers_do_not_know() -> None:
    """StableLM 2 of 12 billion has norms on the heads of q and k, and attention and MLP side by side."""
    family = known.load(catalog.find("models", "stablelm"))
    keys = ("qk_layernorm", "use_parallel_residual")
    for config in ({}, *({key: value} for key in keys for value in (False, True))):
        known_there = True not in config.values()
        rewrites = Rewrites(family, unserved=family.unserved(config))
        made = replace(plan(llama(), linears(PAIRS["ptpc"])), rewrites=rewrites)
        assert CT.loaders(made) == (BOTH if known_there else {"transformers"}), config
        told = [one.name for one in servers.servers() if "its class does not know models with" in reasons(one, made)]
        assert told == ([] if known_there else ["sglang", "tensorrt-llm", "vllm"])


def test_transformers_finds_no_codes_of_modules_whose_weight_alone_it_renames() -> None:
    """DeepSeek V4: `head.weight` becomes `lm_head.weight`, and `head.weight_scale` stays."""
    renames = Rewrites(known.load(catalog.find("models", "deepseek_v4")))
    modules = [Module("head", (64, 64), "head"), Module("layers.0.attn.wq_a", (64, 64), "q_a")]
    quantized, left = plan(modules, lambda m: PAIRS["ptpc"]), plan(modules, lambda m: None)
    whole = plan(modules, lambda m: PAIRS["ptpc"] if m.role == "q_a" else None)
    for made, loads in ((quantized, False), (whole, True), (left, True)):
        assert ("transformers" in CT.loaders(replace(made, rewrites=renames))) == loads


def test_linears_that_transformers_joins_have_a_row_for_each_output() -> None:
    """MiniMax M3: gate and up become one linear while they load, and the indexer gets another name."""
    joins = Rewrites(known.load(catalog.find("models", "minimax_m3_vl")))
    for kind, loaders in (("ptpc", BOTH), ("mxfp4", BOTH), ("int4-32", {"vllm"}), ("fp8", {"vllm"})):
        assert CT.loaders(replace(plan(llama(), linears(PAIRS[kind])), rewrites=joins)) == loaders
    left = plan(llama(), lambda m: None if m.role in ("gate", "up") else linears(PAIRS["ptpc"])(m))
    assert CT.loaders(replace(left, rewrites=joins)) == BOTH
    for kind, some, loaders in (("ptpc", "", BOTH), ("mxfp4", "", {"vllm"}), ("mxfp4", ".0.", BOTH)):
        left = {m.name: None for m in llama() if m.role in ("gate", "up") and some in m.name}
        pairs = {m.name: linears(PAIRS[kind])(m) for m in llama()} | left
        kept = replace(plan(llama(), lambda m, pairs=pairs: pairs[m.name]), rewrites=joins)
        assert CT.loaders(kept) == loaders  # decoded as experts where none has codes
    half = plan(llama(), lambda m: None if m.role == "gate" else linears(PAIRS["ptpc"])(m))
    assert (CT.loaders(half), CT.loaders(replace(half, rewrites=joins))) == ({"transformers"}, set())


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((int4(48), None), "not a multiple of the group of 48"),
        ((int4(32), INT4_STATIC), "cannot hold weight int4 group 32, model, half_range with input int4 tensor"),
        ((replace(FP8_CHANNEL, element="fp8_e5m2"), None), "fp8_e5m2 channel 0"),
    ],
)
def test_refusals_name_module_and_spec(pair: Pair, words: str) -> None:
    refusals = CT.refusals(plan(llama(), lambda m: pair if m.role == "q" else None))
    assert len(refusals) == 1
    assert refusals[0].startswith("model.layers.0.self_attn.q_proj (and 1 more): ")
    assert words in refusals[0]
    assert CT.loaders(plan(llama(), lambda m: pair if m.role == "q" else None)) == set()


def test_other_refusals() -> None:
    ragged = plan([Module("m.down_proj", (8, 20), "down")], linears((INT4_CHANNEL, None)))
    assert CT.refusals(ragged) == ["m.down_proj: 20 input features do not fill 32-bit words of int4 codes"]
    assert CT.refusals(plan([Module("m.down_proj", (8, 21), "down")], linears((FP8_CHANNEL, FP8_TOKEN)))) == []
    partial = plan(llama(), linears(PAIRS["fp8"]), kv=FP8)
    partial.attention["model.layers.1.self_attn"] = attention("model.layers.1.self_attn", None)
    assert "model.layers.1.self_attn" in CT.refusals(partial)[0]
    wrong = plan(llama(), linears(PAIRS["fp8"]), kv=FP8_TOKEN)
    assert "k_bmm_quantizer" in CT.refusals(wrong)[0]
