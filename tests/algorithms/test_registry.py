"""Algorithms are found by their files, and their parameters are checked."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from quarkcli import algorithms
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError, UsageError
from quarkcli.job import run as job
from quarkcli.numerics.quantize import dequantize, quantize
from quarkcli.recipe import recipe as recipes
from tests import runs
from tests.docs.algorithms import PAGE

# The file that the page of algorithms shows whoever adds one.
(HALVES,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `half_size.py` had been dropped beside the others."""
    folder = tmp_path / "members"
    folder.mkdir()
    (folder / "half_size.py").write_text(HALVES)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "quarkcli.algorithms.half_size", raising=False)
    yield
    sys.modules.pop("quarkcli.algorithms.half_size", None)


def test_names_are_the_files() -> None:
    folder = Path(algorithms.__file__).parent
    members = [file for file in folder.glob("*.py") if "\nALGORITHM = " in file.read_text(encoding="utf-8")]
    files = {file.stem.replace("_", "-") for file in members}
    assert set(algorithms.names()) == files >= {"gptq", "rtn"}
    for name in algorithms.names():
        assert algorithms.create(name, {}).name == name


@pytest.mark.usefixtures("halves")
def test_a_new_file_is_a_new_algorithm(tmp_path: Path) -> None:
    assert "half-size" in algorithms.names()
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="half_size")
    assert made.report["algorithms"] == ["half-size"]
    name = "model.layers.2.mlp.up_proj"
    weight = runs.read_all(EMBEDDED)[f"{name}.weight"]
    spec = made.prepared.plan.targets[name].weight
    wanted = dequantize(quantize(weight * 0.5, spec), spec)
    assert torch.equal(Checkpoint(Source.open(str(made.folder))).weight(name), wanted)


@pytest.mark.usefixtures("halves")
def test_two_solvers_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="half-size and gptq both choose the codes"):
        algorithms.created([("half-size", {}), ("gptq", {})])
    assert [step.name for step in algorithms.created([])] == ["rtn"]


SLOTS = """\
schema: quark/recipe/1
quantize:
  scheme: int4_wo_128
  algorithm:
%s
calibration: {data: builtin, samples: 8, seqlen: 64}
"""


def with_steps(folder: Path, *steps: str) -> str:
    path = folder / "own.yaml"
    path.write_text(SLOTS % "\n".join(f"    - {step}" for step in steps))
    return str(path)


def weights(folder: Path, leaf: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in runs.read_all(folder).items() if leaf in name}


@pytest.mark.usefixtures("halves")
def test_steps_on_some_of_the_weights(tmp_path: Path) -> None:
    """Each solver has its own, the default the rest: every weight as if its solver had run on all of block 0."""
    own = with_steps(
        tmp_path, "{method: gptq, slots: ['*layers.0.self_attn.*']}", "{method: half-size, slots: ['*down_proj*']}"
    )
    made = runs.run("demo", tmp_path / "own", recipe=own)
    assert made.report["algorithms"] == ["gptq", "half-size", "rtn"]
    sites = {site for site, kinds in made.prepared.needs.items() if "gram" in kinds}
    assert sites == {made.prepared.plan.targets[f"model.layers.0.self_attn.{n}_proj"].site for n in "qo"}
    data = {"calib_data": "builtin", "calib_samples": 8, "calib_seqlen": 64}
    solvers = {"layers.0.self_attn.": "gptq", "down_proj": "half-size", "up_proj": "rtn", "layers.1.self_attn.": "rtn"}
    for leaf, solver in solvers.items():
        whole = runs.run("demo", tmp_path / solver, scheme="int4_wo_128", algorithm=solver, overwrite=True, **data)
        mine, theirs = weights(made.folder, leaf), weights(whole.folder, leaf)
        assert mine and all(runs.same_bytes(mine[name], theirs[name]) for name in theirs), leaf
    again = runs.run("demo", tmp_path / "again", recipe=str(made.folder / "quark" / "recipe.yaml"))
    assert runs.same_files(made.folder, again.folder)


