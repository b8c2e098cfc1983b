"""The Python API does what the command line does, and a plan that was edited is what is executed."""

from __future__ import annotations

import json
import math
import re
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from safetensors import safe_open

import quarkcli
from quarkcli.api import checked
from quarkcli.api.options import RunOptions
from quarkcli.cli import main
from quarkcli.errors import ConfigError, UsageError
from quarkcli.events import Phase
from quarkcli.plan.model import Plan
from quarkcli.recipe.recipe import from_config
from quarkcli.spec import PerGroup
from tests.plan.layouts import LLAMA, plan

DENY = {"quantizer_path": "*", "enable": False}
BUILTIN = {"calib_data": "builtin", "offline": True}
INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
KV = [{"quantizer_path": "*[kv]_bmm_quantizer", "cfg": FP8}]


def specs(made: Plan) -> dict[str, Any]:
    return {slot: decision.spec for slot, decision in made.slots()}


# --- plans and runs ---------------------------------------------------------------------------------------------------


def test_quantize_returns_the_report_and_tells_events(tmp_path, capsys):
    events = []
    report = quarkcli.quantize(
        "demo", "mxfp4", output=tmp_path / "out", listener=events.append, exclude=["*down_proj"], device="cpu"
    )
    assert report["schema"] == "quark/report/2"
    assert (tmp_path / "out" / "quark" / "manifest.json").is_file()
    assert Phase("verify") in events and events[-1] == Phase("done")
    assert "--exclude '*down_proj'" in report["kept_reasons"]
    assert capsys.readouterr() == ("", "")


def test_make_plan():
    plan = quarkcli.make_plan("demo", recipe="mxfp4", layers=["*down_proj=int4_wo_128"])
    assert plan.targets["model.layers.0.mlp.down_proj"].weight.element == "int4"
    assert plan.targets["model.layers.0.mlp.up_proj"].weight.element == "fp4_e2m1"


def test_a_plan_takes_the_arguments_of_a_run(tmp_path):
    heard = []
    plan = quarkcli.make_plan("demo", "mxfp4", output=tmp_path / "of plan", listener=heard.append)
    assert heard[0] == Phase("resolve")
    quarkcli.quantize(plan)
    quarkcli.quantize(plan, output=tmp_path / "own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of plan", "own"]


NEEDED = {
    quarkcli.quantize: {"model": "demo", "scheme": "mxfp4", "output": "never"},
    quarkcli.make_plan: {"model": "demo", "scheme": "mxfp4"},
    quarkcli.load_recipe: {"name_or_path": "mxfp4"},
    quarkcli.unregister_scheme: {"name": "x"},
    quarkcli.evaluate: {"directory": "demo"},
    quarkcli.compare: {"a": "demo", "b": "demo"},
    quarkcli.convert: {"directory": "demo", "to": "quark", "output": "never"},
    quarkcli.inspect: {"model": "demo"},
    quarkcli.verify: {"directory": "demo"},
    quarkcli.report: {"directory": "demo"},
}


@pytest.mark.parametrize("function", NEEDED, ids=lambda function: function.__name__)
def test_an_argument_of_another_type_is_named(function):
    """Of every argument: what no annotation allows, so that nothing fails inside."""
    names = [name for name in signature(function).parameters if name not in ("config", "scheme")]
    for name in names:
        with pytest.raises(UsageError, match=rf"^{name} must be .*, not (\[\[1\]\]|<object)") as caught:
            function(**{**NEEDED[function], name: object() if name == "entries" else [[1]]})
        assert caught.value.kind == "E-PYTHON-CALL"
    with pytest.raises(UsageError, match=r"^exclude must be Sequence\[str\], not '\*down\*'"):
        quarkcli.make_plan("demo", "mxfp4", exclude="*down*")


