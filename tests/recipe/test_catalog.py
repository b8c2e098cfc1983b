"""Names of schemes: files of the user's, aliases, and what a program registers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import quarkcli
from quarkcli.cli import main
from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.recipe import catalog
from quarkcli.recipe import recipe as recipes

SCHEME = "weight: {{element: int4, granularity: {{group: {}}}}}\n"
MINE = {"weight": {"element": "int4", "granularity": {"group": 16}}, "summary": "mine"}
RECIPE = "schema: quark/recipe/1\nquantize: {{scheme: {}}}\n"
ALIAS = "fp4_block16_scale_e4m3"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of schemes."""
    monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "schemes"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """`register_scheme`; what it made known is forgotten afterwards."""
    made: list[str] = []

    def call(name: str, scheme: dict[str, Any]) -> None:
        quarkcli.register_scheme(name, scheme)
        made.append(name)

    yield call
    for name in made:
        if catalog.same(name) in {catalog.same(known) for known in catalog.files("schemes")}:
            quarkcli.unregister_scheme(name)


def beside(folder: Path, scheme: str, files: dict[str, str]) -> recipes.Recipe:
    """A recipe that asks for `scheme`, with files beside it."""
    (folder / "recipe.yaml").write_text(RECIPE.format(scheme))
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return recipes.from_file(folder / "recipe.yaml")


def weight(found: recipes.Recipe) -> Any:
    (cfg,) = (entry.cfg for entry in found.entries if entry.quantizer_path == "*.weight_quantizer")
    return cfg


# ---- files


@pytest.mark.parametrize("asked", ["my_int4", "my-int4", "My-Int4"])
def test_a_scheme_beside_the_recipe(tmp_path: Path, asked: str) -> None:
    found = beside(tmp_path, asked, {"my-int4": SCHEME.format(16)})
    assert weight(found)["granularity"] == {"group": 16}
    with pytest.raises(UsageError, match="unknown scheme"):
        catalog.find("schemes", asked)  # for that recipe only


def test_beside_the_recipe_comes_before_the_users_folder(home: Path, tmp_path: Path) -> None:
    (home / "my_int4.yaml").write_text(SCHEME.format(64))
    assert weight(recipes.from_scheme("my-int4"))["granularity"] == {"group": 64}
    assert weight(beside(tmp_path, "my_int4", {"my-int4": SCHEME.format(16)}))["granularity"] == {"group": 16}


def test_flags_beside_a_recipe_know_its_schemes(tmp_path: Path) -> None:
    beside(tmp_path, "mine", {"mine": SCHEME.format(16), "other": SCHEME.format(64)})
    recipe, flags = tmp_path / "recipe.yaml", {"layers": ["*down_proj=other"], "include": ["lm_head"]}
    plan = quarkcli.make_plan("demo", recipe=recipe, **flags)
    groups = {name: target.weight.group_size for name, target in plan.targets.items() if target.weight is not None}
    assert {size for name, size in groups.items() if name.endswith("down_proj")} == {64}
    assert {size for name, size in groups.items() if not name.endswith("down_proj")} == {16}
    assert "lm_head" in groups
    assert quarkcli.make_plan("demo", recipe=recipe, layer_types=["Linear=other"]).targets["lm_head"].weight is None


