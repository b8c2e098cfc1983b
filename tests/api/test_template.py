"""`LLMTemplate`: Quark's names and precedence, and the same plans as the command line's flags."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quarkcli
from quarkcli import family
from quarkcli.cli.main import main
from quarkcli.errors import ConfigError, ModelError, UsageError
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from quarkcli.recipe.recipe import from_config
from quarkcli.recipe.steps import from_quark
from quarkcli.spec import TensorSpec
from tests import runs
from tests.plan import layouts

LLMTemplate = quarkcli.LLMTemplate
DATA = {"calib_data": "builtin", "offline": True}

# kv_layers_name and q_layer_name of Quark's own templates (its llm template page).
QUARK: dict[str, tuple[list[str], str]] = {
    "chatglm": (["*query_key_value"], "*query_key_value"),
    "cohere": (["*k_proj", "*v_proj"], "*q_proj"),
    "dbrx": (["*Wqkv"], "*Wqkv"),
    "deepseek": (["*k_proj", "*v_proj"], "*q_proj"),
    "gemma2": (["*k_proj", "*v_proj"], "*q_proj"),
    "glm4_moe": (["*k_proj", "*v_proj"], "*q_proj"),
    "gptj": (["*k_proj", "*v_proj"], "*q_proj"),
    "gpt_oss": (["*k_proj", "*v_proj"], "*q_proj"),
    "grok-1": (["*k_proj", "*v_proj"], "*q_proj"),
    "llama": (["*k_proj", "*v_proj"], "*q_proj"),
    "minimax_m2": (["*k_proj", "*v_proj"], "*q_proj"),
    "mixtral": (["*k_proj", "*v_proj"], "*q_proj"),
    "opt": (["*k_proj", "*v_proj"], "*q_proj"),
    "phi3": (["*qkv_proj"], "*qkv_proj"),
    "qwen": (["*c_attn"], "*c_attn"),
    "qwen2_moe": (["*k_proj", "*v_proj"], "*q_proj"),
    "qwen3_moe": (["*k_proj", "*v_proj"], "*q_proj"),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLMTemplate, "_registered", {})


@pytest.fixture(scope="module", params=["demo", "qwen3_moe", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model, its template): the embedded Llama and two mixtures of experts."""
    if request.param == "demo":
        return "demo", "llama"
    return str(runs.build(request.param, tmp_path_factory.mktemp(request.param))), request.param


def specs(plan: Plan) -> dict[str, TensorSpec | None]:
    return {slot: decision.spec for slot, decision in plan.slots()}


def of_config(model: str, config: dict[str, Any], **options: Any) -> Plan:
    return quarkcli.make_plan(model, config=config, **DATA, **options)


def off(plan: Plan) -> set[str]:
    return {target.name for target in plan.targets.values() if target.weight is None}


# --- the same plans as flags ------------------------------------------------------------------------------------------

SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scheme": ({}, {}),
    "cache": ({"kv_cache_scheme": "fp8"}, {"kv_cache": "fp8"}),
    "smallest scale": (
        {"kv_cache_scheme": "fp8", "min_kv_scale": 0.25}, {"kv_cache": "fp8", "min_kv_scale": 0.25},
    ),
    "smallest scale of attention": (
        {"attention_scheme": "fp8", "min_kv_scale": 1.0}, {"attention": "fp8", "min_kv_scale": 1.0},
    ),
    "smallest scale of both": (
        {"kv_cache_scheme": "fp8", "attention_scheme": "fp8", "min_kv_scale": 1.0},
        {"kv_cache": "fp8", "attention": "fp8", "min_kv_scale": 1.0},
    ),
    "smallest scale of two": (
        {"kv_cache_scheme": "nvfp4", "min_kv_scale": 0.25}, {"kv_cache": "nvfp4", "min_kv_scale": 0.25},
    ),
    "attention": ({"attention_scheme": "fp8"}, {"attention": "fp8"}),
    "both": ({"kv_cache_scheme": "nvfp4", "attention_scheme": "fp8"}, {"kv_cache": "nvfp4", "attention": "fp8"}),
    "layers": (  # of two patterns that match, Quark takes the first and the command line the last
        {"layer_config": {"*.0.self_attn.*": "int8", "*self_attn*": "mxfp4"}},
        {"layers": ["*self_attn*=mxfp4", "*.0.self_attn.*=int8"]},
    ),
    "layers and types": (
        {"layer_type_config": {torch.nn.Linear: "mxfp4"}, "layer_config": {"*o_proj": "int8"}},
        {"layer_types": ["Linear=mxfp4"], "layers": ["*o_proj=int8"]},
    ),
    "types by name": ({"layer_type_config": {"torch.nn.Linear": "mxfp4"}}, {"layer_types": ["Linear=mxfp4"]}),
    "short names": ({"layer_type_config": {"nn.Linear": "mxfp4"}}, {"layer_types": ["Linear=mxfp4"]}),
    "algorithm": ({"algorithm": "gptq"}, {"algorithm": "gptq"}),
    "groups": ({"shared_scale_groups": None}, {}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["nvfp4", "int4_wo_32"])