def test_numbers_of_numpy_are_numbers():
    """They are what a script computes with; each was refused as another type. An entry stays the same object."""
    given = {"tp": np.int32(2), "seed": np.int64(3), "allow_short": np.bool_(True)}
    assert quarkcli.make_plan("demo", np.str_("mxfp4"), **given).basis.asked.tp == 2
    with pytest.raises(UsageError, match=r"^tp must be int \| None, not 1\.5"):
        quarkcli.make_plan("demo", "mxfp4", tp=np.float64(1.5))
    cfg = {"num_bits": np.int64(4), "block_sizes": {np.int64(-1): np.int64(64), "type": "static"}}
    entries = [DENY, {"quantizer_path": "*weight_quantizer", "cfg": cfg}]
    same = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}
    plan = quarkcli.make_plan(
        "demo", config={"quant_cfg": entries, "algorithm": {"method": "gptq", "block_size": np.int64(64)}}
    )
    assert specs(plan) == specs(quarkcli.make_plan("demo", config={"quant_cfg": [DENY, {**entries[1], "cfg": same}]}))
    for change in (quarkcli.set_quantizer_attributes_full, quarkcli.set_quantizer_attributes_partial):
        change(plan, "*up_proj.weight_quantizer", {"num_bits": np.int64(8), "block_sizes": {-1: np.int64(32)}})
        assert plan.targets["model.layers.0.mlp.up_proj"].weight.granularity == PerGroup(32)
    assert quarkcli.find_quant_cfg_entry_by_path(entries, np.str_("*weight_quantizer")) is entries[1]


@pytest.mark.parametrize(
    ("function", "arguments", "hint"),
    [
        (quarkcli.quantize, {"model": object()}, "a model in memory must be saved first, with save_pretrained"),
        (quarkcli.make_plan, {"scheme": {"weight": {"element": "int4"}}}, "add it with register_scheme"),
        (quarkcli.make_plan, {"scheme": None, "recipe": {"quantize": {}}}, "give it as config"),
        (quarkcli.make_plan, {"scheme": None, "config": "fp8"}, "give the name of a scheme as scheme"),
        (quarkcli.make_plan, {"exclude": "*down*"}, r"give a list: ['*down*']"),
        (quarkcli.make_plan, {"algorithm": ["awq", "gptq"]}, "give one text, with commas between several"),
        (quarkcli.quantize, {"calib_data": ["a row"]}, "give a name, or a file with rows"),
    ],
)
def test_a_common_mistake_is_answered(function, arguments, hint):
    with pytest.raises(UsageError) as caught:
        function(**{**NEEDED[function], **arguments})
    assert caught.value.kind == "E-PYTHON-CALL" and hint in caught.value.hint


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda plan: quarkcli.disable_quantizer(plan, ["*q_proj", "*k_proj"]), "wildcard_or_filter must be a pattern"),
        (lambda plan: quarkcli.enable_quantizer(plan, None), "wildcard_or_filter must be a pattern"),
        (lambda plan: quarkcli.set_quantizer_attributes_full(plan, None, INT4), "wildcard_or_filter must be a pattern"),
        (lambda plan: quarkcli.disable_quantizer(plan, "*", 3), "parent_class must be a class or its name, not 3"),
        (lambda plan: quarkcli.set_quantizer_by_cfg("demo", [DENY]), "plan must be a plan, not 'demo'"),
        (lambda plan: quarkcli.set_quantizer_attributes_partial("demo", "*", INT4), "plan must be a plan, not 'demo'"),
        (lambda plan: quarkcli.need_calibration("demo"), "plan must be Plan, not 'demo'"),
        (lambda plan: quarkcli.estimate_quant_compression({}), "plan must be Plan, not {}"),
        (lambda plan: quarkcli.find_quant_cfg_entry_by_path(None, "*"), "quant_cfg_list must be Sequence"),
        (lambda plan: quarkcli.LLMTemplate.get("llama").get_config(None), "scheme: its name must be text, not None"),
        (
            lambda plan: quarkcli.LLMTemplate.get("llama").get_config("fp8", kv_cache_scheme=True),
            "its name must be text",
        ),
    ],
)
def test_functions_that_change_a_plan_name_an_argument_of_another_type(call, said):
    plan = quarkcli.make_plan("demo", "mxfp4")
    with pytest.raises(UsageError, match=f"^.*{re.escape(said)}") as caught:
        call(plan)
    assert caught.value.kind == "E-PYTHON-CALL" and len(list(plan.quantized())) == 28