@pytest.mark.parametrize("name", ["nvfp4", "NVFP4", "int4-wo-128", ALIAS, "fp4-block16-scale-e4m3"])
def test_built_in_names_and_aliases_are_taken(home: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is a built-in scheme; rename the file") as caught:
        beside(tmp_path, name, {name: SCHEME.format(16)})
    assert str(tmp_path) in str(caught.value.where)
    (home / f"{name}.yaml").write_text(SCHEME.format(16))
    with pytest.raises(ConfigError, match=f"'{name}' is a built-in scheme; rename the file") as caught:
        catalog.find("schemes", "fp8")
    assert caught.value.where == str(home / f"{name}.yaml")


def test_a_recipe_with_a_schemes_name_beside_is_no_scheme(tmp_path: Path) -> None:
    (tmp_path / "nvfp4.yaml").write_text(RECIPE.format("nvfp4"))
    assert recipes.from_file(tmp_path / "nvfp4.yaml").scheme == "nvfp4"


def test_two_files_with_one_name(home: Path) -> None:
    for name in ("a-b", "a_b"):
        (home / f"{name}.yaml").write_text(SCHEME.format(16))
    with pytest.raises(ConfigError, match=r"'a_b' is taken by .*a-b\.yaml; rename the file"):
        catalog.files("schemes")


def test_aliases_of_the_users(home: Path) -> None:
    (home / "mine.yaml").write_text("aliases: [other-name]\n" + SCHEME.format(16))
    assert recipes.from_scheme("other_name").name == "mine"
    (home / "later.yaml").write_text("aliases: [NVFP4]\n" + SCHEME.format(16))
    with pytest.raises(ConfigError, match="is a built-in scheme"):
        catalog.files("schemes")


def test_a_built_in_alias(tmp_path: Path) -> None:
    assert recipes.from_scheme("FP4-block16_scale_e4m3") == recipes.from_scheme("nvfp4")
    assert weight(beside(tmp_path, ALIAS, {})) == weight(recipes.from_scheme("nvfp4"))
    with pytest.raises(UsageError) as caught:
        catalog.find("schemes", "fp4_block16_scale")
    assert ALIAS in caught.value.hint


# ---- what a program registers


def test_a_registered_scheme_works_everywhere(register: Callable[..., None], capsys: Any, tmp_path: Path) -> None:
    register("my_int4", MINE)
    plan = quarkcli.make_plan("demo", "my-int4")
    assert plan.targets["model.layers.0.mlp.up_proj"].weight.group_size == 16
    plan = quarkcli.make_plan("demo", "mxfp4", layers=["*down_proj=MY_INT4"])
    assert plan.targets["model.layers.0.mlp.down_proj"].weight.group_size == 16
    assert weight(beside(tmp_path, "my-int4", {})) == MINE["weight"]
    assert main.main(["schemes", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["schemes"]}
    assert (rows["my_int4"]["bits"], rows["my_int4"]["summary"]) == (5.0, "mine")
    with pytest.raises(UsageError) as caught:
        quarkcli.make_plan("demo", "my_int5")
    assert "my_int4" in caught.value.hint


def test_unregister(register: Callable[..., None]) -> None:
    register("my_int4", MINE)
    quarkcli.unregister_scheme("My-int4")
    with pytest.raises(UsageError, match="unknown scheme"):
        quarkcli.make_plan("demo", "my_int4")
    with pytest.raises(UsageError, match="unknown scheme"):
        quarkcli.unregister_scheme("my_int4")
    register("my_int4", MINE)  # the name is free again


@pytest.mark.parametrize("name", ["nvfp4", "INT4-wo-128", ALIAS, "my-file", "first", "also-first"])
def test_a_name_that_exists_is_refused(register: Callable[..., None], home: Path, name: str) -> None:
    (home / "my_file.yaml").write_text(SCHEME.format(16))
    register("first", {**MINE, "aliases": ["also_first"]})
    before = catalog.files("schemes")
    with pytest.raises(UsageError, match="exists already"):
        quarkcli.register_scheme(name, MINE)
    with pytest.raises(UsageError, match="exists already"):
        quarkcli.register_scheme("free", {**MINE, "aliases": [name]})
    assert catalog.files("schemes") == before


@pytest.mark.parametrize("name", ["", "a b", "a/b", "*=fp8", "../x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a scheme"):
        quarkcli.register_scheme(name, MINE)


def test_only_registered_schemes_can_be_removed(home: Path) -> None:
    (home / "mine.yaml").write_text(SCHEME.format(16))
    for name, why in (("nvfp4", "built in"), (ALIAS, "built in"), ("mine", r"the file .*mine\.yaml")):
        with pytest.raises(UsageError, match=f"it is {why}"):
            quarkcli.unregister_scheme(name)
    assert {"nvfp4", "mine"} <= set(catalog.files("schemes"))


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        ({"weights": MINE["weight"]}, "unknown key 'weights' \\(did you mean 'weight'\\?\\)"),
        ({"summary": "x"}, "'weight' is missing"),
        ({"weight": {"element": "int5"}}, "element 'int5' is unknown"),
        ({"weight": MINE["weight"], "input": {"element": "fp4_e2m1", "granularty": "tensor"}}, "granularty"),
    ],
)
def test_a_wrong_scheme_is_refused_and_not_kept(scheme: dict[str, Any], what: str) -> None:
    with pytest.raises(QuarkError, match=what) as caught:
        quarkcli.register_scheme("mine", scheme)
    assert caught.value.code == 3
    assert "mine" in caught.value.where
    assert "mine" not in catalog.files("schemes")


def test_later_changes_of_the_mapping_do_not_matter(register: Callable[..., None]) -> None:
    scheme = {"weight": {"element": "int4", "granularity": {"group": 16}}}
    register("mine", scheme)
    scheme["weight"]["granularity"] = "tensor"
    assert weight(recipes.from_scheme("mine"))["granularity"] == {"group": 16}


def test_a_file_cannot_take_a_registered_name(register: Callable[..., None], home: Path) -> None:
    register("mine", MINE)
    (home / "Mine.yaml").write_text(SCHEME.format(64))
    try:
        with pytest.raises(ConfigError, match="'Mine' is a registered scheme; rename the file"):
            catalog.find("schemes", "mine")
    finally:
        (home / "Mine.yaml").unlink()


@pytest.mark.parametrize(
    "name",
    [
        "models/Step3.5-Flash/nvfp4-mlp-only.yaml",
        "models/stepfun-ai/Step-3.5-Flash/ptq/nvfp4-mlp-only",
        "huggingface/models/Step3.5-Flash/nvfp4-mlp-only.yml",
    ],
)
def test_a_recipe_of_one_model_is_found_under_its_peers_name(name: str) -> None:
    assert catalog.find_recipe(name).stem == "step3.5_flash-nvfp4_mlp_only"


def test_a_folder_of_a_model_without_a_recipe() -> None:
    with pytest.raises(ConfigError, match="no such recipe file"):
        catalog.find_recipe("models/Nobody/nvfp4-mlp-only.yaml")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("ptq", "int4_wo_128", "int4_wo_128 is a scheme: use --scheme int4_wo_128"),
        ("schemes", "int4_wo_128-gptq", "int4_wo_128-gptq is a recipe: use --recipe int4_wo_128-gptq"),
        ("schemes", "INT8_DEFAULT_CFG", "INT8_DEFAULT_CFG is a recipe: use --recipe INT8_DEFAULT_CFG"),
        ("schemes", "own.yaml", "use --recipe own.yaml"),
        ("ptq", "own", "give own.yaml, the file in this directory"),
        ("ptq", "NVFP4_DEFAULT_CFGG", "did you mean NVFP4_DEFAULT_CFG"),
        ("ptq", ".", "give a file in it: own.yaml"),
        ("ptq", "home", "there is no recipe in it"),
    ],
)
def test_what_a_name_is_instead(
    kind: catalog.Kind, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE.format("nvfp4"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuarkError) as caught:
        catalog.find(kind, name) if kind == "schemes" else catalog.find_recipe(name)
    assert said in str(caught.value.hint)


@pytest.mark.parametrize("given", ["mine", "mine.yaml", "sub/mine.yml"])
@pytest.mark.parametrize(("kind", "text"), [("schemes", SCHEME.format(16)), ("kv_cache", "{k: &c {}, v: *c}\n")])
def test_a_scheme_that_lies_elsewhere_is_told_its_place(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: catalog.Kind, text: str, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("mine.yaml", "sub/mine.yml"):
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        catalog.find(kind, given)
    place = home.parent / kind / "mine.yaml"
    file = "mine.yaml" if given == "mine" else given
    assert caught.value.hint == f"put {file} at {place}, then use the name mine"
    place.parent.mkdir(exist_ok=True)
    place.write_text(text)
    assert catalog.find(kind, "mine") == place


def test_a_file_that_is_no_scheme_is_not_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("recipe", RECIPE.format("fp8")), ("broken", "weight: [")):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(UsageError) as caught:
            catalog.find("schemes", name)
        assert caught.value.hint == "see 'quark schemes list'"


def test_a_directory_hides_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvfp4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert catalog.find_recipe("nvfp4").name == "nvfp4.yaml"
