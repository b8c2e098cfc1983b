"""The normal run covers every member of every open family: what is slow is a product, never a member alone."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from quarkcli import algorithms, dialects
from quarkcli.recipe import catalog
from quarkcli.spec import ELEMENTS, OBSERVERS
from tests import runs, test_schemes
from tests.conftest import COLLECTED
from tests.dialects import test_every_scheme
from tests.families import models, test_all_families
from tests.recipe import test_builtin_recipes, test_load

# Arguments whose values are members of no family: (test, argument).
PLACES = {
    ("test_a_killed_run_is_gone_on_with_and_ends_with_the_same_bytes", "kill"),
    ("test_other_settings_are_refused_by_name", "flags"),
    ("test_other_settings_are_refused_by_name", "key"),
    ("test_a_plan_or_a_user_error", "share"),
    ("test_every_sync_and_rename_may_be_the_last", "stride"),
}


def test_slow_parameters_occur_in_the_normal_run(pytestconfig: pytest.Config) -> None:
    """Of a test that is slow for some parameters, every value of every argument is there without the mark, too."""
    normal, slow = values(pytestconfig, slow=False), values(pytestconfig, slow=True)
    lost = {
        (test, argument): sorted(map(str, found - normal[test, argument]))
        for (test, argument), found in slow.items()
        if (test, argument) in normal and (test.rpartition("::")[2], argument) not in PLACES
    }
    assert {key: some for key, some in lost.items() if some} == {}


def values(config: pytest.Config, slow: bool) -> dict[tuple[str, str], set[Any]]:
    """(test, argument) -> what it is called with, over the tests of this session that are slow or are not."""
    found = defaultdict(set)
    for item in config.stash[COLLECTED]:
        call = getattr(item, "callspec", None)
        if call is None or (item.get_closest_marker("slow") is not None) != slow:
            continue
        for argument, value in call.params.items():
            found[item.nodeid.partition("[")[0], argument].add(repr(value))
    return found


MEMBERS: list[tuple[Any, str, set[str]]] = [
    (test_schemes.test_a_scheme_from_weights_to_loss, "scheme", set(catalog.files("schemes"))),
    (test_builtin_recipes.test_it_loads_resolves_and_needs_the_data_it_says, "name", set(catalog.files("ptq"))),
    (test_all_families.test_calibrated, "name", set(models.RECIPES)),
    (test_all_families.test_without_data, "name", set(models.RECIPES)),
    (test_all_families.test_families_without_a_class_run_data_free, "file", test_all_families.FROM_HEADERS),
    (test_every_scheme.test_refused_or_read_back, "name", {writer.name for writer in dialects.writers()}),
    (test_load.test_names_of_formats_are_text, "element", set(ELEMENTS)),
]


@pytest.mark.parametrize(("test", "argument", "members"), MEMBERS, ids=lambda value: getattr(value, "__name__", None))
def test_members_are_run(test: Any, argument: str, members: set[str]) -> None:
    assert members
    assert members <= normal_values(test, argument)


def normal_values(test: Any, argument: str) -> set[str]:
    """Values of an argument that a test has without the mark."""
    found = set()
    for mark in test.pytestmark:
        names, values = mark.args if mark.name == "parametrize" else ((), ())
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        if argument not in names:
            continue
        for value in values:
            if any(other.name == "slow" for other in getattr(value, "marks", ())):
                continue
            row = value.values if isinstance(value, type(pytest.param())) else (value,) if len(names) == 1 else value
            found.add(row[names.index(argument)])
    return found


# ---- members whose tests name them one by one: a run for whatever is registered

RECIPE = """
schema: quark/recipe/1
metadata: {{name: own}}
quantize:
  quant_cfg:
  - {{quantizer_path: '*weight_quantizer', cfg: {weight}}}
  - {{quantizer_path: '*input_quantizer', cfg: {input}}}
"""
FP8 = {"element": "fp8_e4m3", "granularity": "tensor", "scale": {"dtype": "f32", "when": "static"}}
FP4 = {
    "element": "fp4_e2m1",
    "granularity": {"group": 16},
    "scale": {"dtype": "e4m3", "global_scale": {"dtype": "f32"}},
}
# What an observer finds ranges for, as the weight and the input of a scheme; the others take any static scale.
FORMATS = {"headroom": (FP4, {**FP4, "scale": {**FP4["scale"], "when": "dynamic"}})}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return runs.data(runs.text_file(tmp_path_factory.mktemp("text") / "text.txt"), 4, 32)


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_runs(name: str, source: Path, data: dict[str, Any], tmp_path: Path) -> None:
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128", algorithm=name, settings=runs.quick(name), **data)
    assert name in made.report["algorithms"]


@pytest.mark.parametrize("kind", ["kv_cache", "attention"])
def test_every_format_of_cache_and_attention_runs(
    kind: str, source: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    for name in catalog.files(kind):
        made = runs.run(source, tmp_path / name, scheme="fp8", **{kind: name}, **data)
        assert any(module.specs for module in made.prepared.plan.attention.values()), name


@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_runs(name: str, source: Path, data: dict[str, Any], tmp_path: Path) -> None:
    weight, given = FORMATS.get(name, (FP8, FP8))
    own = tmp_path / "own.yaml"
    own.write_text(RECIPE.format(weight=json.dumps(weight), input=json.dumps({**given, "observer": name})))
    made = runs.run(source, tmp_path / "out", recipe=str(own), **data)
    inputs = {target.input.observer.name for target in made.prepared.plan.quantized()}
    assert inputs == {name}