def test_too_many_positions_are_said_as_python_does():
    with pytest.raises(TypeError, match=r"^quantize\(\) takes from 1 to 2 positional arguments but 3 were given"):
        quarkcli.quantize("demo", "mxfp4", "out")


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch):
    """A path that one function took and another did not led to a directory named `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("schema: quark/recipe/1\nquantize: {scheme: mxfp4}\n")
    (tmp_path / "rows.txt").write_text("words " * 5000)
    assert quarkcli.load_recipe("~/r.yaml").scheme == "mxfp4"
    plan = quarkcli.make_plan("demo", recipe=Path("~/r.yaml"), calib_data=Path("~/rows.txt"), output="~/out")
    assert (plan.basis.asked.calib_data, plan.basis.asked.output) == (str(tmp_path / "rows.txt"), tmp_path / "out")
    quarkcli.quantize("demo", "mxfp4", output="~/made")
    assert quarkcli.report("~/made")["size"]
    assert any("manifest" in line and "no manifest" not in line for line in quarkcli.verify(Path("~/made"))["checks"])
    quarkcli.convert("~/made", "quark", "~/other")
    assert (tmp_path / "other" / "config.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (quarkcli.make_plan, {"calib_samples": 0}, "calib_samples must be at least 1, not 0"),
        (quarkcli.quantize, {"calib_seqlen": 1}, "calib_seqlen must be at least 2, not 1"),
        (quarkcli.quantize, {"time_budget": math.nan}, "time_budget must be a finite number, not nan"),
        (quarkcli.evaluate, {"tokens": -1}, "tokens must be at least 2, not -1"),
        (quarkcli.evaluate, {"baseline": "demo", "max_kl": math.inf}, "max_kl must be a finite number, not inf"),
        (quarkcli.make_plan, {"seed": -1}, "seed must be at least 0, not -1"),
        (quarkcli.quantize, {"seed": 2**64}, "seed must be at most 9223372036854775807, not 18446744073709551616"),
        (quarkcli.verify, {"tp": [2, 0]}, "tp must be at least 1, not 0"),
        (quarkcli.compare, {"min_sqnr": math.nan}, "min_sqnr must be a finite number, not nan"),
    ],
)
def test_a_number_out_of_range_is_named(function, arguments, said):
    with pytest.raises(UsageError, match=f"^{re.escape(said)}") as caught:
        function(**NEEDED[function], **arguments)
    assert caught.value.kind == "E-PYTHON-CALL"


def test_ranges_are_those_of_the_flags():
    """Of every flag with a least or a largest number: the argument of its name has the same."""
    root, found, largest = typer.main.get_command(main.app), {}, {}
    known = {*RunOptions.__annotations__, *signature(quarkcli.evaluate).parameters}
    for command in ("quantize", "eval", "verify"):
        for flag in root.get_command(None, command).params:
            least = getattr(flag, "min", None)
            if least is not None and flag.name in known:
                found[flag.name] = least
                largest |= {flag.name: flag.max} if flag.max is not None else {}
    assert found.keys() >= {"calib_samples", "calib_seqlen", "calib_batch", "min_expert_tokens", "threads", "window"}
    assert {name: checked.LEAST.get(name) for name in found} == found
    assert largest == checked.MOST and largest.keys() == {"seed"}


def test_load_recipe():
    assert quarkcli.load_recipe("nvfp4-kv_fp8").kv_cache == "fp8"
    with pytest.raises(ConfigError):
        quarkcli.load_recipe("nope")
    loaded = quarkcli.make_plan("demo", recipe=quarkcli.load_recipe("nvfp4-kv_fp8"), **BUILTIN)
    assert specs(loaded) == specs(quarkcli.make_plan("demo", recipe="nvfp4-kv_fp8", **BUILTIN))


def test_mistakes():
    with pytest.raises(UsageError):
        quarkcli.make_plan("demo")
    with pytest.raises(TypeError, match=r"^make_plan\(\) got an unexpected keyword argument 'colour'$"):
        quarkcli.make_plan("demo", "mxfp4", colour="red")
    with pytest.raises(TypeError, match=r"^quantize\(\) .* 'sampels'; did you mean 'calib_samples'\?$"):
        quarkcli.quantize("demo", "mxfp4", sampels=4)
    with pytest.raises(TypeError, match="'overrides'"):  # a field of `Options`, and no option
        quarkcli.quantize("demo", "mxfp4", overrides=None)
    with pytest.raises(UsageError, match="exclude each other"):
        quarkcli.make_plan("demo", recipe="mxfp4", config=[DENY])
    with pytest.raises(UsageError):
        quarkcli.make_plan("demo", "mxfp4", config=[DENY])
    with pytest.raises(ConfigError, match="num_bitz"):
        quarkcli.make_plan("demo", config=[DENY, {"quantizer_path": "*", "cfg": {"num_bitz": 4}}])
    assert quarkcli.Options(model="demo").seed is None


NATIVE = {"schema": "quark/recipe/1", "metadata": {"description": "x"}}
INT8 = {"element": "int8"}


@pytest.mark.parametrize(
    ("entries", "where", "what"),
    [
        ([{"quantizer_path": "*dwn_proj.weight_quantizer", "enable": False}], "[2]", "matches none of"),
        ([{"quantizer_path": "*q_proj*", "enable": False}, {"quantizer_path": "*dwn_proj.weight*", "cfg": INT8}],
         "[3]", "matches none of"),
        ([{"quantizer_path": "*up_proj.*", "cfg": INT8}, {"quantizer_path": "*mlp*", "enable": False}],
         "[2]", "switches quantizers on, but all of them end switched off"),
        ([{"quantizer_path": "*", "parent_class": "nn.Conv2d", "cfg": INT8}], "[2]", "matches none of"),
    ],
)  # fmt: skip
def test_patterns_in_python_data_are_checked_as_in_a_file(entries, where, what):
    """The place of an entry is its path in the data, so that each counts on its own."""
    rows = [DENY, {"quantizer_path": "*.weight_quantizer", "cfg": INT8}, *entries]
    with pytest.raises(ConfigError, match=what) as caught:
        quarkcli.make_plan("demo", config={**NATIVE, "quantize": {"quant_cfg": rows}}, **BUILTIN)
    assert caught.value.where == f"config.quantize.quant_cfg{where}"


@pytest.mark.parametrize(
    ("cfg", "where"), [({"num_bitz": 8}, "cfg"), ([{"num_bits": 4}, {"num_bits": 8, "foo": 1}], "cfg[1]")]
)
def test_unknown_attributes_are_refused_where_a_list_is_normalized(cfg, where):
    with pytest.raises(ConfigError, match="unknown attribute") as caught:
        quarkcli.normalize_quant_cfg_list([DENY, {"quantizer_path": "*", "cfg": cfg}])
    assert caught.value.where == f"quant_cfg[1].{where}"


def test_a_misspelled_pattern_of_a_peer_is_said_with_its_path():
    rows = [
        DENY,
        {"quantizer_path": "*weight_quantizer", "cfg": INT4},
        {"quantizer_path": "*dwn_proj*", "enable": False},
    ]
    for config, where in ((rows, "config[2]"), ({"quant_cfg": rows}, "config.quant_cfg[2]")):
        made = quarkcli.make_plan("demo", config=config, **BUILTIN)
        assert f"{where}: '*dwn_proj*' matched none of 136 quantizers" in made.warnings
    legacy = {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": INT4, "*dwn_proj*": {"enable": False}}}
    made = quarkcli.make_plan("demo", config=legacy, **BUILTIN)
    assert "config.quant_cfg['*dwn_proj*']: '*dwn_proj*' matched none of 136 quantizers" in made.warnings


def test_python_data_has_the_limits_of_a_file():
    deep: list = []
    deep.append(deep)
    for config in (deep, {"quant_cfg": [{"quantizer_path": "*", "enable": False}] * 60_000}):
        with pytest.raises(ConfigError, match="more than 100000 values or 64 levels"):
            quarkcli.make_plan("demo", config=config, **BUILTIN)


@pytest.mark.parametrize("scheme", [None, 8, "int8", [1], [("weight", 8)]])
def test_a_scheme_that_is_no_mapping(scheme):
    with pytest.raises(ConfigError, match="a scheme must be a mapping, not"):
        quarkcli.register_scheme("own", scheme)


def test_all_names_are_there():
    for name in quarkcli.__all__:
        assert getattr(quarkcli, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        quarkcli.nothing_of_the_kind  # noqa: B018


CONFIGS: dict[str, Any] = {
    "native": {
        "schema": "quark/recipe/1",
        "exclusions": "none",
        "quantize": {
            "quant_cfg": [
                DENY,
                {"quantizer_path": "*proj.weight_quantizer", "cfg": {"element": "int4", "granularity": {"group": 128}}},
            ]
        },
    },
    "modelopt": {"quant_cfg": [DENY, {"quantizer_name": "*proj.weight_quantizer", "cfg": INT4}], "algorithm": "max"},
    "modelopt list": (DENY, {"quantizer_name": "*proj.weight_quantizer", "cfg": INT4}),
    "legacy": {"*proj.weight_quantizer": INT4, "default": {"enable": False}},
    "quark": {
        "global_quant_config": {
            "weight": {
                "dtype": "int4", "qscheme": "per_group", "group_size": 128, "ch_axis": -1, "is_dynamic": False,
                "symmetric": True, "round_method": "half_even", "scale_type": "float",
            }
        },
        "exclude": ["lm_head"],
    },
}  # fmt: skip


MODELOPT = {"modelopt", "modelopt list", "legacy"}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every kind of config that a file may hold. The working directory has no say in what a scheme is."""
    (tmp_path / "int4.yaml").write_text("nonsense: [")
    monkeypatch.chdir(tmp_path)
    config = CONFIGS[name]
    before = repr(config)
    made = quarkcli.make_plan("demo", config=config)
    weights = {target.name: target.weight for target in made.quantized()}
    assert {(spec.element, spec.group_size) for spec in weights.values()} == {("int4", 128)}
    assert {leaf.rsplit(".", 1)[-1] for leaf in weights} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    # Each system's own rule for the range of an integer.
    assert {spec.scale.rule for spec in weights.values()} == {"absmax" if name in MODELOPT else "half_range"}
    assert repr(config) == before


