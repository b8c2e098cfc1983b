"""Recipe files of other systems, `--set`, conversion, and the names that other systems give their recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from quarkcli.errors import ConfigError, UsageError
from quarkcli.recipe import catalog, convert, recipe
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.load import parse
from quarkcli.recipe.match import matches
from quarkcli.recipe.schema import json_schema
from quarkcli.recipe.settings import adjusted
from quarkcli.spec import ObserverSpec
from tests import runs

INT8 = {"num_bits": 8, "axis": 0}
DENY = {"quantizer_path": "*", "enable": False}
DYNAMIC = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}
NVFP4 = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "static", "scale_bits": [4, 3]}}


def write(folder: Path, data: Any, name: str = "old.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(data) if name.endswith("json") else yaml.safe_dump(data, sort_keys=False))
    return path


def modelopt(cfg: list[dict[str, Any]], algorithm: Any = "max") -> dict[str, Any]:
    return {"metadata": {"recipe_type": "ptq"}, "quantize": {"algorithm": algorithm, "quant_cfg": cfg}}


@pytest.mark.parametrize(
    "data",
    [
        [DENY, {"quantizer_name": "*weight_quantizer", "cfg": INT8}],
        {"*": {"enable": False}, "*weight_quantizer": INT8},
        {"*weight_quantizer": INT8, "default": {"enable": False}},
        {"quant_cfg": {"*": {"enable": False}, "*weight_quantizer": INT8}, "algorithm": "max"},
        modelopt([DENY, {"quantizer_path": "*weight_quantizer", "cfg": INT8}]),
    ],
    ids=["list", "dict", "default", "preset", "recipe"],
)
def test_one_list_in_every_wrapping(data: Any, tmp_path: Path) -> None:
    found = recipe.from_file(write(tmp_path, data, "old.json"))
    assert convert.canonical(found) == [
        {"quantizer_path": "*", "cfg": None, "enable": False},
        {"quantizer_path": "*weight_quantizer", "cfg": INT8, "enable": True},
    ]
    assert not found.exclusions  # nothing of ours is appended
    assert not any(entry.required or entry.user for entry in found.entries)
    assert all("old.json:1:" in str(entry.origin) for entry in found.entries)
    assert found.algorithms == []


def test_a_legacy_file_says_how_it_is_written_today(tmp_path: Path) -> None:
    found = recipe.from_file(write(tmp_path, {f"*{i}.weight_quantizer": INT8 for i in range(5)}))
    assert len(found.notes) == 4
    assert "old.yaml:1:1: legacy form; today it is written: - {quantizer_path: '*0.weight_quantizer'" in found.notes[0]
    assert "2 more such notes" in found.notes[-1]
    assert not recipe.from_file(write(tmp_path, [DENY])).notes


def test_every_note_on_what_has_no_effect_is_shown(tmp_path: Path) -> None:
    steps = [{"name": name, "block_size": 64, "model_decoder_layers": "layers"} for name in ("gptq", "gptaq")]
    config = {"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}, "algo_config": steps}
    notes = " ".join(recipe.from_file(write(tmp_path, config)).notes)
    assert (notes.count("block_size has no effect"), notes.count("model_decoder_layers has no effect")) == (2, 2)
    assert "more such notes" not in notes


def test_a_list_without_deny_all_differs_from_modelopt(tmp_path: Path) -> None:
    rows = [{"quantizer_path": "*weight_quantizer", "cfg": INT8}]
    for data in (rows, {"quant_cfg": rows}):
        [text] = recipe.from_file(write(tmp_path, data)).differs
        assert "'; ModelOpt quantizes all other modules to int8, and quark leaves them as they are" in text
    assert not recipe.from_file(write(tmp_path, [DENY, *rows])).differs


@pytest.mark.parametrize("section", ["auto_quantize", "quantize"])
def test_a_search_is_refused_without_a_way_round(section: str, tmp_path: Path) -> None:
    data = {"metadata": {"recipe_type": "auto_quantize"}, section: {}}
    with pytest.raises(ConfigError, match="asks for a search among formats") as caught:
        recipe.from_file(write(tmp_path, data))
    assert "quantize:" not in caught.value.hint and "did you mean" not in caught.value.hint


def test_a_quark_config(tmp_path: Path) -> None:
    spec = {"dtype": "int4", "qscheme": "per_group", "group_size": 128, "symmetric": True, "scale_type": "float"}
    found = recipe.from_file(write(tmp_path, {"global_quant_config": {"weight": spec}, "exclude": ["lm_head"]}))
    kinds = {entry.quantizer_path for entry in found.entries if entry.enable}
    assert kinds == {"*.weight_quantizer"}
    assert found.entries[0].quantizer_path == "*"
    assert not found.entries[0].enable
    assert found.entries[-1].quantizer_path.startswith("lm_head.")


@pytest.mark.parametrize(
    ("data", "where", "what"),
    [
        ({"metadata": {"recipe_type": "auto_quantize"}, "quantize": {}}, "metadata.recipe_type", "auto_quantize"),
        ({"metadata": {"recipe_type": "ptq"}}, "", "'quantize' is missing"),
        ({"metadata": {"recipe_type": "ptq"}, "quantize": {"algorithm": "max"}}, "quantize", "'quant_cfg' is missing"),
        ({"metadata": {"who": 1}, "quantize": {"quant_cfg": [DENY]}}, "metadata.who", "unknown key 'who'"),
        (modelopt([DENY], "nosuch"), "quantize.algorithm", "'nosuch' is unknown"),
        (modelopt([DENY], {"method": "svdquant"}), "quantize.algorithm", "svdquant"),
        (modelopt([{"quantizer_path": "*", "cfg": {"num_bits": 5}}]), "quantize.quant_cfg.0.cfg", "num_bits 5"),
        (modelopt([{"quantizer_path": "*", "cfg": {"bias": {-1: None}}}]), "quantize.quant_cfg.0.cfg", "'bias'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_its_place(data: Any, where: str, what: str, tmp_path: Path) -> None:
    path = write(tmp_path, data)
    document = catalog.document(path)
    steps = [int(step) if step.isdigit() else step for step in where.split(".") if step]
    with pytest.raises(ConfigError, match=what) as caught:
        recipe.from_file(path)
    assert caught.value.where == str(document.origin(*steps))


class TestMse:
    """ModelOpt's `mse` becomes a property of the weights."""

    def found(self, tmp_path: Path, weight: Any, **parameters: Any) -> Any:
        rows = [
            {"quantizer_path": "*weight_quantizer", "cfg": weight},
            {"quantizer_path": "*input_quantizer", "cfg": {"num_bits": 8}},
        ]
        made = recipe.from_file(write(tmp_path, modelopt(rows, {"method": "mse", **parameters})))
        assert made.algorithms == []
        assert made.entries[1].cfg == {"num_bits": 8}  # activations stay as they are
        return to_spec(made.entries[0].cfg, weight=True)

    def test_sweeps_block_scales(self, tmp_path: Path) -> None:
        assert self.found(tmp_path, NVFP4, fp8_scale_sweep=True).scale.rule == "sweep"

    def test_shrinks_every_other_range(self, tmp_path: Path) -> None:
        spec = self.found(tmp_path, INT8, start_multiplier=0.5, step_size=0.05)
        assert spec.observer == ObserverSpec("mse", (("steps", 11.0), ("shrink", 0.5)))

    def test_weights_that_a_wider_pattern_names(self, tmp_path: Path) -> None:
        rows = [
            {"quantizer_path": path, "cfg": {"num_bits": 8}}
            for path in ("*", "*mlp.*_quantizer", "*[kv]_bmm_quantizer")
        ]
        made = recipe.from_file(write(tmp_path, modelopt(rows, {"method": "mse"}))).entries
        patterns = ["*", "*weight_quantizer", "*mlp.*_quantizer", "*mlp.*weight_quantizer", "*[kv]_bmm_quantizer"]
        assert [entry.quantizer_path for entry in made] == patterns
        names = [to_spec(entry.cfg, weight=True).observer.name for entry in made]
        assert names == ["min_max", "mse", "min_max", "mse", "min_max"]

    @pytest.mark.parametrize(
        "pattern",
        [
            "*weight*",
            "*.weight*",
            "*mlp*weight*",
            "*weight_q*",
            "*.up_proj.w*",
            "*up*_quant*",
            "*.layers.0.*",
            "*t*r",
            "re:.*mlp.*",
            "re:(?i).*UP_proj.*|lm_head.*",
            "re:.*(weight_quantizer|input_quantizer)",
        ],
    )
    def test_a_pattern_whose_end_is_about_the_quantizer(self, pattern: str, tmp_path: Path) -> None:
        """Each weight that it reaches is searched, and nothing else: a star may stand for a part of both names."""
        modules = [f"model.layers.{n}.mlp.{leaf}" for n in (0, 10) for leaf in ("up_proj", "weighted")]
        slots = [f"{module}.{kind}_quantizer" for module in (*modules, "lm_head") for kind in ("weight", "input")]
        rows = [{"quantizer_path": pattern, "cfg": {"num_bits": 8}}]
        plain, *searched = recipe.from_file(write(tmp_path, modelopt(rows, {"method": "mse"}))).entries
        assert plain.quantizer_path == pattern
        assert [to_spec(entry.cfg, weight=True).observer.name for entry in searched] == ["mse"]
        wanted = [slot for slot in slots if slot.endswith("weight_quantizer") and matches(pattern, [slot])]
        assert wanted
        assert [slot for slot in slots if matches(searched[0].quantizer_path, [slot])] == wanted