def test_steps_that_do_not_go_together(tmp_path: Path) -> None:
    def prepare(*steps: str) -> job.Prepared:
        return runs.prepare("demo", recipe=with_steps(tmp_path, *steps))

    with pytest.raises(ConfigError, match=r"gptq and rtn both choose the codes of model\.layers\.0\.mlp\.down_proj"):
        prepare("{method: gptq}", "{method: rtn, slots: ['*down_proj.weight_quantizer']}")
    with pytest.raises(ConfigError, match=r"algorithm gptq: '\*dwn_proj\*' matches none of 30 weights") as caught:
        prepare("{method: gptq, slots: ['*dwn_proj*']}")
    assert caught.value.where == str(tmp_path / "own.yaml") and "down_proj" in caught.value.hint
    with pytest.raises(ConfigError, match="slots must be a list"):
        prepare("{method: gptq, slots: '*'}")
    with pytest.raises(ConfigError, match="slots is empty"):
        prepare("{method: gptq, slots: []}")
    two = prepare("{method: gptq, slots: ['*.0.*']}", "{method: gptq, damp: 0.1, slots: ['*.1.*']}")
    assert [step.name for step in two.steps] == ["gptq", "gptq", "rtn"]
    everything = prepare("{method: gptq, slots: ['*']}")
    assert [step.name for step in everything.steps] == ["gptq"]


@pytest.mark.parametrize(
    ("name", "parameters", "error", "text"),
    [
        ("gptp", {}, UsageError, "unknown algorithm 'gptp'"),
        ("gptq", {"dampp": 0.1}, ConfigError, "no parameter 'dampp'"),
        ("rtn", {"damp": 0.1}, ConfigError, "no parameter 'damp'"),
        ("gptq", {"damp": 0}, ConfigError, "damp must be auto or lie between 0 and 1, not 0"),
        ("gptq", {"damp": 1.5}, ConfigError, "not 1.5"),
        ("gptq", {"damp": True}, ConfigError, "not True"),
        ("gptq", {"damp": "0.1"}, ConfigError, "not '0.1'"),
        ("gptq", {"damp": float("nan")}, ConfigError, "not nan"),
        ("gptq", {"act_order": 1}, ConfigError, "act_order must be one of true, false, group, not 1"),
        ("gptq", {"scale_search": "yes"}, ConfigError, "scale_search must be one of true, false"),
    ],
)
def test_wrong_parameters(name: str, parameters: dict, error: type, text: str) -> None:
    with pytest.raises(error) as caught:
        algorithms.create(name, parameters)
    assert text in caught.value.what


def test_near_misses_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        algorithms.create("gtpq", {})
    assert "gptq" in caught.value.hint
    with pytest.raises(ConfigError) as refused:
        algorithms.create("gptq", {"act-ordr": True})
    assert "did you mean 'act_order'?" in refused.value.hint


def test_parameters_come_from_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "schema: quark/recipe/1\nquantize:\n  scheme: int4_wo_128\n"
        "  algorithm: [{method: gptq, damp: 5e-2, act_order: false}]\n"
    )
    assert recipes.from_file(path).algorithms == [("gptq", {"damp": 0.05, "act_order": False})]
    prepared = runs.prepare("demo", recipe=str(path), calib_data="builtin")
    solver = prepared.steps[0].algorithm
    assert (solver.damp, solver.act_order, solver.scale_search) == (0.05, False, True)
    flagged = runs.prepare("demo", recipe=str(path), algorithm="rtn")
    assert [step.name for step in flagged.steps] == ["rtn"]
    assert flagged.calibration is None
    path.write_text(path.read_text().replace("5e-2", "5"))
    with pytest.raises(ConfigError, match="damp must be auto or lie between 0 and 1"):
        runs.prepare("demo", recipe=str(path), calib_data="builtin")