def test_an_edited_plan_is_what_is_executed(tmp_path: Path):
    made = quarkcli.make_plan(
        "demo", "mxfp4", exclude=["*o_proj"], dialect="quark", device="cpu", seed=3, target="none"
    )
    quarkcli.disable_quantizer(made, "*down_proj*")
    quarkcli.set_quantizer_attributes_full(made, "*.0.*up_proj.weight_quantizer", INT4)
    quarkcli.set_quantizer_attributes_full(made, "*.0.*up_proj.input_quantizer", INT4 | {"enable": False})
    with quarkcli.set_quantizer_by_cfg_context(made, [DENY]):
        assert not any(made.quantized())
    report = quarkcli.quantize(made, output=tmp_path / "out")
    assert "disable_quantizer('*down_proj*')" in report["kept_reasons"]
    with safe_open(next((tmp_path / "out").glob("*block-00000*")), "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    prefix = "model.layers.0"
    assert stored[f"{prefix}.mlp.down_proj.weight"] == stored[f"{prefix}.self_attn.o_proj.weight"] == "BF16"
    assert stored[f"{prefix}.mlp.gate_proj.weight"] == "U8"  # two fp4 codes a byte
    assert stored[f"{prefix}.mlp.up_proj.weight"] == "I32"  # eight int4 codes a word
    # What was executed stands in the output and repeats the job.
    again = quarkcli.make_plan("demo", recipe=tmp_path / "out" / "quark" / "recipe.yaml", target="none")
    assert specs(again) == specs(made)
    written = yaml.safe_load((tmp_path / "out" / "quark" / "recipe.yaml").read_text())
    assert written["quantize"]["quant_cfg"][-1]["cfg"]["num_bits"] == 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "quark"


def test_a_plan_says_what_to_do():
    made = quarkcli.make_plan("demo", "mxfp4")
    for more in ({"scheme": "fp8"}, {"recipe": "mxfp4"}, {"config": [DENY]}, {"exclude": ["*"]}, {"algorithm": "gptq"}):
        with pytest.raises(UsageError, match=r"a plan"):
            quarkcli.quantize(made, output="nowhere", **more)
    with pytest.raises(UsageError, match="not made by"):
        quarkcli.quantize(plan("mxfp4"), output="nowhere")
    quarkcli.disable_quantizer(made, "*")
    with pytest.raises(ConfigError, match="quantizes nothing"):
        quarkcli.quantize(made, output="nowhere")


def test_options_of_a_plan_and_of_its_run(tmp_path: Path):
    made = quarkcli.make_plan("demo", "fp8", calib_samples=2, calib_seqlen=16, **BUILTIN)
    first = quarkcli.quantize(made, output=tmp_path / "a", device="cpu")
    other = quarkcli.quantize(made, output=tmp_path / "b", device="cpu", calib_samples=3)
    assert (first["calibration"]["rows"], other["calibration"]["rows"]) == (2, 3)
    assert first["calibration"]["seqlen"] == other["calibration"]["seqlen"] == 16


def test_the_algorithms_of_a_plan_stay():
    made = quarkcli.make_plan("demo", "int4_wo_128", algorithm="gptq", **BUILTIN)
    quarkcli.disable_quantizer(made, "*down_proj*")
    assert made.algorithms == [("gptq", {}, None)]
    assert quarkcli.need_calibration(made)


# --- lists of entries -------------------------------------------------------------------------------------------------


def test_normalize():
    """Rows 3 and 4 of the peer's accepted shapes give one canonical list."""
    flat = {"*": {"enable": False}, "*weight_quantizer": {"num_bits": 8, "axis": 0}}
    canonical = [
        {"quantizer_path": "*", "cfg": None, "enable": False},
        {"quantizer_path": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}, "enable": True},
    ]
    for given in (flat, [{key: value} for key, value in flat.items()]):
        with pytest.warns(DeprecationWarning) as caught:
            assert quarkcli.normalize_quant_cfg_list(given) == canonical
        assert len(caught) == 1
        assert caught[0].filename == __file__
    scoped = {"nn.Linear": {"*": {"enable": False}}}
    with pytest.warns(DeprecationWarning):
        assert quarkcli.normalize_quant_cfg_list(scoped)[0]["parent_class"] == "nn.Linear"
    with pytest.raises(ConfigError, match="2 problems"):
        quarkcli.normalize_quant_cfg_list([{"quantizer_path": "*"}, {"cfg": {}, "enable": 3}])