@pytest.mark.parametrize("case", SAME)
def test_the_same_plan_as_with_flags(model: tuple[str, str], scheme: str, case: str):
    source, name = model
    asked, flags = SAME[case]
    found = of_config(source, LLMTemplate.get(name).get_config(scheme, **asked))
    same = quarkcli.make_plan(source, scheme, **flags, **DATA)
    assert specs(found) == specs(same)
    assert found.algorithms == same.algorithms
    assert found.kept.keys() == same.kept.keys()
    assert quarkcli.need_calibration(found) == quarkcli.need_calibration(same)


def test_the_same_plan_as_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is written to a file is a recipe like any other."""
    config = LLMTemplate.get("llama").get_config(
        "mxfp4", kv_cache_scheme="fp8", layer_config={"*down_proj": "int8"}, algorithm="gptq",
        algo_configs={"gptq": {"name": "gptq", "damp_percent": 0.05, "desc_act": False}},
    )  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    common = ["plan", "--model", "demo", "--calib-data", "builtin", "--json"]
    shown = []
    for flags in (
        ["--recipe", str(file)],
        ["--scheme", "mxfp4", "--kv-cache", "fp8", "--layer", "*down_proj=int8", "--algorithm", "gptq"],
    ):
        assert main([*common, *flags]) == 0
        plan = json.loads(capsys.readouterr().out)
        shown.append({key: plan[key] for key in ("size", "algorithms", "dialect") if key in plan})
    assert shown[0] == shown[1]
    assert "dialect" in shown[0]
    parameters = {step.name: step.parameters for step in of_config("demo", config).algorithms}
    assert parameters == {
        "gptq": {"damp": 0.05, "act_order": False, "refine": "off", "holdout": 0, "true_sequential": True}
    }


def test_exclusions_take_the_place_of_the_templates(model: tuple[str, str]):
    source, name = model
    template = LLMTemplate.get(name)
    usual = specs(quarkcli.make_plan(source, "mxfp4", **DATA))
    own = [*template.exclude_layers_name, "*.0.self_attn.o_proj"]
    assert specs(of_config(source, template.get_config("mxfp4", exclude_layers=template.exclude_layers_name))) == usual
    more = of_config(source, template.get_config("mxfp4", exclude_layers=own))
    assert specs(more) == specs(quarkcli.make_plan(source, "mxfp4", exclude=["*.0.self_attn.o_proj"], **DATA))
    nothing = of_config(source, template.get_config("mxfp4", exclude_layers=[]))
    assert off(nothing) == {"model.embed_tokens"}  # linears only, and all of them
    heads = of_config(source, template.get_config("mxfp4", exclude_layers=["lm_head"]))
    routers = {name for name in nothing.targets if name.endswith(("mlp.gate", "block_sparse_moe.gate"))}
    assert off(heads) == {"model.embed_tokens", "lm_head"}
    assert routers.isdisjoint(off(heads))


@pytest.mark.parametrize("name", catalog.files("models"))
def test_every_family_is_a_template(name: str):
    template = LLMTemplate.get(name)
    loaded = family.load(catalog.files("models")[name])
    assert template.model_type == name
    assert name in LLMTemplate.list_available()
    config = template.get_config("mxfp4", exclude_layers=[*template.exclude_layers_name, "*.nothing"])
    assert config["exclusions"] == "none"
    assert template.get_config("mxfp4")["exclusions"] == "default"
    if loaded.attention is not None:
        rows = template.get_config("fp8", kv_cache_scheme="fp8", attention_scheme="fp8")["quantize"]["quant_cfg"]
        assert [row["quantizer_path"] for row in rows if "_bmm_" in row["quantizer_path"]] == [
            "*k_bmm_quantizer", "*v_bmm_quantizer",
            "*q_bmm_quantizer", "*k_bmm_quantizer", "*v_bmm_quantizer", "*.p_bmm_quantizer",
        ]  # fmt: skip


@pytest.mark.parametrize("name", QUARK)
def test_projections_as_in_quark(name: str):
    template = LLMTemplate.get(name)
    assert (template.kv_layers_name, template.q_layer_name) == QUARK[name]


def test_gate_and_up():
    assert LLMTemplate.get("mixtral").gate_up_layers_name == ["w1", "w3"]
    assert LLMTemplate.get("minimax_m2").gate_up_layers_name == ["w1", "w3"]
    assert LLMTemplate.get("llama").gate_up_layers_name == ["gate_proj", "up_proj"]


# --- templates of one's own -------------------------------------------------------------------------------------------


def test_a_template_of_ones_own():
    made = LLMTemplate("mine", kv_layers_name=["*.k_proj", "*.0.self_attn.v_proj"], q_layer_name="*q_proj",
                       exclude_layers_name=["lm_head", "*down_proj"])  # fmt: skip
    LLMTemplate.register_template(made)
    assert LLMTemplate.get("mine") is made
    assert LLMTemplate.list_available()[-1] == "mine"
    found = layouts.plan(from_config(made.get_config("mxfp4", attention_scheme="fp8")))  # before any dialect is asked
    assert off(found) == {"model.embed_tokens", "lm_head"} | {n for n in found.targets if n.endswith("down_proj")}
    assert [sorted(module.specs) for module in found.attention.values()] == [
        ["k", "p", "q", "v"],
        *[["k", "p", "q"]] * 2,
    ]


def test_a_fused_projection_fills_both_halves_of_the_cache():
    made = LLMTemplate("fused", kv_layers_name=["*language_model.*Wqkv"], q_layer_name=["*language_model.*Wqkv"])
    rows = made.get_config("fp8", kv_cache_scheme="fp8", attention_scheme="fp8")["quantize"]["quant_cfg"]
    assert {row["quantizer_path"] for row in rows if "_bmm_" in row["quantizer_path"]} == {
        "*language_model.*k_bmm_quantizer", "*language_model.*v_bmm_quantizer", "*language_model.*q_bmm_quantizer",
        "*.p_bmm_quantizer",
    }  # fmt: skip


def test_overwriting_warns(recwarn: pytest.WarningsRecorder):
    LLMTemplate.register_template(LLMTemplate("mine"))
    assert not recwarn.list
    for name in ("mine", "llama", "grok-1"):
        with pytest.warns(UserWarning, match=f"'{name}' exists already"):
            LLMTemplate.register_template(LLMTemplate(name, exclude_layers_name=["*up_proj"]))
    assert LLMTemplate.get("llama").exclude_layers_name == ["*up_proj"]
    assert len(LLMTemplate.list_available()) == len(catalog.files("models")) + 1


def test_names_of_templates():
    assert LLMTemplate.get("grok-1").model_type == LLMTemplate.get("grok_1").model_type
    assert LLMTemplate.get("kimi_k2").model_type == "kimi_k2"
    with pytest.raises(ConfigError, match="no template for 'lama'") as caught:
        LLMTemplate.get("lama")
    assert "llama" in caught.value.hint


@dataclass
class SmoothQuantConfig:
    """As amd-quark has it."""

    name: str = "smooth"
    alpha: float = 1
    scale_clamp_min: float = 1e-3
    scaling_layers: list[Any] = field(default_factory=list)
    model_decoder_layers: str = "model.layers"


def test_algorithms_are_stacked_in_their_order():
    """Configs in the old keywords, as mappings and as amd-quark's objects, in Quark's words; the plan has all steps."""
    rows = [{"prev_op": "mlp.up_proj", "layers": ["mlp.down_proj"], "inp": "mlp.down_proj"}]
    with pytest.warns(DeprecationWarning):
        made = LLMTemplate(
            "mine", exclude_layers_name=["lm_head"],
            smoothquant_config=SmoothQuantConfig(alpha=0.5, scaling_layers=rows),
            rotation_config={"name": "rotation", "r2": True, "rotation_size": 32, "scaling_layers": {}},
        )  # fmt: skip
    with pytest.warns(UserWarning, match="has no effect"):
        config = made.get_config(
            "nvfp4", ["rotation", "smoothquant", "gptq"],
            algo_configs={"gptq": {"damp_percent": 0.02, "inside_layer_modules": ["mlp.down_proj"]}},
        )  # fmt: skip
    slots = ["*mlp.down_proj.weight_quantizer"]
    assert config["quantize"]["algorithm"] == [
        {"method": "rotation", "r1": True, "r2": True, "random": False, "block": 32},
        {"method": "smoothquant", "alpha": 0.5, "scale_clamp_min": 1e-3, "scaling_layers": rows},
        {"method": "gptq", "damp": 0.02, "refine": "off", "holdout": 0, "true_sequential": True, "slots": slots},
    ]
    plan = of_config("demo", config)
    assert [step.name for step in plan.algorithms] == ["rotation", "smoothquant", "gptq"]
    assert {name.rpartition(".")[2] for name in plan.algorithms[2].weights} == {"down_proj"}


# What release 0.13 of amd-quark gives for `LLMTemplate.get("llama").get_config("int4_wo_128", NAME).to_dict()`.
CONFIGS = json.loads((Path(__file__).parent.parent / "data" / "quark_algorithms.json").read_text())
SLOTS = [f"*{name}.weight_quantizer" for name in (
    "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj",
    "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj",
)]  # fmt: skip
COLUMNS: dict[str, Any] = {"act_order": True, "refine": "off", "holdout": 0, "true_sequential": True, "slots": SLOTS}
IN_OUR_WORDS: dict[str, dict[str, Any]] = {
    "awq": {"scaling_layers": CONFIGS["awq"]["scaling_layers"]},
    "smoothquant": {
        "alpha": 1, "scale_clamp_min": 0.001, "scaling_layers": CONFIGS["smoothquant"]["scaling_layers"],
    },
    "autosmoothquant": {
        "compute_scale_loss": "MAE", "scaling_layers": CONFIGS["autosmoothquant"]["scaling_layers"],
    },
    "gptq": {**COLUMNS, "damp": 0.01},
    "gptaq": {**COLUMNS, "damp": 0.01, "strength": 0.25},
    "qronos": {**COLUMNS, "damp": 0.001, "damp_of": "largest", "strength": 1.0},
    "rotation": {"r1": True, "r2": False, "random": False},
}  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        *([name] for name in IN_OUR_WORDS), ["smoothquant", "gptq"], ["autosmoothquant", "qronos"], ["awq", "gptq"],
        ["rotation", "gptq"], ["rotation", "qronos"], ["rotation", "smoothquant", "gptaq"],
    ],
    ids="+".join,
)  # fmt: skip
def test_quarks_own_configs_alone_and_stacked(names: list[str], recwarn: pytest.WarningsRecorder):
    """In the old keywords, in `algo_configs` and in an exported file: the same steps, which run in their order."""
    wanted = [(name, IN_OUR_WORDS[name]) for name in names]
    old = LLMTemplate("mine", exclude_layers_name=["lm_head"], **{f"{name}_config": CONFIGS[name] for name in names})
    new = LLMTemplate("mine", exclude_layers_name=["lm_head"])
    given = {name: CONFIGS[name] for name in names}
    for config in (old.get_config("int8", names), new.get_config("int8", names, algo_configs=given)):
        steps = config["quantize"]["algorithm"]
        assert [(step.pop("method"), step) for step in steps] == wanted
    assert from_quark([CONFIGS[name] for name in names], ()).steps == wanted
    plan = of_config("demo", old.get_config("int8", names))
    assert [step.name for step in plan.algorithms] == names
    noted = " ".join(str(warning.message) for warning in recwarn)
    assert "model_decoder_layers has no effect" in noted


@pytest.mark.parametrize("name", IN_OUR_WORDS)
def test_every_field_of_quarks_configs_has_an_effect_or_a_note(name: str):
    """None is passed over in silence: what is neither in the steps nor said is null, false or empty."""
    read = from_quark(CONFIGS[name], ())
    ((_, parameters),) = read.steps
    noted = {path[-1] for path, _ in read.notes}
    theirs = {"damp_percent": "damp", "alpha": {"qronos": "damp", "gptaq": "strength"}.get(name, "alpha"),
              "desc_act": "act_order", "inside_layer_modules": "slots", "random_r1": "random"}  # fmt: skip
    silent = {
        key: value for key, value in CONFIGS[name].items()
        if key != "name" and key not in noted and theirs.get(key, key) not in parameters and value
    }  # fmt: skip
    assert silent == ({"static_groups": True} if name in ("gptq", "gptaq", "qronos") else {})


@pytest.mark.parametrize(
    "keyword",
    [f"{name}_config" for name in ("awq", "gptq", "gptaq", "qronos", "rotation", "smoothquant", "autosmoothquant")],
)
def test_legacy_keywords_warn(keyword: str):
    with pytest.warns(DeprecationWarning, match=keyword):
        made = LLMTemplate("mine", **{keyword: {"alpha": 0.5}})
    assert made.algo_config == {keyword.removesuffix("_config"): {"alpha": 0.5}}


def test_parameters_of_algorithms():
    made = LLMTemplate("mine", exclude_layers_name=["lm_head"], algorithm_configs={"GPTQ": {"damp": 0.1}})

    def steps(**asked: Any) -> Any:
        return made.get_config("int4_wo_128", "gptq", **asked)["quantize"]["algorithm"]

    assert steps() == [{"method": "gptq", "damp": 0.1}]
    with pytest.warns(UserWarning, match="block_size has no effect"):
        assert steps(algo_configs={"gptq": {"block_size": 128, "damp_percent": 0.02, "static_groups": True}}) == [
            {"method": "gptq", "damp": 0.02, "refine": "off", "holdout": 0, "true_sequential": True}
        ]
    with pytest.raises(ConfigError, match="has no field 'dampp'"):
        steps(algo_configs={"gptq": {"dampp": 1}})
    assert made.get_config("int4_wo_128", ["gptq"])["quantize"]["algorithm"] == [{"method": "gptq", "damp": 0.1}]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"scheme": "nvpf4"}, UsageError, "unknown scheme 'nvpf4'"),
        ({"scheme": "fp8", "kv_cache_scheme": "fp7"}, UsageError, "unknown KV cache scheme 'fp7'"),
        ({"scheme": "fp8", "attention_scheme": "fp7"}, UsageError, "unknown attention scheme 'fp7'"),
        ({"scheme": "fp8", "layer_config": {"*up_proj": "fp7"}}, UsageError, "unknown scheme 'fp7'"),
        ({"scheme": "fp8", "algorithm": "svdquant"}, ConfigError, "is not supported"),
        ({"scheme": "fp8", "algorithm": "gtpq"}, ConfigError, "unknown"),
        ({"scheme": "fp8", "min_kv_scale": 0.5}, ConfigError, "min_kv_scale works only with a KV cache"),
        ({"scheme": "fp8", "kv_cache_scheme": "fp8", "min_kv_scale": -1}, ConfigError, "a number from 0 on"),
        ({"scheme": "fp8", "shared_scale_groups": ["q_proj", "k_proj"]}, ConfigError, "a list of lists of names"),
        ({"scheme": "fp8", "shared_scale_groups": [[]]}, ConfigError, "a list of lists of names"),
        ({"scheme": "fp8", "exclude_layers": "lm_head"}, ConfigError, r"write \['lm_head'\]"),
        ({"scheme": "fp8", "exclude_layers": 3}, ConfigError, "exclude_layers: a list of names is needed, not 3"),
        ({"scheme": "fp8", "algorithm": 3}, ConfigError, "algorithm: a list of names is needed, not 3"),
        ({"scheme": "fp8", "algorithm": [3]}, ConfigError, r"algorithm: a list of names is needed, not \[3\]"),
        (
            {"scheme": "fp8", "algorithm": "gptq", "algo_configs": {"gptq": 3}},
            ConfigError,
            "a mapping is needed, not 3",
        ),
        ({"scheme": "fp8", "algorithm": "gptq", "algo_configs": 3}, ConfigError, "algo_configs: a mapping is needed"),
        ({"scheme": "fp8", "layer_config": "mxfp4"}, ConfigError, "layer_config: a mapping is needed, not 'mxfp4'"),
    ],
)
def test_mistakes(asked: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        LLMTemplate.get("llama").get_config(**asked)


def test_attention_that_overrules_the_cache_is_said(recwarn: pytest.WarningsRecorder):
    template = LLMTemplate.get("llama")
    for cache in (None, "fp8"):
        template.get_config("fp8", kv_cache_scheme=cache, attention_scheme="fp8")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="attention_scheme fp8 decides the KV cache, not kv_cache_scheme nvfp4"):
        template.get_config("fp8", kv_cache_scheme="nvfp4", attention_scheme="fp8")


def test_what_a_template_does_not_say_is_an_error():
    made = LLMTemplate("mine")
    with pytest.raises(ConfigError, match="which projections make k") as caught:
        made.get_config("fp8", kv_cache_scheme="fp8")
    assert "kv_layers_name" in caught.value.hint
    with pytest.raises(ConfigError, match="which projections make q") as caught:
        made.get_config("fp8", attention_scheme="fp8")
    assert "q_layer_name" in caught.value.hint
    with pytest.raises(ConfigError, match="weight converters"):
        LLMTemplate("mine", f2f_weight_converters=[object()])
    with pytest.raises(TypeError, match="colour"):
        LLMTemplate("mine", colour="red")
    with pytest.raises(ConfigError, match="unknown"):
        LLMTemplate("mine", algorithm_configs={"gtpq": {}})


def test_scale_groups():
    groups = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    template = LLMTemplate.get("llama")
    assert template.get_config("nvfp4", shared_scale_groups=groups) == template.get_config("nvfp4")
    config = template.get_config("nvfp4", shared_scale_groups=[])
    with pytest.raises(
        ModelError,
        match="groups of weights that servers multiply",
    ):
        of_config("demo", config)
    plan = of_config("demo", config, target="none")
    assert plan.shared() == {}
    assert any("share: []" in warning for warning in plan.warnings)
    assert len(of_config("demo", template.get_config("nvfp4")).shared()) == 2 * 4  # q, k, v and gate, up of 4 blocks


def test_scale_groups_of_ones_own():
    """As Quark's JSON says them: these weights alone, so that v and gate have scales of their own."""
    groups = [["q_proj", "k_proj"], ["*up_proj", "down_proj"]]
    plan = of_config("demo", LLMTemplate.get("llama").get_config("fp8", shared_scale_groups=groups))
    members: dict[str, list[str]] = {}
    for target in plan.quantized():
        if ".layers.0." in target.name:
            members.setdefault(target.scale_group, []).append(target.name.rpartition(".")[2])
    assert sorted(members.values()) == [
        ["down_proj", "up_proj"], ["gate_proj"], ["k_proj", "q_proj"], ["o_proj"], ["v_proj"],
    ]  # fmt: skip
    assert any("do not share their per-tensor scales" in text for text in plan.warnings)


