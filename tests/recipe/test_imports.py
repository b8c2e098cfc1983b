"""Imports between recipe files: what is found where, how it is put together, and the place of every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quarkcli.errors import ConfigError
from quarkcli.recipe import catalog, imports, load, normalize
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.imports import expanded

UNITS = catalog.built_in_folder() / "units"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user folder."""
    monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(folder: Path, **files: str) -> Path:
    """Files by name (`__` is a folder); the folder."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def expand(path: Path) -> load.Document:
    return expanded(load.read_snippet(path))


def refused(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        expand(path)
    return caught.value


def test_a_mapping_is_overridden_deeply(tmp_path: Path) -> None:
    """`block_sizes: {type: static}` keeps the group size and the scale format of the snippet."""
    write(
        tmp_path,
        nvfp4="# comment\nnum_bits: e2m1\nblock_sizes:\n  -1: 16\n  type: dynamic\n  scale_bits: e4m3\n",
        r="imports: {base: nvfp4}\ncfg:\n  $import: base\n  block_sizes:\n    type: static\n",
    )
    document = expand(tmp_path / "r.yaml")
    blocks = {-1: 16, "type": "static", "scale_bits": "e4m3"}
    assert document.data == {"cfg": {"num_bits": "e2m1", "block_sizes": blocks}}
    places = {
        ("cfg",): "r.yaml:2:1",
        ("cfg", "num_bits"): "nvfp4.yaml:2:1",
        ("cfg", "block_sizes"): "r.yaml:4:3",
        ("cfg", "block_sizes", -1): "nvfp4.yaml:4:3",
        ("cfg", "block_sizes", "type"): "r.yaml:5:5",
        ("cfg", "block_sizes", "scale_bits"): "nvfp4.yaml:6:3",
    }
    assert {path: str(document.origin(*path)) for path in places} == {
        path: f"{tmp_path}/{place}" for path, place in places.items()
    }


def test_names_merge_from_left_to_right(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="x: 1\ny: {p: 1, q: 1}\n",
        b="x: 2\ny: {q: 2}\nz: [1]\n",
        r="imports: {a: a, b: b.yaml}\none: {$import: [a, b]}\nother: {$import: [b, a], z: []}\n",
    )
    assert expand(tmp_path / "r.yaml").data == {
        "one": {"x": 2, "y": {"p": 1, "q": 2}, "z": [1]},
        "other": {"x": 1, "y": {"p": 1, "q": 1}, "z": []},
    }


def test_lists_are_spliced_and_mappings_appended(tmp_path: Path) -> None:
    write(
        tmp_path,
        one="name: one\n",
        many="imports: {one: one}\n---\n- {name: first}\n- $import: one\n- {$import: one, more: 3}\n",
        none="[]\n",
        r="imports: {one: one, many: many, none: none}\n"
        "list:\n- {name: own}\n- $import: many\n- $import: none\n- $import: [one, many]\n- {name: last}\n",
    )
    document = expand(tmp_path / "r.yaml")
    many = [{"name": "first"}, {"name": "one"}, {"name": "one", "more": 3}]
    one = [{"name": "one"}]
    assert document.data == {"list": [{"name": "own"}, *many, *one, *many, {"name": "last"}]}
    lines = [str(document.origin("list", index, "name")).removeprefix(f"{tmp_path}/") for index in range(9)]
    assert lines == [
        "r.yaml:3:4",
        "many.yaml:3:4", "one.yaml:1:1", "one.yaml:1:1",
        "one.yaml:1:1",
        "many.yaml:3:4", "one.yaml:1:1", "one.yaml:1:1",
        "r.yaml:7:4",
    ]  # fmt: skip
    assert str(document.origin("list", 3, "more")) == f"{tmp_path}/many.yaml:5:18"
    assert str(document.origin("list", 3)) == f"{tmp_path}/many.yaml:5:3"


def test_a_value_may_be_a_list(tmp_path: Path) -> None:
    write(tmp_path, many="- 1\n- 2\n", r="imports: {many: many}\nlist: {$import: many}\n")
    document = expand(tmp_path / "r.yaml")
    assert document.data == {"list": [1, 2]}
    assert str(document.origin("list", 1)) == f"{tmp_path}/many.yaml:2:3"


def test_an_import_that_nothing_uses_is_named(tmp_path: Path) -> None:
    """In the file itself, and in one that it imports: each use counts for its own file. A published recipe has one."""
    write(
        tmp_path,
        a="v: a\n",
        b="v: b\n",
        inner="imports: {x: a, y: b}\n---\n- {$import: x}\n",
        r="imports:\n  x: a\n  y: b\nout: {$import: x}\n",
        deep="imports: {inner: inner, y: b}\nout: {$import: inner}\nother: {$import: y}\n",
        none="imports: {x: a}\nout: {v: 1}\n",
        gone="imports: {x: a, y: nowhere}\nout: {$import: x}\n",
    )
    wanted = {"r": ("r.yaml:3:3", "y"), "deep": ("inner.yaml:1:17", "y"), "none": ("none.yaml:1:11", "x"),
              "gone": ("gone.yaml:1:17", "y")}  # fmt: skip
    for file, (place, name) in wanted.items():
        (note,) = expanded(load.read(tmp_path / f"{file}.yaml")).notes
        assert note == f"{tmp_path}/{place}: '{name}' is imported, and nothing in this file uses it"


def test_built_in_files_use_what_they_import() -> None:
    files = sorted(catalog.built_in_folder().rglob("*.yaml"))
    read = [load.read_snippet(path) for path in files]
    importing = [document for document in read if document.imports is not None]
    assert len(importing) > 40
    assert all(expanded(document).data and not expanded(document).notes for document in importing)


def test_every_file_has_its_own_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="v: a\n",
        b="v: b\n",
        inner="imports: {x: b}\nin: {$import: x}\n",
        r="imports: {x: a, inner: inner}\nout: {$import: x}\ndeep: {$import: inner}\n",
    )
    assert expand(tmp_path / "r.yaml").data == {"out": {"v": "a"}, "deep": {"in": {"v": "b"}}}


def test_bare_lists_import_through_a_first_document(tmp_path: Path) -> None:
    write(tmp_path, a="v: 1\n", r="imports:\n  a: a\n---\n- $import: a\n")
    assert expand(tmp_path / "r.yaml").data == [{"v": 1}]


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("a: 1\n---\nb: 2\n", "the first of two YAML documents must hold 'imports'", ":1:1"),
        ("imports: {}\nmore: 1\n---\nb: 2\n", "must hold 'imports' and nothing else", ":1:1"),
        ("imports: {}\n---\nimports: {}\n", "must hold 'imports' and nothing else", ":1:1"),
        (
            "imports: {}\n---\n- 1\n---\n- 2\n",
            "has more than two YAML documents: one with imports and one that uses them",
            ":5:1",
        ),
        ("imports: [a]\ncfg: {$import: a}\n", "imports must map names to files", ":1:1"),
        ("imports: {fp8: x}\ncfg: {$import: fp9}\n", "'fp9' is not among the imports of this file", ":2:7"),
        ("cfg: {$import: fp8}\n", "'fp8' is not among the imports of this file", ":1:7"),
        ("imports: {x: 5}\ncfg: {$import: x}\n", "an import must name a file, not 5", ":1:11"),
        ("imports: {x: ../x}\ncfg: {$import: x}\n", "an import must name a file", ":1:11"),
        ("imports: {x: /etc/hosts}\ncfg: {$import: x}\n", "an import must name a file", ":1:11"),
        ("imports: {x: configs/numerics/nvfp5}\ncfg: {$import: x}\n", "no file 'configs/numerics/nvfp5'", ":1:11"),
        (
            "imports: {x: configs/numerics/fp8}\ncfg: {$import: [x, 5]}\n",
            "must be a name or a list of names, not",
            ":2:7",
        ),
        ("imports: {x: configs/numerics/fp8}\ncfg: {$import: []}\n", "must be a name or a list of names, not", ":2:7"),
        (
            "imports: {x: many}\ncfg: {$import: x, y: 1}\n",
            "an import can only be overridden if it is a mapping",
            ":2:1",
        ),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str, place: str) -> None:
    write(tmp_path, many="- 1\n", r=text)
    error = refused(tmp_path / "r.yaml")
    assert message in error.what
    assert error.where == f"{tmp_path}/r.yaml{place}"


def test_near_misses(tmp_path: Path) -> None:
    write(
        tmp_path,
        r="imports: {fp8: x}\ncfg: {$import: fp9}\n",
        s="imports: {x: configs/numerics/nvfp5}\nc: {$import: x}\n",
    )
    assert refused(tmp_path / "r.yaml").hint == "did you mean 'fp8'?"
    assert refused(tmp_path / "s.yaml").hint == "did you mean 'configs/numerics/nvfp4'?"


def test_circles_are_named(tmp_path: Path) -> None:
    write(tmp_path, a="imports: {b: b}\nv: {$import: b}\n", b="imports: {a: a}\nv: {$import: a}\n")
    error = refused(tmp_path / "a.yaml")
    assert (error.what, error.where) == ("imports go in a circle: a.yaml -> b.yaml -> a.yaml", f"{tmp_path}/b.yaml:2:1")
    write(tmp_path, me="imports: {me: me}\nv: {$import: me}\n")
    assert refused(tmp_path / "me.yaml").what == "imports go in a circle: me.yaml -> me.yaml"


def test_an_import_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_MAX_VALUES", 2_000)
    files = {"f0": "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"}
    for i in range(1, 8):
        files[f"f{i}"] = f"imports: {{x: f{i - 1}}}\n---\n" + "- {$import: x}\n" * 10
    write(tmp_path, **files)
    assert "expand to more than 2000 values" in refused(tmp_path / "f7.yaml").what


# --- where files are looked for --------------------------------------------------------------------------------------


def test_beside_then_user_then_built_in(tmp_path: Path, home: Path) -> None:
    text = "imports: {x: mine}\nv: {$import: x}\n"
    write(tmp_path, r=text)
    write(home, units__mine="from: user\n")
    assert expand(tmp_path / "r.yaml").data == {"v": {"from": "user"}}
    write(tmp_path, mine="from: beside\n")
    assert expand(tmp_path / "r.yaml").data == {"v": {"from": "beside"}}


def test_a_unit_of_the_users_cannot_take_a_built_in_path(tmp_path: Path, home: Path) -> None:
    write(tmp_path, r="imports: {x: configs/numerics/fp8}\nv: {$import: x}\n")
    write(home, units__configs__numerics__fp8="num_bits: 4\n")
    assert "is the name of a built-in unit" in refused(tmp_path / "r.yaml").what
    # What is built in never looks there.
    built_in = expand(UNITS / "configs/ptq/presets/model/fp8.yaml")
    assert built_in.data["quant_cfg"][1]["cfg"] == {"num_bits": "e4m3"}


def test_a_stray_file_in_the_working_directory_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It silently turns the peer's built-in recipes into others."""
    stray = write(tmp_path / "stray", configs__numerics__fp8="num_bits: 4\n")
    recipes = write(tmp_path / "recipes", r="imports: {x: configs/numerics/fp8}\nv: {$import: x}\n")
    monkeypatch.chdir(stray)
    assert expand(recipes / "r.yaml").data == {"v": {"num_bits": "e4m3"}}
    built_in = expand(UNITS / "configs/ptq/presets/model/fp8.yaml")
    assert built_in.data["quant_cfg"][1]["cfg"] == {"num_bits": "e4m3"}