def test_normalize_leaves_canonical_lists_alone(recwarn: pytest.WarningsRecorder):
    canonical = [{"quantizer_path": "*", "cfg": {"num_bits": [4, 3]}, "enable": False, "parent_class": "nn.Linear"}]
    result = quarkcli.normalize_quant_cfg_list(canonical)
    assert result == canonical
    result[0]["cfg"]["num_bits"] = 8
    assert canonical[0]["cfg"]["num_bits"] == [4, 3]
    assert not recwarn.list


def test_find():
    entries = [
        {"quantizer_path": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}},
        {"quantizer_path": "*weight_quantizer", "cfg": {"num_bits": 4}},
        {"quantizer_path": "*input_quantizer", "cfg": {"num_bits": 8}},
    ]
    assert quarkcli.find_quant_cfg_entry_by_path(entries, "*weight_quantizer") is entries[2]
    assert quarkcli.find_quant_cfg_entry_by_path(entries[:2], "*weight_quantizer") is entries[1]
    for path in ("model.layers.0.mlp.up_proj.weight_quantizer", "*weight_quantiser", "weight_quantizer"):
        with pytest.raises(KeyError) as caught:
            quarkcli.find_quant_cfg_entry_by_path(entries, path)
        assert isinstance(caught.value, ConfigError)
        assert str(caught.value) == f"no entry has the path '{path}'"
    assert "*weight_quantizer" in caught.value.hint