def test_exclusions_that_match_nothing():
    template = LLMTemplate.get("llama")
    with pytest.raises(ConfigError, match=r"'\*dwn_proj.weight_quantizer' matches none of") as caught:
        of_config("demo", template.get_config("mxfp4", exclude_layers=["lm_head", "*dwn_proj"]))
    assert "down_proj" in caught.value.hint
    of_config("demo", template.get_config("mxfp4", exclude_layers=[*template.exclude_layers_name, "*down_proj"]))


# --- schemes ----------------------------------------------------------------------------------------------------------


def test_schemes_in_quarks_words():
    """The example of Quark's page: int8 for weights only."""
    weight = {"dtype": "int8", "observer_cls": "PerTensorMinMaxObserver", "symmetric": True, "scale_type": "float",
              "round_method": "half_even", "qscheme": "per_tensor", "is_dynamic": False}  # fmt: skip
    LLMTemplate.register_scheme("int8_weights", config={"weight": weight, "input_tensors": None})
    try:
        assert "int8_weights" in LLMTemplate.get_supported_schemes()
        plan = of_config("demo", LLMTemplate.get("llama").get_config("int8_weights"))
        (spec,) = {target.weight for target in plan.quantized()}
        assert (spec.element, spec.scale.dtype, spec.scale.rule) == ("int8", "model", "half_range")
        assert all(target.input is None for target in plan.quantized())
        with pytest.raises(UsageError, match="already"):
            LLMTemplate.register_scheme("int8_weights", config={"weight": weight})
    finally:
        LLMTemplate.unregister_scheme("int8_weights")
    assert "int8_weights" not in LLMTemplate.get_supported_schemes()
    for name in ("int8_weights", "int8"):
        with pytest.raises(UsageError):
            LLMTemplate.unregister_scheme(name)
    with pytest.raises(ConfigError, match="dtype"):
        LLMTemplate.register_scheme("wrong", config={"weight": weight | {"dtype": "int9"}})


