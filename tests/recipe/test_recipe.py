"""Native recipe files: what they may say, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.job import asked
from quarkcli.recipe import catalog
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.entries import Origin

HEAD = "schema: quark/recipe/1\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(HEAD + text)
    return path


def refusal(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        recipes.from_file(write(folder, text))
    return caught.value


def test_everything_a_recipe_may_say(tmp_path: Path) -> None:
    found = recipes.from_file(
        write(
            tmp_path,
            "metadata: {name: mine, description: for me}\n"
            "quantize:\n"
            "  quant_cfg:\n"
            "    - {quantizer_path: '*', enable: false}\n"
            "    - quantizer_path: '*.weight_quantizer'\n"
            "      parent_class: nn.Linear\n"
            "      cfg: {element: int4, granularity: {group: 64}}\n"
            "    - {quantizer_name: '*.absent', enable: false, required: false}\n"
            "  kv_cache: fp8\n"
            "  algorithm: [{method: gptq, damp: 1e-2}]\n"
            "exclusions: none\n"
            "calibration: {data: builtin, samples: 3, seqlen: 128}\n"
            "export: {dialect: quark}\n",
        )
    )
    assert (found.name, found.description, found.scheme, found.kv_cache) == ("mine", "for me", None, "fp8")
    assert (found.exclusions, found.dialect) == (False, "quark")
    assert (found.calib_data, found.calib_samples, found.calib_seqlen) == ("builtin", 3, 128)
    assert found.algorithms == [("gptq", {"damp": 0.01})]
    paths = [(entry.quantizer_path, entry.enable, entry.required, entry.parent_class) for entry in found.entries]
    assert paths == [
        ("*", False, True, None), ("*.weight_quantizer", True, True, "nn.Linear"), ("*.absent", False, False, None),
    ]  # fmt: skip
    assert str(found.entries[1].origin) == f"{tmp_path}/own.yaml:6:7"
    assert [entry.user for entry in found.entries] == [True, True, False]  # what need not match need not have an effect


def test_a_scheme_makes_entries_for_all_kinds(tmp_path: Path) -> None:
    found = recipes.from_file(write(tmp_path, "quantize: {scheme: int4_wo_128}\n"))
    assert found.name == "own"  # the file's
    kinds = {entry.quantizer_path: entry.enable for entry in found.entries[1:]}
    assert kinds == {
        "*.weight_quantizer": True, "*.input_quantizer": False, "*.output_quantizer": False, "*.bias_quantizer": False,
    }  # fmt: skip
    assert found.entries[0].quantizer_path == "*" and not found.entries[0].enable


@pytest.mark.parametrize("name", sorted(catalog.files("ptq")))
def test_built_in_recipes_are_good(name: str) -> None:
    found = recipes.from_file(catalog.find_recipe(name))
    assert found.name == name
    assert found.description
    assert found.entries


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("quantize: {scheme: fp8}\nexclusion: none\n", "3:1", "unknown key 'exclusion' (did you mean 'exclusions'?)"),
        ("quantize: {scheme: fp8, kvcache: fp8}\n", "2:25", "unknown key 'kvcache' (did you mean 'kv_cache'?)"),
        ("quantize: {}\n", "2:1", "scheme and quant_cfg exclude each other"),
        ("quantize: {scheme: fp8, quant_cfg: []}\n", "2:1", "scheme and quant_cfg exclude each other"),
        ("quantize: {quant_cfg: [{quantizer_path: '*'}]}\n", "2:24", "neither cfg nor enable"),
        ("quantize: {quant_cfg: [{quantizer_path: '*', cfg: {}}]}\n", "2:24", "cfg is empty"),
        ("quantize: {quant_cfg: [{enable: true}]}\n", "2:24", "quant_cfg.0.quantizer_path' is missing"),
        ("quantize: {quant_cfg: [{quantizer_path: '', enable: true}]}\n", "2:25", "quantizer_path is empty"),
        ("quantize: {quant_cfg: [{quantizer_path: a, quantizer_name: b, enable: true}]}\n", "2:24", "mean the same"),
        ("quantize: {quant_cfg: [{quantizer_path: a, enable: on}]}\n", "2:44", "must be true or false, not"),
        ("quantize: {quant_cfg: [{quantizer_path: a, enable: 1}]}\n", "2:44", "must be true or false, not"),
        ("quantize: {scheme: 4}\n", "2:12", "quantize.scheme must be a text, not 4"),
        ("quantize: {scheme: fp8}\ncalibration: {samples: '5'}\n", "3:15", "must be a whole number, not"),
        ("quantize: {scheme: fp8}\ncalibration: {samples: 0}\n", "3:15", "greater than 0"),
        ("quantize: {scheme: fp8}\ncalibration: {seed: -1}\n", "3:15", "calibration.seed: Input should be greater"),
        (f"quantize: {{scheme: fp8}}\ncalibration: {{seed: {2**63}}}\n", "3:15", "should be less than"),
        ("quantize: {scheme: fp8}\ncalibration: {samples: 1e3}\n", "3:15", "must be a whole number, not"),
        ("quantize: {scheme: fp8}\nexclusions: some\n", "3:1", "'default' or 'none'"),
        ("quantize: {scheme: fp9}\n", "2:12", "unknown scheme 'fp9'"),
        ("quantize: {quant_cfg: [{quantizer_path: a, cfg: {enable: 5}}]}\n", "2:50", "enable must be true or false"),
        (
            "quantize: {quant_cfg: [{quantizer_path: a, enable: true, cfg: {element: int4, enable: false}}]}\n",
            "2:58", "contradicts",
        ),
        ("quantize: {quant_cfg: [{quantizer_path: a, cfg: 3}]}\n", "2:44", "cfg must be a mapping or a list, not 3"),
        ("quantize: {quant_cfg: [{quantizer_path: a, cfg: {element: int5}}]}\n", "2:44", "element 'int5' is unknown"),
        ("quantize: {scheme: fp8, algorithm: [gptq]}\n", "2:37", "not 'gptq'; write {method: gptq}"),
        ("quantize: {scheme: fp8}\ncalibration: {column: ''}\n", "3:15", "calibration.column is empty"),
    ],
)  # fmt: skip
def test_mistakes_have_file_line_and_column(text: str, place: str, what: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, text)
    assert what in error.what
    assert error.where == f"{tmp_path}/own.yaml:{place}"


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_in_a_setting(seed: int, tmp_path: Path) -> None:
    path = write(tmp_path, "quantize: {scheme: fp8}\n")
    assert recipes.from_file(path, [f"calibration.seed={2**63 - 1}"]).seed == 2**63 - 1
    with pytest.raises(ConfigError, match=r"calibration.seed: Input should be (less|greater) than"):
        recipes.from_file(path, [f"calibration.seed={seed}"])


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    error = refusal(
        tmp_path,
        "metadata: {nam: x}\nquantize:\n  scheme: fp8\n  algoritm: gptq\ncalibration: {samples: -1}\n"
        "export: {dialect: 3}\n",
    )
    assert error.what.startswith("4 problems\n")
    for place, what in (("2:12", "'nam'"), ("5:3", "'algoritm'"), ("6:15", "samples"), ("7:10", "dialect")):
        assert any(f"own.yaml:{place}: " in line and what in line for line in error.what.splitlines()), place


@pytest.mark.parametrize(
    ("text", "place", "what", "hint"),
    [
        (
            "quantize: {scheme: fp8}\n",
            ":1:12",
            "unknown key 'scheme'",
            "begin a native recipe with 'schema: quark/recipe/1'",
        ),
        ("schema: quark/recipe/2\n", ":1:1", "'quark/recipe/2' is unknown", "schema: quark/recipe/1"),
        ("stuff: {element: int4}\n", ":1:1", "not a recipe", "begin it with 'schema: quark/recipe/1'"),
        ("weight: {element: int4}\n", ":1:1", "a scheme and not a recipe", "then use --scheme with its name"),
        ("", "", "must be a list of entries, not", "quantizer_path"),
        ("- a\n", ":1:3", "an entry must be a mapping", "quantizer_path"),
        ("text\n", ":1:1", "must be a list of entries, not", "quantizer_path"),
    ],
)
def test_files_that_are_no_recipes(text: str, place: str, what: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        recipes.from_file(path)
    assert caught.value.where == f"{path}{place}"
    assert hint in caught.value.hint


def test_enable_inside_cfg_moves_up(tmp_path: Path) -> None:
    rows = "{quantizer_path: a, cfg: {element: int4, enable: false}}, {quantizer_path: b, cfg: {enable: false}}"
    found = recipes.from_file(write(tmp_path, f"quantize: {{quant_cfg: [{rows}]}}\n")).entries
    assert (found[0].enable, found[0].cfg) == (False, {"element": "int4"})
    assert (found[1].enable, found[1].cfg) == (False, None)


class TestCatalog:
    """Names, places, and what may not be taken."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
        (tmp_path / "home" / "schemes").mkdir(parents=True)
        (tmp_path / "home" / "ptq").mkdir()
        return tmp_path / "home"

    def test_dash_is_underscore(self) -> None:
        assert catalog.find("schemes", "int4-wo-128") == catalog.find("schemes", "INT4_WO_128")
        assert recipes.from_scheme("int4-wo_128").name == "int4_wo_128"
        assert catalog.find_recipe("nvfp4_kv_fp8") == catalog.find_recipe("nvfp4-kv-fp8")

    def test_files_of_the_user(self, home: Path) -> None:
        (home / "schemes" / "int4-wo-16.yaml").write_text("weight: {element: int4, granularity: {group: 16}}\n")
        (home / "ptq" / "mine.yaml").write_text(HEAD + "quantize: {scheme: int4_wo_16}\n")
        assert "int4-wo-16" in catalog.files("schemes")
        found = recipes.from_file(catalog.find_recipe("mine"))
        assert found.scheme == "int4_wo_16"
        assert found.entries[1].cfg == {"element": "int4", "granularity": {"group": 16}}

    def test_a_changed_file_is_read_again(self, home: Path) -> None:
        path = home / "schemes" / "mine.yaml"
        for size in (32, 64):
            path.write_text(f"weight: {{element: int4, granularity: {{group: {size}}}}}\n")
            path.touch()
            assert recipes.from_scheme("mine").entries[1].cfg["granularity"] == {"group": size}

    @pytest.mark.parametrize("name", ["nvfp4", "int4-wo-128", "FP8"])
    def test_built_in_names_are_taken(self, name: str, home: Path) -> None:
        path = home / "schemes" / f"{name}.yaml"
        path.write_text("weight: {element: int4}\n")
        with pytest.raises(ConfigError, match="is a built-in scheme; rename the file") as caught:
            catalog.files("schemes")
        assert caught.value.where == str(path)

    def test_unknown_names(self) -> None:
        with pytest.raises(UsageError, match="unknown scheme 'nvpf4'") as caught:
            catalog.find("schemes", "nvpf4")
        assert "nvfp4" in caught.value.hint and "quark schemes list" in caught.value.hint
        with pytest.raises(ConfigError, match="unknown recipe 'nvpf4'"):
            catalog.find_recipe("nvpf4")
        with pytest.raises(ConfigError, match="no such recipe file"):
            catalog.find_recipe("absent.yaml")

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("weights: {element: int4}\n", "unknown key 'weights' (did you mean 'weight'?)"),
            ("summary: x\n", "'weight' is missing"),
            ("weight: int4\n", "must be a mapping"),
            ("weight: {element: int4, granularty: tensor}\n", "unknown key 'granularty' in cfg"),
        ],
    )
    def test_a_bad_scheme_names_its_file(self, text: str, what: str, home: Path) -> None:
        path = home / "schemes" / "bad.yaml"
        path.write_text(text)
        with pytest.raises(QuarkError) as caught:
            recipes.from_scheme("bad")
        assert caught.value.code == 3
        assert what in caught.value.what
        assert f"{path}" in caught.value.where