class TestHeadroom:
    """ModelOpt's `nvfp4_act_headroom` becomes a property of the inputs, and of the weights what it says of them."""

    ROWS: ClassVar = [
        {"quantizer_path": "*weight_quantizer", "cfg": NVFP4},
        {"quantizer_path": "*input_quantizer", "cfg": DYNAMIC},
        {"quantizer_path": "*up_proj.input_quantizer", "cfg": DYNAMIC | {"constant_amax": 2688}},
        {"quantizer_path": "*down_proj.input_quantizer", "cfg": {"num_bits": 8}},
    ]

    def test_of_inputs(self, tmp_path: Path) -> None:
        asked = {
            "method": "nvfp4_act_headroom",
            "rho": 4096,
            "weight_scale_algorithm": {"method": "mse", "fp8_scale_sweep": True},
        }
        made = recipe.from_file(write(tmp_path, modelopt(self.ROWS, asked)))
        assert made.algorithms == []
        weight, *inputs = (to_spec(entry.cfg, weight=i == 0) for i, entry in enumerate(made.entries))
        assert weight.scale is not None and weight.scale.rule == "sweep"
        assert inputs[0].observer == ObserverSpec("headroom", (("anchor", 1.0), ("upper", 99.99), ("rho", 4096.0)))
        assert [spec.observer.name for spec in inputs[1:]] == ["min_max", "min_max"]  # constant, and not nvfp4

    def test_a_chain_is_refused(self, tmp_path: Path) -> None:
        rows = [{"quantizer_path": "*input_quantizer", "cfg": [DYNAMIC, {"num_bits": "e4m3"}]}]
        with pytest.raises(ConfigError, match="nvfp4_act_headroom does not work with chains"):
            recipe.from_file(write(tmp_path, modelopt(rows, "nvfp4_act_headroom")))