def test_update_with_a_cache(recwarn: pytest.WarningsRecorder):
    config = {"quant_cfg": [DENY, {"quantizer_path": "*weight_quantizer", "cfg": INT4}], "algorithm": None}
    before = repr(config)
    both = quarkcli.update_quant_cfg_with_kv_cache_quant(config, KV)
    assert [entry["quantizer_path"] for entry in both["quant_cfg"]] == [
        "*",
        "*weight_quantizer",
        KV[0]["quantizer_path"],
    ]
    assert both["algorithm"] == "max"
    assert repr(config) == before
    assert quarkcli.update_quant_cfg_with_kv_cache_quant(config["quant_cfg"], {"quant_cfg": KV}) == both["quant_cfg"]
    kept = quarkcli.update_quant_cfg_with_kv_cache_quant(config | {"algorithm": {"method": "gptq"}}, KV)
    assert kept["algorithm"] == {"method": "gptq"}
    made = quarkcli.make_plan("demo", config=both, exclude=["lm_head", "*embed_tokens"], **BUILTIN)
    assert all(module.specs.keys() == {"k", "v"} for module in made.attention.values())
    assert not recwarn.list


# --- what a plan comes to ---------------------------------------------------------------------------------------------


def slots(weight: Any, source: Any = None, **more: Any) -> list[dict[str, Any]]:
    rows = [DENY, {"quantizer_path": "*proj.weight_quantizer", "cfg": weight}]
    return [*rows, *([{"quantizer_path": "*proj.input_quantizer", "cfg": source, **more}] if source else [])]