class TestSlotKinds:
    """What a scheme file may name beside weight and input, and the schemes of attention."""

    FP8 = "{element: fp8_e4m3}"

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QUARK_HOME", str(tmp_path))

    def write(self, tmp_path: Path, kind: str, text: str) -> None:
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / "own.yaml").write_text(text)

    def test_outputs_and_biases_of_a_scheme(self, tmp_path: Path) -> None:
        self.write(tmp_path, "schemes", f"aliases: [mine]\nweight: {self.FP8}\noutput: {self.FP8}\nbias: {self.FP8}\n")
        entries = recipes.scheme_entries("own", "*q_proj", Origin("here"), user=True)
        given = {entry.quantizer_path.removeprefix("*q_proj."): (entry.cfg, entry.enable) for entry in entries}
        on, off = ({"element": "fp8_e4m3"}, True), (None, False)
        assert given == {
            "weight_quantizer": on, "input_quantizer": off, "output_quantizer": on, "bias_quantizer": on,
        }  # fmt: skip
        assert recipes.scheme_model("own").aliases == ["mine"]

    def test_an_error_in_one_has_its_place(self, tmp_path: Path) -> None:
        self.write(tmp_path, "schemes", f"weight: {self.FP8}\noutput: {{element: fp9}}\n")
        with pytest.raises(ConfigError, match="fp9") as caught:
            recipes.scheme_entries("own", "*", Origin("here"), user=True)
        assert str(caught.value.where).endswith("own.yaml:2:1")

    def test_an_attention_scheme_names_some_of_four(self, tmp_path: Path) -> None:
        self.write(tmp_path, "attention", f"q: {self.FP8}\np: {self.FP8}\n")
        entries = recipes.attention_entries("own", Origin("here"))
        assert [entry.quantizer_path for entry in entries] == ["*.q_bmm_quantizer", "*.p_bmm_quantizer"]
        assert len({entry.unit for entry in entries}) == 1
        assert [e.quantizer_path[2] for e in recipes.attention_entries("fp8", Origin("here"))] == ["q", "k", "v", "p"]

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("summary: nothing\n", "needs a cfg for at least one of q, k, v and p"),
            ("s: {element: int8}\n", "unknown key 's'"),
        ],
    )
    def test_an_attention_scheme_says_something(self, text: str, what: str, tmp_path: Path) -> None:
        self.write(tmp_path, "attention", text)
        with pytest.raises(ConfigError, match=what):
            recipes.attention_entries("own", Origin("here"))

    def test_a_recipe_names_an_attention_scheme_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "near.yaml").write_text(f"q: {self.FP8}\n")
        (tmp_path / "r" / "recipe.yaml").write_text(
            "schema: quark/recipe/1\nquantize: {scheme: mxfp4, attention: near}\n"
        )
        found = recipes.from_file(tmp_path / "r" / "recipe.yaml")
        assert found.attention == "near"
        assert len(recipes.attention_entries("near", Origin("here"), tmp_path / "r")) == 1