@pytest.mark.parametrize("odd", [3, "x", [], ["a"], object()], ids=lambda odd: type(odd).__name__)
def test_what_is_registered_must_be_of_its_type(odd: Any) -> None:
    """Each was an AttributeError from inside."""
    with pytest.raises(ConfigError, match="a template is needed, not "):
        LLMTemplate.register_template(odd)
    with pytest.raises(ConfigError, match="config: a mapping is needed, not "):
        LLMTemplate.register_scheme("odd", odd)
    with pytest.raises(ConfigError, match="algorithm_configs: a mapping is needed, not "):
        LLMTemplate("mine", algorithm_configs=odd)
    with pytest.raises(ConfigError, match="the name of an algorithm must be text, not 3"):
        LLMTemplate("mine", algorithm_configs={3: {}})
    with pytest.raises(ConfigError, match="model_type must be text, not None"):
        LLMTemplate(None)
    assert "odd" not in LLMTemplate.get_supported_schemes()


def test_quarks_schemes_are_all_there():
    """The 28 names of Quark 0.13."""
    names = (
        "int4_wo_32 int4_wo_64 int4_wo_128 int4_wo_per_channel int4_wa_64 uint4_wo_32 uint4_wo_64 uint4_wo_128 "
        "uint4_wo_per_channel int8 fp8 ptpc_fp8 mxfp4 mxfp4_weight_only mxfp6_e3m2 mxfp6_e2m3 mxfp4_mxfp6_e2m3 "
        "mxfp4_fp8 amdfp4 amdfp4_g32 int4_fp8 mx6 mx9 bfp16 nvfp4 fp4_block16_scale_e4m3 amdfp4_global16 "
        "amdfp4_global32"
    )
    assert set(names.split()) <= set(LLMTemplate.get_supported_schemes())