def test_the_root_of_the_tree_a_file_lies_in(tmp_path: Path) -> None:
    write(
        tmp_path,
        models__org__ptq__r="imports: {x: models/org/ptq/parts/x}\nv: {$import: x}\n",
        models__org__ptq__parts__x="from: tree\n",
    )
    assert expand(tmp_path / "models/org/ptq/r.yaml").data == {"v": {"from": "tree"}}


# --- the built-in units ----------------------------------------------------------------------------------------------

REFUSED = {
    "configs/ptq/presets/kv/fp8_affine": "'bias' is not supported",
    "configs/ptq/presets/kv/nvfp4_affine": "'bias' is not supported",
    "configs/ptq/presets/kv/nvfp4_rotate": "'rotate' is not supported",
}
PRESETS = sorted(str(path.relative_to(UNITS).with_suffix("")) for path in UNITS.glob("configs/ptq/presets/*/*.yaml"))


def entries(data: Any) -> list[normalize.Canonical]:
    return normalize.normalize(data["quant_cfg"]).entries


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset: str) -> None:
    found = entries(expand(UNITS / f"{preset}.yaml").data)
    errors = set()
    for entry in found:
        if entry.cfg is not None and entry.enable:
            try:
                to_spec(entry.cfg, weight="weight" in entry.quantizer_path)
            except ConfigError as error:
                errors.add(error.what)
    assert bool(errors) == (preset in REFUSED) and all(REFUSED[preset] in error for error in errors)
    if "/model/" in preset:
        assert found[0].as_dict() == {"quantizer_path": "*", "cfg": None, "enable": False}


