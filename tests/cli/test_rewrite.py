"""recipes normalize, convert, schema, show --resolved: old shapes in, today's form out."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

LEGACY = {
    "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 128}, "enable": True},
    "nn.Embedding": {"*": {"enable": False}},
    "default": {"enable": False},
}
CANONICAL = [
    {"quantizer_path": "*", "cfg": None, "enable": False},
    {"quantizer_path": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}, "enable": True},
    {"quantizer_path": "*", "cfg": None, "enable": False, "parent_class": "nn.Embedding"},
]


@pytest.fixture
def legacy(tmp_path):
    path = tmp_path / "legacy.yaml"
    path.write_text(yaml.safe_dump(LEGACY, sort_keys=False))
    return path


def test_normalize_prints_the_canonical_list(quark, legacy):
    code, out, err = quark("recipes", "normalize", str(legacy))
    assert code == 0
    assert yaml.safe_load(out) == CANONICAL
    assert f"{legacy}:1:1: legacy form; today it is written: - {{quantizer_path: '*weight_quantizer'" in err


def test_normalize_is_idempotent(quark, legacy, tmp_path):
    again = tmp_path / "again.yaml"
    again.write_text(quark("recipes", "normalize", str(legacy)).out)
    assert yaml.safe_load(quark("recipes", "normalize", str(again)).out) == CANONICAL
    assert quark("recipes", "normalize", str(again)).err == ""


def test_normalize_as_json(quark, legacy):
    answer = json.loads(quark("recipes", "normalize", str(legacy), "--json").out)
    assert answer["schema"] == "quark/entries/1"
    assert [row["enable"] for row in answer["entries"]] == [False, True, False]
    assert len(answer["notes"]) == 3


def test_normalize_takes_a_registered_name_and_a_constant_of_nvidias(quark):
    rows = yaml.safe_load(quark("recipes", "normalize", "mxfp4").out)
    assert rows[0] == {"quantizer_path": "*", "cfg": None, "enable": False}
    assert {row["quantizer_path"] for row in rows if row["enable"]} == {"*.weight_quantizer", "*.input_quantizer"}
    rows = yaml.safe_load(quark("recipes", "normalize", "NVFP4_DEFAULT_CFG").out)
    assert rows[1]["cfg"]["num_bits"] == "e2m1"


@pytest.mark.parametrize("text", ["3\n", "- {quantizer_path: a}\n", "'*w': true\n", "- {'*w': {num_bits: 17}}\n"])
def test_refusals_exit_3_and_name_the_place(quark, tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    code, out, err = quark("recipes", "normalize", str(path))
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {path}:1:")


def test_convert_writes_a_native_recipe_with_comments(quark, legacy, tmp_path):
    new = tmp_path / "new.yaml"
    assert quark("recipes", "convert", str(legacy), "-o", str(new)).out == f"{new}\n"
    text = new.read_text()
    assert f"# {legacy}:1:1: int4 group 128" in text
    data = yaml.safe_load(text)
    assert (data["schema"], data["exclusions"]) == ("quark/recipe/1", "none")
    assert [row["enable"] for row in data["quantize"]["quant_cfg"]] == [False, True, False]
    assert all(row["required"] is False for row in data["quantize"]["quant_cfg"])
    assert quark("recipes", "validate", str(new), "--model", "demo").code == 0


def test_convert_never_replaces_a_file(quark, legacy, tmp_path):
    new = tmp_path / "new.yaml"
    new.write_text("mine")
    assert quark("recipes", "convert", str(legacy), "-o", str(new)).code == 2
    assert new.read_text() == "mine"
    assert quark("recipes", "convert", str(legacy), "-o", str(tmp_path / "no" / "new.yaml")).code == 2


def test_show_resolved_has_every_entry(quark):
    text = quark("recipes", "show", "nvfp4_default-kv_fp8", "--resolved").out
    data = yaml.safe_load(text)
    assert "$import" not in text
    assert len(data["quantize"]["quant_cfg"]) == 28  # deny all, weights and inputs, cache, the 24 that stay off
    answer = json.loads(quark("recipes", "show", "nvfp4_default-kv_fp8", "--resolved", "--json").out)
    assert answer["recipe"] == data


def test_the_schema_accepts_our_recipes_and_refuses_a_slip(quark):
    schema = json.loads(quark("recipes", "schema").out)
    recipe = yaml.safe_load(quark("recipes", "show", "int4_wo_128-gptq").out)
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**recipe, "quantise": {}}, schema)


def test_the_schema_as_a_file(quark, tmp_path):
    file = tmp_path / "recipe.schema.json"
    assert quark("recipes", "schema", "-o", str(file)).out == f"{file}\n"
    assert json.loads(file.read_text()) == json.loads(quark("recipes", "schema").out)
    assert quark("recipes", "schema", "-o", str(file)).code == 2


def test_set_changes_the_recipe(quark):
    arguments = ("plan", "--model", "demo", "--recipe", "int4_wo_128-gptq", "--calib-data", "builtin", "--json")
    plain = json.loads(quark(*arguments).out)
    changed = json.loads(quark(*arguments, "--set", "calibration.samples=9", "--set", "quantize.scheme=int4_wo_32").out)
    assert changed["calibration"]["samples"] == 9
    assert changed["effective_bits"] > plain["effective_bits"]
    assert quark(*arguments, "--set", "calibration.samples=no").code == 3
    assert quark(*arguments, "--set", "calibration").code == 2
    assert quark("plan", "--model", "demo", "--scheme", "mxfp4", "--set", "a=1").code == 2
