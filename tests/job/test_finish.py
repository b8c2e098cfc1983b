"""Steps 9 and 10 apart from the job: config with its one key more, resolved recipe, side files, manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError
from quarkcli.events import silent
from quarkcli.job import finish
from quarkcli.job import run as job
from quarkcli.job.run import Options, Prepared
from quarkcli.plan.compose import Overrides
from quarkcli.recipe import recipe as recipes
from quarkcli.reporting.run import Clock


def prepared(model: Path = EMBEDDED, **more: Any) -> Prepared:
    settings: dict[str, Any] = {"scheme": "mxfp4", "offline": True, "calib_data": "builtin", "calib_samples": 4}
    return job.prepare(Options(model=str(model), output=Path("out"), **settings | more))


# ---- config.json


def test_the_key_comes_last_and_the_rest_keeps_its_order():
    text = '{"b": 1, "a": {"z": 1, "y": [1, 2]}}'
    written = finish.with_keys(text, {"quantization_config": {"quant_method": "x"}})
    assert list(json.loads(written)) == ["b", "a", "quantization_config"]
    assert list(json.loads(written)["a"]) == ["z", "y"]
    assert written.endswith("}\n")


def test_an_old_key_is_replaced_where_it_stands():
    text = '{"a": 1, "quantization_config": {"old": true}, "b": 2}'
    config = json.loads(finish.with_keys(text, {"quantization_config": {"new": 1}}))
    assert list(config.items()) == [("a", 1), ("quantization_config", {"new": 1}), ("b", 2)]


@pytest.mark.parametrize(
    "value", [1e-05, 1.0, 500000.0, 0.1, 10**20, 3, True, None, "ä \u2028 \U0001f600", [], {}, float("inf"), 1e300]
)
def test_values_survive(value):
    text = json.dumps({"key": value})
    got = json.loads(finish.with_keys(text, {}))["key"]
    assert got == value
    assert type(got) is type(value)


def test_text_is_readable():
    assert "für" in finish.with_keys('{"name": "f\\u00fcr"}', {})


# ---- the resolved recipe


def test_the_resolved_recipe_is_a_recipe_with_every_entry_spelled_out(tmp_path):
    overrides = Overrides(
        exclude=["*layers.0.*", r"re:.*\.1\..*k_proj"], layers=["*down_proj=fp8"], layer_types=["Linear=mxfp4"],
        include=["*layers.0.mlp.up_proj"], unprotect=["head"], kv_cache="fp8",
    )  # fmt: skip
    first = prepared(overrides=overrides, algorithm="gptq", dialect="quark", target="none")  # k apart from q
    path = tmp_path / "recipe.yaml"
    path.write_text(finish.resolved_recipe(first))
    found = recipes.from_file(path)
    assert found.name == "mxfp4"
    assert found.exclusions is False
    assert not any(entry.required for entry in found.entries)
    assert found.algorithms == [("gptq", {})]
    assert (found.dialect, found.calib_data, found.calib_samples, found.calib_seqlen) == ("quark", "builtin", 4, 512)
    second = prepared(scheme=None, recipe=str(path), calib_data=None, calib_samples=None, target="none")
    assert dict(second.plan.slots()).keys() == dict(first.plan.slots()).keys()
    for (name, a), (_, b) in zip(first.plan.slots(), second.plan.slots(), strict=True):
        assert a.spec == b.spec, name
    assert second.plan.kept.keys() == first.plan.kept.keys()
    assert second.calibration == first.calibration
    assert finish.resolved_recipe(second) == finish.resolved_recipe(first)


def test_a_path_that_is_no_text_does_not_spoil_the_recipe():
    made = prepared(scheme="fp8", calib_data="builtin")
    made = replace(made, calibration=replace(made.calibration, source=os.fsdecode(b"cal\xff.txt")))
    assert yaml.safe_load(finish.resolved_recipe(made))["calibration"]["data"] == r"cal\udcff.txt"


def test_the_resolved_recipe_is_plain_yaml():
    text = finish.resolved_recipe(prepared(scheme="nvfp4"))
    assert "&" not in text
    assert "!!" not in text
    assert yaml.safe_load(text)["schema"] == "quark/recipe/1"
    assert text.index("schema:") == 0


def test_a_data_free_run_names_no_data():
    assert "calibration" not in yaml.safe_load(finish.resolved_recipe(prepared(calib_data=None, calib_samples=None)))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-kv_fp8", "int4_wo_128-gptq", "nvfp4-kv_fp8"])
def test_shipped_recipes_resolve_to_themselves(tmp_path, name):
    first = prepared(scheme=None, recipe=name)
    (tmp_path / "recipe.yaml").write_text(finish.resolved_recipe(first))
    second = prepared(scheme=None, recipe=str(tmp_path / "recipe.yaml"))
    assert finish.resolved_recipe(second) == finish.resolved_recipe(first)
    assert [d.spec for _, d in first.plan.slots()] == [d.spec for _, d in second.plan.slots()]
    assert [(step.key, step.weights, vars(step.algorithm)) for step in first.steps] == [
        (step.key, step.weights, vars(step.algorithm)) for step in second.steps
    ]


# ---- step 9 and 10 on files


@pytest.fixture
def work(tmp_path: Path) -> tuple[Prepared, Path, dict[str, Any]]:
    """A partial directory with all shards and no more, as step 8 leaves it; and what the journal says of them."""
    source = tmp_path / "model"
    shutil.copytree(EMBEDDED, source)
    (source / "README.md").write_text("source card")
    output = tmp_path / "out"
    kept: dict[str, Any] = {}
    real = finish.write_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "write_config", lambda p, partial, records, tell: kept.update(records) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.run(Options(model=str(source), scheme="mxfp4", output=output))
    assert finish.write_config is real
    return job.prepare(Options(model=str(source), scheme="mxfp4", output=output)), tmp_path / "out.partial", kept


def complete(work: tuple[Prepared, Path, dict[str, Any]]) -> dict[str, Any]:
    plan, partial, records = work
    finish.write_config(plan, partial, records, silent)
    clock = Clock()
    clock.began -= 1.5
    return finish.verify_and_report(plan, None, records, partial, clock, "cpu", None)


def test_step_9_can_be_repeated(work):
    plan, partial, records = work
    seen = []
    for _ in range(2):
        finish.write_config(plan, partial, records, silent)
        files = [path for path in sorted(partial.rglob("*")) if path.is_file() and ".quark-state" not in path.parts]
        seen.append({path: path.read_bytes() for path in files if path.name != "quark.log"})
    assert seen[0] == seen[1]


def test_the_manifest_leaves_out_itself_the_log_and_the_state(work):
    report = complete(work)
    partial = work[1]
    files = json.loads((partial / "quark" / "manifest.json").read_text())["files"]
    assert not [name for name in files if name.startswith(".quark-state/")]
    assert (partial / ".quark-state" / "journal.json").is_file()
    assert {"quark/manifest.json", "quark/quark.log"} & set(files) == set()
    assert {"config.json", "README.md", "quark/report.json", "quark/source_README.md"} <= set(files)
    for name, digest in files.items():
        assert hashlib.sha256((partial / name).read_bytes()).hexdigest() == digest
    assert json.loads((partial / "quark" / "report.json").read_text()) == report
    assert 1.5 <= report["seconds"] < 60


def test_a_source_that_is_no_hub_snapshot_has_no_commit(work):
    complete(work)
    source = json.loads((work[1] / "quark" / "manifest.json").read_text())["source"]
    headers = Source.open(str(work[0].source.folder)).header_digest()
    assert source == {"name": "model", "hub_id": None, "commit": None, "headers": headers}


@pytest.mark.parametrize("damage", ["lost shard", "other shape", "scale of NaN"])
def test_files_that_are_not_the_plan_are_refused(work, damage):
    """Exit 8, before a report or manifest says that all is well."""
    from safetensors.torch import load_file, save_file

    plan, partial, records = work
    finish.write_config(plan, partial, records, silent)
    path = partial / "model-block-00001.safetensors"
    tensors = load_file(path)
    scale = next(name for name in tensors if name.endswith("scale"))
    if damage == "scale of NaN":
        tensors[scale].fill_(255)
    elif damage == "other shape":
        tensors[scale] = tensors[scale][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    if damage == "lost shard":
        path.unlink()
    with pytest.raises(CheckError) as caught:
        finish.verify_and_report(plan, None, records, partial, Clock(), "cpu", None)
    assert caught.value.code == 8
    assert "block-00001" in str(caught.value) or scale.rpartition(".")[0] in str(caught.value)
    assert not (partial / "quark" / "report.json").exists()
    assert not (partial / "quark" / "manifest.json").exists()