# Entries between the first and the default-disabled list, as the peer's recipes of these names count theirs.
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("fp8", 27), ("w4a16_nvfp4", 26), ("nvfp4", 27), ("nvfp4_experts_only", 29), ("nvfp4_mlp_only", 35),
        ("nvfp4_omlp_only", 35), ("mamba_moe_fp8_aggressive", 35), ("mamba_moe_nvfp4_conservative", 37),
        ("nvfp4_fp8_mha", 8),
    ],
)  # fmt: skip
def test_presets_have_as_many_entries_as_the_peers(preset: str, count: int) -> None:
    assert len(entries(expand(UNITS / f"configs/ptq/presets/model/{preset}.yaml").data)) == count


def test_what_is_off_by_default() -> None:
    found = expand(UNITS / "configs/ptq/units/default_disabled_quantizers.yaml").data
    assert len(found) == 24 and not any(entry["enable"] for entry in found)
    assert [entry.get("parent_class") for entry in found[-5:]] == [
        "nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d", "nn.LeakyReLU", "nn.Embedding",
    ]  # fmt: skip


def test_a_recipe_as_nvidia_writes_them(tmp_path: Path) -> None:
    """Under the peer's field name, with its schema comments, imports from the shipped units."""
    write(
        tmp_path,
        r="# modelopt-schema: modelopt.recipe\n"
        "imports:\n"
        "  base_disable_all: configs/ptq/units/base_disable_all\n"
        "  w8a8: configs/ptq/units/w8a8_fp8_fp8\n"
        "  kv_fp8: configs/ptq/units/kv_fp8\n"
        "  default_disabled: configs/ptq/units/default_disabled_quantizers\n"
        "metadata:\n  recipe_type: ptq\n  description: x\n"
        "quantize:\n  algorithm: max\n  quant_cfg:\n"
        "    - $import: base_disable_all\n    - $import: w8a8\n    - $import: kv_fp8\n    - $import: default_disabled\n"
        "    - quantizer_name: '*o_proj*'\n      enable: false\n",
    )
    document = expand(tmp_path / "r.yaml")
    assert set(document.data) == {"metadata", "quantize"}
    found = normalize.normalize(document.data["quantize"]["quant_cfg"], base=("quantize", "quant_cfg"))
    assert len(found.entries) == 29 and not found.notes
    assert found.entries[3].quantizer_path == "*[kv]_bmm_quantizer"
    assert str(document.origin(*found.entries[-1].place)) == f"{tmp_path}/r.yaml:17:7"
    assert str(document.origin(*found.entries[3].place)) == f"{UNITS}/configs/ptq/units/kv_fp8.yaml:5:3"


