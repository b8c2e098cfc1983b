"""recipes, schemes, models: list, show, validate, copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize(
    ("group", "folders"),
    [("recipes", ["ptq"]), ("schemes", ["schemes", "kv_cache", "attention"]), ("models", ["models"])],
)
def test_lists_name_every_file(quark, group, folders):
    stems = sorted(path.stem for folder in folders for path in (RECIPES / folder).glob("*.yaml"))
    code, out, err = quark(group, "list")
    assert (code, err) == (0, "")
    assert sorted(line.split()[0] for line in out.splitlines()[1:]) == stems
    code, out, err = quark(group, "list", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["schema"] == f"quark/{group}/1"
    assert sorted(row["name"] for row in answer[group]) == stems


def test_recipes_say_bits_data_and_purpose(quark):
    rows = {row["name"]: row for row in json.loads(quark("recipes", "list", "--json").out)["recipes"]}
    assert rows["mxfp4"]["bits"] == [4.25]  # 4 bits and a byte per 32
    assert rows["mxfp4"]["needs_data"] is False
    assert rows["nvfp4-kv_fp8"]["bits"] == [4.5]  # 4 bits and a byte per 16
    assert rows["nvfp4-kv_fp8"]["needs_data"] is True
    assert (rows["nvfp4-kv_fp8"]["kv_cache"], rows["nvfp4-kv_fp8"]["attention"]) == ("fp8", None)
    assert rows["int4_wo_128-gptq"]["needs_data"] is True  # asked of the algorithm: weights alone need none
    assert all(row["purpose"] for row in rows.values())


def test_a_broken_file_of_the_users_does_not_break_the_list(quark, tmp_path):
    folder = tmp_path / "home" / "ptq"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("schema: quark/recipe/1\nquantise: {}\n")
    code, out, err = quark("recipes", "list")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("mine")]
    assert "has an error" in line
    assert quark("recipes", "validate", "mine").code == 3


def test_recipes_show_prints_the_file(quark):
    text = (RECIPES / "ptq" / "nvfp4.yaml").read_text()
    assert quark("recipes", "show", "nvfp4") == (0, text, "")
    answer = json.loads(quark("recipes", "show", "nvfp4", "--json").out)
    assert answer["schema"] == "quark/recipe-file/1"
    assert answer["recipe"] == yaml.safe_load(text)


def test_unknown_names_get_the_right_code_and_near_names(quark):
    recipe, scheme, model = (
        quark("recipes", "show", "nvfp"),
        quark("schemes", "show", "nvfp"),
        quark("models", "show", "lama"),
    )
    assert (recipe.code, scheme.code, model.code) == (3, 2, 3)
    assert "did you mean nvfp4" in recipe.err
    assert "did you mean nvfp4" in scheme.err
    assert "did you mean llama" in model.err
    assert recipe.out == scheme.out == model.out == ""


def test_validate(quark):
    code, out, err = quark("recipes", "validate", "nvfp4", "--model", "demo")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "ok: it quantizes 28 of 30 modules of demo"
    answer = json.loads(quark("recipes", "validate", "mxfp4", "--model", "demo", "--json").out)
    assert answer["schema"] == "quark/validation/1"
    assert answer["ok"] is True
    assert answer["plan"] | {"dialect": ""} == {
        "modules": 30, "quantized": 28, "needs_data": False, "warnings": [], "dialect": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: quark/recipe/1\nquantize: {scheme: nvfp5}\n", "unknown scheme 'nvfp5'"),
        (
            "schema: quark/recipe/1\nquantize: {scheme: nvfp4, algorithm: [{method: gptq, dump: 1}]}\n",
            "parameter 'dump'",
        ),
        ("schema: quark/recipe/1\nquantize: {scheme: nvfp4, kv_cache: fp9}\n", "fp9"),
        (
            "schema: quark/recipe/1\nquantize: {scheme: nvfp4}\nexport: {dialect: gguf}\n",
            "unknown checkpoint format 'gguf'",
        ),
        ("quantize: {scheme: nvfp4}\n", "begin a native recipe with 'schema: quark/recipe/1'"),
        ("a: 1\na: 2\n", "duplicate key 'a'"),
    ],
)
def test_validate_refuses(quark, tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    code, out, err = quark("recipes", "validate", "r.yaml")
    assert code in {2, 3}
    assert out == ""
    assert message in err


def test_validate_against_a_model_that_it_does_not_fit(quark):
    code, out, err = quark("recipes", "validate", "nvfp4_experts_only-kv_fp8", "--model", "demo")
    assert (code, out) == (3, "")
    assert "matches none of" in err


def test_copy(quark, tmp_path):
    assert quark("recipes", "copy", "nvfp4", "mine.yaml") == (0, "mine.yaml\n", "")
    assert (tmp_path / "mine.yaml").read_bytes() == (RECIPES / "ptq" / "nvfp4.yaml").read_bytes()
    code, out, err = quark("recipes", "copy", "nvfp4", "mine.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: mine.yaml: exists")
    assert quark("recipes", "copy", "mxfp4", ".").out == "mxfp4.yaml\n"
    assert quark("recipes", "copy", "mxfp4", "no/where.yaml").code == 2


def test_schemes_show(quark):
    code, out, err = quark("schemes", "show", "mxfp4")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(" "))
    assert lines["weight"] == "fp4_e2m1 group 32, e8m0, even"
    assert lines["input"] == "fp4_e2m1 group 32, e8m0 dynamic, even"
    assert lines["bits"].startswith("4.25 per weight")  # 4 bits and a byte per 32
    assert lines["data"] == "not needed"
    assert lines["dialects"] == "compressed-tensors: loads in vLLM, transformers"
    assert "MI350" in lines["hardware"]
    three = json.loads(quark("schemes", "show", "fp8", "--json").out)
    assert three["schema"] == "quark/scheme/1"
    assert [row["kind"] for row in three["schemes"]] == ["weights", "kv-cache", "attention"]
    assert all(row["needs_data"] for row in three["schemes"])
    assert set(three["schemes"][2]["slots"]) == {"q", "k", "v", "p"}


def test_schemes_show_says_when_no_server_loads_it(quark):
    out = quark("schemes", "show", "int4_wo_128").out
    assert "input       kept as it is" in out
    assert "simulation" not in out
    assert "no server; for measurements only" in quark("schemes", "show", "mx6").out


def test_schemes_list_says_what_matters(quark):
    """Bits by hand: those of a code, and those of the scales by the size of their groups."""
    rows = json.loads(quark("schemes", "list", "--json").out)["schemes"]
    found = {row["name"]: row for row in rows if row["kind"] == "weights"}
    assert all(row["summary"] and row["hardware"] for row in found.values())
    bits = {"int4_wo_32": 4 + 16 / 32, "uint4_wo_128": 4 + (16 + 4) / 128, "int3_wo_128": 3 + 16 / 128}
    bits |= {"nvfp4": 4 + 8 / 16, "mxfp6_e3m2": 6 + 8 / 32, "amdfp4_g32": 4 + 8 / 32, "fp8": 8, "bfp16": 8 + 8 / 8}
    bits |= {"mx6": 5 + 8 / 16 + 1 / 2, "mx9": 8 + 8 / 16 + 1 / 2, "int4_fp8": 4 + 32 / 4096}
    assert {name: found[name]["bits"] for name in bits} == pytest.approx(bits, abs=1e-3)
    data = {"fp8", "int8", "nvfp4", "nvfp4_fp8", "mxfp4_fp8", "amdfp4_global16", "amdfp4_global32"}
    assert {name for name, row in found.items() if row["needs_data"]} == data
    assert found["fp8_block128"]["slots"]["weight"]["granularity"] == {"tile": [128, 128]}
    assert found["int4_fp8"]["slots"]["weight"]["stored"] == "last"
    assert found["nvfp4"]["dialects"]["compressed-tensors"] == ["transformers", "vllm"]
    simulations = {"mx6", "mx9", "bfp16", "amdfp4", "amdfp4_g32", "amdfp4_global16", "amdfp4_global32"}
    for name in simulations:
        assert found[name]["dialects"], name  # some dialect holds it
        assert not any("vllm" in by for by in found[name]["dialects"].values()), name
    assert all(row["dialects"] for row in found.values())


def test_an_alias_is_the_scheme(quark):
    assert quark("schemes", "show", "fp4-block16_scale_e4m3") == quark("schemes", "show", "fp4_block16_scale_e4m3")
    (row,) = json.loads(quark("schemes", "show", "fp4_block16_scale_e4m3", "--json").out)["schemes"]
    assert (row["name"], row["aliases"]) == ("nvfp4", ["fp4_block16_scale_e4m3"])
    code, out, err = quark("schemes", "show", "fp4_block16_scale")
    assert (code, out) == (2, "")
    assert "did you mean fp4_block16_scale_e4m3" in err


def test_a_scheme_of_the_users_is_listed(quark, tmp_path):
    folder = tmp_path / "home" / "schemes"
    folder.mkdir(parents=True)
    (folder / "my-int4.yaml").write_text("weight: {element: int4, granularity: {group: 16}}\nsummary: mine\n")
    (folder / "wrong.yaml").write_text("weight: {element: int5}\n")
    rows = {row["name"]: row for row in json.loads(quark("schemes", "list", "--json").out)["schemes"]}
    assert (rows["my-int4"]["bits"], rows["my-int4"]["error"]) == (5.0, None)
    assert "int5" in rows["wrong"]["error"]
    assert "has an error" in quark("schemes", "list").out
    assert quark("schemes", "show", "my_int4").code == 0
    (folder / "nvfp4.yaml").write_text("weight: {element: int4}\n")
    code, out, err = quark("schemes", "list")
    assert (code, out) == (3, "")
    assert "is a built-in scheme; rename the file" in err


def test_models_show_prints_the_file(quark):
    assert quark("models", "show", "qwen3-moe") == (0, (RECIPES / "models" / "qwen3_moe.yaml").read_text(), "")
    assert json.loads(quark("models", "show", "llama", "--json").out)["family"]["blocks"] == "{text}.layers"


def test_models_show_resolved(quark):
    code, out, err = quark("models", "show", "kimi_k25", "--resolved")
    assert (code, err) == (0, "")
    found = yaml.safe_load(out)
    assert found["attention"]["latent"] is True and found["experts"]["path"] == "mlp.experts"
    assert found["exclude"].keys() == {"attention", "shared_expert", "dense_mlp"}
    assert "extends" not in found
    assert json.loads(quark("models", "show", "kimi_k25", "--resolved", "--json").out)["family"] == found


def test_models_infer(quark, tmp_path):
    code, out, err = quark("models", "infer", "demo")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["attention"] == {"module": "self_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj"}
    code, printed, err = quark("models", "infer", "demo", "-o", "mine.yaml")
    assert (code, printed) == (0, "")
    assert (tmp_path / "mine.yaml").read_text() == out
    assert str(tmp_path / "home" / "models") in err
    (tmp_path / "mine.yaml").write_text("kept")
    code, _, err = quark("models", "infer", "demo", "-o", "mine.yaml")
    assert code == 2 and err.startswith("error: mine.yaml: exists")
    assert (tmp_path / "mine.yaml").read_text() == "kept"