@pytest.mark.parametrize(
    ("entries", "needed"),
    [
        (slots(INT4), False),  # weights only
        (slots(FP8, FP8), True),  # a static scale per tensor
        (slots(NVFP4, NVFP4), True),  # the global scale is calibrated
        (slots(MXFP4, MXFP4), False),  # ModelOpt says yes: it looks at the top-level type alone
        (slots(FP8, FP8 | {"type": "dynamic"}), False),
        ([*slots(FP8, FP8), {"quantizer_path": "*input_quantizer", "enable": False}], False),  # ModelOpt: yes
        (slots(FP8, [FP8], enable=False), False),  # ModelOpt: yes
        ([*slots(INT4), *KV], True),
        ([*slots(INT4), {**KV[0], "cfg": {**FP8, "constant_amax": 448.0}}], False),  # ModelOpt: yes
        ([*slots(INT4), {**KV[0], "cfg": {**FP8, "use_constant_amax": True}}], False),
    ],
)
def test_need_calibration(entries: list[dict[str, Any]], needed: bool):
    assert quarkcli.need_calibration(plan(from_config(entries))) is needed


@pytest.mark.parametrize(("algorithm", "needed"), [("max", False), ({"method": "max"}, False), ("gptq", True)])
def test_algorithms_need_calibration(algorithm: Any, needed: bool):
    """`{method: max}` counts as a need in ModelOpt; it says nothing that `max` does not say."""
    made = plan(from_config({"quant_cfg": slots(INT4), "algorithm": algorithm}))
    assert quarkcli.need_calibration(made) is needed


@pytest.mark.parametrize(
    ("cfg", "bits"),
    [
        (MXFP4, 4 + 8 / 32),
        (INT4, 4 + 16 / 128),  # scales in the model's bfloat16
        ({"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}, 8 + 8 / 32),
    ],
)
def test_compression(cfg: Any, bits: float):
    assert quarkcli.estimate_quant_compression(plan(from_config(slots(cfg)))) == bits / 16


def test_compression_of_scales_per_tensor():
    """nvfp4: 4 bits, a byte per 16, and one float32 for every weight."""
    made = plan(from_config(slots(NVFP4)))
    values = sum(target.numel for target in made.quantized())
    tensors = sum(1 for _ in made.quantized())
    assert quarkcli.estimate_quant_compression(made) == pytest.approx((4.5 + 32 * tensors / values) / 16, rel=1e-12)
    cache_only = plan(from_config([DENY, {**KV[0], "cfg": FP8}]), LLAMA)
    assert quarkcli.estimate_quant_compression(cache_only) == 1.0