@pytest.mark.parametrize(
    "wanted",
    [".", "./", "a" * 300, "a" * 5000, "x\\0y", "link", "folder/secret", "dev", "loop", "", "/etc/passwd", "../r"],
)
def test_what_is_no_file_of_the_recipe_is_not_read(tmp_path: Path, wanted: str) -> None:
    """A recipe that came from elsewhere may hold links; nothing of the user's is read, or shown, through them."""
    secret = write(tmp_path / "mine", secret="SECRET: 1\n") / "secret.yaml"
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, target in {"link": secret, "folder": secret.parent, "dev": "/dev/zero", "loop": "loop"}.items():
        (tree / name).symlink_to(target)
    (tree / "r.yaml").write_text(f'imports: {{a: "{wanted}"}}\ncfg: {{$import: a}}\n')
    error = refused(tree / "r.yaml")
    assert "SECRET" not in f"{error} {error.hint}"
    assert len(str(error)) < 300


def test_links_inside_the_tree_and_links_of_the_users_are_followed(tmp_path: Path, home: Path) -> None:
    write(tmp_path / "elsewhere", b="x: 2\n")
    write(tmp_path / "tree", a="x: 1\n", r="imports: {a: linked, b: b}\none: {$import: a}\ntwo: {$import: b}\n")
    (tmp_path / "tree" / "linked.yaml").symlink_to("a.yaml")
    (home / "units").mkdir(parents=True)
    (home / "units" / "b.yaml").symlink_to(tmp_path / "elsewhere" / "b.yaml")
    assert expand(tmp_path / "tree" / "r.yaml").data == {"one": {"x": 1}, "two": {"x": 2}}


def test_a_scheme_beside_a_recipe_is_not_a_link_to_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "mine", secret="weight: {dtype: int8}\n")
    write(tmp_path / "tree", own="weight: {dtype: int8}\n")
    (tmp_path / "tree" / "linked.yaml").symlink_to(tmp_path / "mine" / "secret.yaml")
    found = catalog.files("schemes", tmp_path / "tree")
    assert "own" in found
    assert "linked" not in found