class TestSettings:
    """`--set`."""

    DOCUMENT = parse("calibration: {samples: 3}\nquantize: {quant_cfg: [{a: 1}, {b: {-1: 16}}]}\n", "r.yaml")

    @pytest.mark.parametrize(
        ("setting", "path", "value"),
        [
            ("calibration.samples=64", ("calibration", "samples"), 64),
            ("calibration.seed=0", ("calibration", "seed"), 0),
            ("export.dialect=quark", ("export", "dialect"), "quark"),
            ("quantize.quant_cfg.0.a=[1, x]", ("quantize", "quant_cfg", 0, "a"), [1, "x"]),
            ("quantize.quant_cfg.1.b.-1=32", ("quantize", "quant_cfg", 1, "b", -1), 32),
        ],
    )
    def test_replaces_or_adds(self, setting: str, path: tuple[Any, ...], value: Any) -> None:
        found = adjusted(self.DOCUMENT, [setting])
        assert found.at(path) == value
        assert str(found.origin(*path)) == f"--set {setting}"
        assert self.DOCUMENT.data["calibration"] == {"samples": 3}
        assert found.at(("quantize", "quant_cfg", 1, "b"))

    @pytest.mark.parametrize("setting", ["calibration", "=3", "quantize.quant_cfg.7=1", "calibration.samples.x=1"])
    def test_refuses_what_does_not_fit(self, setting: str) -> None:
        with pytest.raises(UsageError):
            adjusted(self.DOCUMENT, [setting])

    def test_a_wrong_value_names_the_flag(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"schema": "quark/recipe/1", "quantize": {"scheme": "mxfp4"}})
        with pytest.raises(ConfigError) as caught:
            recipe.from_file(path, ["calibration.samples=many"])
        assert caught.value.where == "--set calibration.samples=many"

    def test_needs_a_recipe(self) -> None:
        with pytest.raises(UsageError, match="no recipe"):
            runs.prepare("demo", scheme="mxfp4", settings=["export.dialect=quark"])


def decisions(made: Any) -> dict[str, Any]:
    return {slot: decision.spec for slot, decision in made.plan.slots()}


@pytest.mark.parametrize("name", ["nvfp4-kv_fp8", "int4_wo_128-gptq", "fp8_default-kv_fp8", "nvfp4_mlp_only-kv_fp8"])
def test_a_converted_recipe_gives_the_same_plan(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    path.write_text(convert.as_native(recipe.from_file(catalog.find_recipe(name))))
    before, after = (runs.prepare("demo", recipe=str(some), calib_data="builtin") for some in (name, path))
    assert decisions(after) == decisions(before)
    assert after.plan.algorithms == before.plan.algorithms
    again = tmp_path / "again.yaml"
    again.write_text(convert.as_native(recipe.from_file(path)))
    kept = [line for line in again.read_text().splitlines() if "#" not in line]
    assert kept == [line for line in path.read_text().splitlines() if "#" not in line]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("general/ptq/nvfp4_default-kv_fp8", "nvfp4_default-kv_fp8"),
        ("general/ptq/fp8_default-kv_fp8.yaml", "fp8_default-kv_fp8"),
        ("nvfp4_default-fp8_kv", "nvfp4_default-kv_fp8"),
        ("general/ptq/nvfp4_mlp_only-fp8_kv.yml", "nvfp4_mlp_only-kv_fp8"),
        ("NVFP4_DEFAULT_CFG", "nvfp4"),
        ("FP8_DEFAULT_CFG", "fp8"),
    ],
)
def test_names_that_nvidia_gives(name: str, stem: str) -> None:
    assert catalog.find_recipe(name).stem == stem
    assert recipe.from_file(catalog.find_recipe(name)).entries


def test_the_json_schema_is_one_and_knows_every_section() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"schema", "imports", "metadata", "quantize", "exclusions", "calibration", "export"} <= set(
        schema["properties"]
    )
    assert schema["additionalProperties"] is False