EVERY_KIND = """\
schema: quark/recipe/1
metadata:
  description: x
  colour: red
quantize:
  quant_cfg:
    - {quantizer_path: '*', enable: false}
    - quantizer_path: 7
      cfg: {element: int8}
    - quantizer_path: '*.weight_quantizer'
      cfg: {element: fp5}
    - quantizer_path: '*.input_quantizer'
      cfg: {element: int8, granularity: {group: -3}}
    - {quantizer_path: 're:(', enable: true}
    - {quantizer_path: '*.w', enable: maybe}
  algorithm:
    - {method: nothing}
    - {method: gptq, damp: 7}
  kv_cache: fp99
calibration: {samples: many}
export: {dialect: nope}
"""


def test_all_mistakes_of_a_file_are_listed_at_once(tmp_path):
    """Unknown keys, wrong values, attributes, expressions, names, algorithms, dialects: each with its line."""
    path = tmp_path / "mine.yaml"
    path.write_text(EVERY_KIND)
    with pytest.raises(ConfigError) as caught:
        recipes.from_file(path, also=asked.mistakes)
    head, *lines = caught.value.what.splitlines()
    found = [(int(line.removeprefix(f"  {path}:").partition(":")[0]), line) for line in lines]
    wanted = {
        4: "unknown key 'colour'", 8: "must be a text, not 7", 11: "element 'fp5' is unknown",
        13: "granularity.group must be a positive", 14: "is not a regular expression", 15: "must be true or false",
        17: "unknown algorithm 'nothing'", 18: "gptq damp must be", 19: "unknown KV cache scheme 'fp99'",
        20: "must be a whole number, not 'many'", 21: "unknown checkpoint format 'nope'",
    }  # fmt: skip
    assert [number for number, _ in found] == list(wanted)
    assert all(wanted[number] in line for number, line in found)
    assert head == f"{len(wanted)} problems"
    assert (caught.value.where, caught.value.kind) == (str(path), "E-RECIPE-MISTAKES")


def test_mistakes_are_listed_where_the_form_is_right(tmp_path):
    text = EVERY_KIND.replace("  colour: red\n", "").replace("path: 7", "path: '*a'").replace("maybe", "true")
    for wrong, right in (("fp5", "int8"), ("-3", "32"), ("fp99", "fp8"), ("many", "3")):
        text = text.replace(wrong, right)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipes.from_file(path, also=asked.mistakes)
    assert [line.split(":")[1] for line in caught.value.what.splitlines()[1:]] == ["13", "16", "17", "20"]


def test_mistakes_of_a_foreign_file_are_listed_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "quantize:\n  quant_cfg:\n    - {quantizer_name: '*weight_quantizer', cfg: {num_bits: 77}}\n"
        "    - {quantizer_name: '*input_quantizer', cfg: {num_bits: 8, axs: 0}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        recipes.from_file(path)
    head, first, second = caught.value.what.splitlines()
    assert head == "2 problems"
    assert ":3:" in first and "77" in first and ":4:" in second and "axs" in second
