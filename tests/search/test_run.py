"""`search.run`: from schemes and a budget to a recipe that quantizes as was chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest

from quarkcli import algorithms
from quarkcli.errors import ConfigError, ModelError, UsageError
from quarkcli.events import Event, Message, silent
from quarkcli.job.options import Options
from quarkcli.plan.compose import Overrides
from quarkcli.recipe import catalog
from quarkcli.search import losses
from quarkcli.search.run import Asked, Found, search
from quarkcli.search.states import place
from tests import runs
from tests.recipe.test_foreign import write

DATA = {"calib_samples": 8, "calib_seqlen": 48}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def scored(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of nvfp4, fp8 and bf16, measured once."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    search(asked(source, text, ["nvfp4", "fp8", "bf16"], scores=path), silent)
    return path


def asked(source: Path, text: Path, schemes: list[str], options: dict[str, Any] | None = None, **given: Any) -> Asked:
    own = {"calib_data": str(text), "device": "cpu", **DATA, **(options or {})}
    return Asked(Options(model=str(source), **own), schemes, **given)


def specs(plan: Any) -> dict[str, tuple[Any, Any]]:
    return {target.name: (target.weight, target.input) for target in plan.targets.values()}


@pytest.mark.parametrize("budget", [4.51, 5.0, 6.5, 9.0, 15.0])
def test_the_recipe_is_what_was_chosen(budget: float, source: Path, text: Path, scored: Path, tmp_path: Path) -> None:
    found = search(
        asked(source, text, ["nvfp4", "fp8", "bf16"], scores=scored, budget=budget, output=tmp_path / "r.yaml"), silent
    )
    assert found.choice is not None
    assert not found.measured
    assert found.choice.bits <= budget
    made = runs.prepare(source, recipe=str(tmp_path / "r.yaml"))
    single = {name: specs(runs.prepare(source, scheme=name, **runs.data(text)).plan) for name in ("nvfp4", "fp8")}
    for group in found.choosing.groups:
        chosen = found.choice.chosen[group.name]
        for name in group.names:
            wanted = single[chosen][name] if chosen != "bf16" else (None, None)
            assert specs(made.plan)[name] == wanted
    assert made.forecast.output_bytes == found.choice.size


def test_bits_are_those_of_the_plan(source: Path, text: Path, scored: Path, tmp_path: Path) -> None:
    given = asked(source, text, ["nvfp4", "fp8", "bf16"], scores=scored, budget=5.5, output=tmp_path / "r.yaml")
    found = search(given, silent)
    assert found.choice is not None
    if "bf16" not in found.choice.chosen.values():
        made = runs.prepare(source, recipe=str(tmp_path / "r.yaml"))
        assert made.forecast.effective_bits == pytest.approx(found.choice.bits, abs=1e-4)


def test_a_size_holds_for_the_files(source: Path, text: Path, scored: Path, tmp_path: Path) -> None:
    curve = search(asked(source, text, ["nvfp4", "fp8", "bf16"], scores=scored), silent).curve
    assert len(curve) > 4
    losses = [choice.loss for choice in curve]
    assert losses == sorted(losses, reverse=True)
    for number, size in enumerate((curve[1].size - 1, curve[3].size + 100)):
        recipe = tmp_path / f"{number}.yaml"
        given = asked(source, text, ["nvfp4", "fp8", "bf16"], scores=scored, size=size, output=recipe)
        found = search(given, silent)
        made = runs.run(source, tmp_path / f"out{number}", recipe=str(recipe))
        written = sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
        assert found.choice is not None
        assert written == found.choice.size <= size


def test_another_budget_runs_no_model(
    source: Path, text: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(losses, "measure", never)
    given = asked(source, text, ["nvfp4", "fp8", "bf16"], scores=scored, budget=7.0, output=tmp_path / "r.yaml")
    assert search(given, silent).choice is not None
    with pytest.raises(
        ConfigError, match="these scores are for another model, other data, schemes or settings"
    ) as caught:
        search(asked(source, text, ["nvfp4", "bf16"], scores=scored), silent)
    assert caught.value.where == str(scored)
    for damage in ("gone", -1.0, math.nan, math.inf):
        stored = json.loads(scored.read_text())
        if damage == "gone":
            del stored["losses"][3]
        else:
            stored["losses"][3]["loss"] = damage
        (tmp_path / "scores.json").write_text(json.dumps(stored))
        with pytest.raises(ConfigError, match="a loss is missing, or is no number from 0 on") as error:
            search(asked(source, text, ["nvfp4", "fp8", "bf16"], scores=tmp_path / "scores.json"), silent)
        assert error.value.kind == "E-SCORES-FILE"
    huge = {"losses": [{"group": "x", "candidate": "fp8", "loss": 10**400}]}
    for damaged in ("[]", "[" * 200_000, json.dumps(huge)):
        (tmp_path / "scores.json").write_text(damaged)
        with pytest.raises(ConfigError, match="not a file of scores"):
            search(asked(source, text, ["nvfp4", "bf16"], scores=tmp_path / "scores.json"), silent)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory") as error:
        search(asked(source, text, ["nvfp4", "bf16"], scores=tmp_path), silent)
    assert "delete" not in error.value.hint
    for other in ({"algorithm": "gptq"}, {"seed": 4}, {"calib_samples": 9}):
        with pytest.raises(ConfigError, match="these scores are for another model, other data, schemes or settings"):
            search(asked(source, text, ["nvfp4", "fp8", "bf16"], other, scores=scored), silent)


def test_the_same_search_has_the_same_scores(source: Path, text: Path, scored: Path, tmp_path: Path) -> None:
    search(asked(source, text, ["nvfp4", "fp8", "bf16"], scores=tmp_path / "again.json"), silent)
    assert (tmp_path / "again.json").read_bytes() == scored.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]  # hidden states are gone


def test_better_codes_lose_less(source: Path, text: Path, tmp_path: Path) -> None:
    """The real solver is measured, and stands in the recipe."""
    found: dict[str, Found] = {}
    for name in ("rtn", "gptq"):
        given = asked(
            source, text, ["int4_wo_128", "bf16"], {"algorithm": name}, budget=5.0, output=tmp_path / f"{name}.yaml"
        )
        found[name] = search(given, silent)
    whole = {name: one.choosing.choice(["int4_wo_128"] * 8).loss for name, one in found.items()}
    assert whole["gptq"] < 0.8 * whole["rtn"]
    made = runs.prepare(source, recipe=str(tmp_path / "gptq.yaml"))
    assert [step.name for step in made.plan.algorithms] == ["gptq"]
    assert made.calibration is not None
    assert (made.calibration.samples, made.calibration.seqlen) == (8, 48)


def test_experts_are_one_group_unless_nothing_fuses_them(text: Path, tmp_path: Path) -> None:
    source = runs.build("qwen3_moe", tmp_path / "source")
    given = asked(source, text, ["nvfp4", "fp8"], budget=6.0, output=tmp_path / "r.yaml")
    found = search(given, silent)
    sizes = [len(group.targets) for group in found.choosing.groups if group.targets[0].expert is not None]
    experts = sum(target.expert is not None for target in runs.prepare(source, scheme="mxfp4").plan.quantized())
    assert len(sizes) == 2
    assert sum(sizes) == experts
    assert all(value > 0 for value in found.choosing.losses.values())
    assert (tmp_path / "r.yaml").read_text().count('.mlp.experts.*_proj.weight_quantizer"') == 2
    runs.run(source, tmp_path / "out", recipe=str(tmp_path / "r.yaml"))  # check_servers agrees


def test_without_servers_every_weight_is_a_group(source: Path, text: Path, tmp_path: Path) -> None:
    given = asked(source, text, ["mxfp4", "bf16"], {"target": "none"}, scores=tmp_path / "s.json")
    assert all(len(group.targets) == 1 for group in search(given, silent).choosing.groups)


def test_a_head_is_searched_when_it_is_unprotected(source: Path, text: Path, tmp_path: Path) -> None:
    options = {"overrides": Overrides(unprotect=["head"])}
    given = asked(source, text, ["nvfp4", "fp8"], options, budget=8.1, output=tmp_path / "r.yaml")
    found = search(given, silent)
    assert "lm_head" in {group.name for group in found.choosing.groups}
    assert 0 < found.choosing.losses["lm_head", "fp8"] < found.choosing.losses["lm_head", "nvfp4"]
    assert runs.prepare(source, recipe=str(tmp_path / "r.yaml")).plan.targets["lm_head"].weight is not None


def test_a_budget_that_nothing_meets_is_refused_before_the_work(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "measure", None)
    with pytest.raises(ConfigError, match="bits per weight are too few; the smallest choice takes") as caught:
        search(asked(source, text, ["nvfp4", "fp8"], budget=4.0, output=tmp_path / "r.yaml"), silent)
    assert "4.5" in caught.value.hint
    with pytest.raises(ConfigError, match="bytes are too few; the smallest choice takes"):
        search(asked(source, text, ["nvfp4", "fp8"], size=9, output=tmp_path / "r.yaml"), silent)
    with pytest.raises(ConfigError, match="the budget is large enough to quantize nothing"):
        search(asked(source, text, ["nvfp4", "bf16"], budget=16.0, output=tmp_path / "r.yaml"), silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("schemes", "given", "error", "what"),
    [
        (["nvfp4"], {}, UsageError, "two schemes or more"),
        (["bf16"], {}, UsageError, "two schemes or more"),
        ([], {}, UsageError, "neither --schemes nor --recipe"),
        (["nvfp4", "nvfp4"], {}, UsageError, "named twice"),
        (["nvfp4", "fp9"], {}, UsageError, "unknown scheme"),
        (["nvfp4", "fp8"], {"budget": 5.0, "size": 10}, UsageError, "exclude each other"),
        (["nvfp4", "fp8"], {"options": {"on_nonfinite": "skip-algorithm"}}, UsageError, "cannot skip one"),
        (["nvfp4", "fp8"], {"recipe": Path("x.yaml")}, UsageError, "exclude each other"),
        (["nvfp4", "fp8"], {"output": Path("x.yaml")}, UsageError, "a recipe needs a budget"),
        (["nvfp4", "fp8"], {"budget": 5.0, "output": Path("no/x.yaml")}, UsageError, "no such directory"),
        (["nvfp4", "fp8"], {"budget": 5.0, "output": Path(__file__)}, UsageError, "exists"),
    ],
)
def test_wrong_requests(schemes: list[str], given: Any, error: Any, what: str, source: Path, text: Path) -> None:
    with pytest.raises(error, match=what):
        search(asked(source, text, schemes, **given), silent)


def test_inputs_that_are_turned_are_refused(source: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="hadamard rotates inputs while the model runs"):
        search(asked(source, text, ["mxfp4", "fp8"], {"algorithm": "hadamard"}, budget=6.0), silent)


def test_a_model_without_a_head_is_refused(text: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match="the model has no head, so it gives no probabilities to compare"):
        search(asked(source, text, ["mxfp4", "bf16"], scores=tmp_path / "s.json"), silent)


class TestModelOpt:
    """Recipes of type `auto_quantize`."""

    SECTION: ClassVar[dict[str, Any]] = {
        "constraints": {"effective_bits": 6.0},
        "candidate_formats": [{"$import": "nvfp4"}, {"$import": "fp8"}],
        "disabled_layers": [{"$import": "off"}],
        "cost_excluded_layers": ["*.layers.0.mlp*"],
        "score_size": 8,
    }
    FILE: ClassVar[dict[str, Any]] = {
        "imports": {
            "nvfp4": "configs/ptq/presets/model/nvfp4",
            "fp8": "configs/ptq/presets/model/fp8",
            "off": "configs/auto_quantize/units/base_disabled_layers",
        },
        "metadata": {"recipe_type": "auto_quantize", "description": "x"},
    }

    def found(self, source: Path, text: Path, folder: Path, **section: Any) -> Found:
        recipe = write(folder, {**self.FILE, "auto_quantize": {**self.SECTION, **section}})
        said: list[Event] = []
        found = search(asked(source, text, [], recipe=recipe, output=folder / "r.yaml"), said.append)
        self.said = [event.text for event in said if isinstance(event, Message)]
        return found

    def test_its_budget_and_formats(self, source: Path, text: Path, tmp_path: Path) -> None:
        found = self.found(source, text, tmp_path, auto_quantize_method="kl_div")
        assert [candidate.name for candidate in found.choosing.space.candidates] == ["nvfp4", "fp8", "bf16"]
        assert found.choice is not None
        assert found.choice.bits <= 6.0
        uncounted = [group for group in found.choosing.groups if not group.counted]
        assert {group.name for group in uncounted} == {
            "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj+up_proj",
        }  # fmt: skip
        assert all(found.choice.chosen[group.name] == "bf16" for group in uncounted)  # what costs nothing
        made = runs.prepare(source, recipe=str(tmp_path / "r.yaml"))
        assert any(target.weight is not None for target in made.plan.targets.values())
        assert any(
            "auto_quantize_method has no effect: quark always scores formats by the Fisher information" in line
            for line in self.said
        )

    def test_search_spaces_and_a_baseline(self, source: Path, text: Path, tmp_path: Path) -> None:
        space = {
            "module_name_patterns": ["*self_attn*"],
            "candidate_formats": [{"$import": "nvfp4"}, {"$import": "fp8"}],
            "allow_no_quant": False,
        }
        baseline = {"quant_cfg": [{"quantizer_path": "*mlp*weight_quantizer", "cfg": {"num_bits": 8}}]}
        file = {**self.FILE, "quantize": baseline, "auto_quantize": {
            "constraints": {"effective_bits": 7.0}, "module_search_spaces": [space],
        }}  # fmt: skip
        recipe = write(tmp_path, file)
        found = search(asked(source, text, [], recipe=recipe, output=tmp_path / "r.yaml"), silent)
        allowed = {group.name.split(".")[3]: group.allowed for group in found.choosing.groups}
        assert allowed == {"self_attn": ("nvfp4", "fp8"), "mlp": ("baseline",)}
        made = runs.prepare(source, recipe=str(tmp_path / "r.yaml"))
        assert made.plan.targets["model.layers.0.mlp.up_proj"].weight is not None

    def test_a_rule_that_splits_what_servers_fuse(self, source: Path, text: Path, tmp_path: Path) -> None:
        space = {"module_name_patterns": ["*q_proj"], "candidate_formats": [{"$import": "fp8"}]}
        with pytest.raises(ConfigError, match="servers multiply these weights together"):
            self.found(source, text, tmp_path, module_search_spaces=[space])

    @pytest.mark.parametrize(
        ("section", "what"),
        [
            (
                {"candidate_formats": []},
                "auto_quantize.candidate_formats and",
            ),
            ({"cost_excluded_layers": ["*"]}, "none of the weights that are searched counts in the budget"),
            ({"constraints": {"effective_bits": 20.0}}, "effective_bits"),
            ({"formats": []}, "unknown key 'formats'"),
        ],
    )
    def test_what_is_wrong_is_named(self, section: Any, what: str, source: Path, text: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=what):
            self.found(source, text, tmp_path, **section)

    def test_other_recipes_are_told_from_searches(self, source: Path, text: Path) -> None:
        recipe = catalog.files("ptq")["nvfp4"]
        with pytest.raises(ConfigError, match="not a recipe for a search"):
            search(asked(source, text, [], recipe=recipe), silent)


def _quick(name: str) -> list[str]:
    """Settings with which a tuner does little."""
    tunes = name in algorithms.names() and "iters" in algorithms.create(name, {}).parameters
    return [f"{name}.iters=2"] if tunes else []


BOTH = ["nvfp4", "int4_wo_128"]


@pytest.fixture(scope="module")
def nearest(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """Losses of rounding to nearest."""
    scores = tmp_path_factory.mktemp("nearest") / "rtn.json"
    return search(asked(source, text, BOTH, scores=scores), silent).choosing.losses


@pytest.mark.parametrize("name", [*algorithms.names(), "auto"])
def test_every_algorithm_is_measured_or_refused(
    name: str, source: Path, text: Path, nearest: dict[tuple[str, str], float], tmp_path: Path
) -> None:
    options = {"algorithm": name, "settings": _quick(name)}
    given = asked(source, text, BOTH, options, budget=4.4, output=tmp_path / "r.yaml", scores=tmp_path / "s.json")
    try:
        found = search(given, silent)
    except ConfigError as error:
        assert error.hint, error
        assert not list(tmp_path.iterdir())
        return
    for scheme in BOTH:
        ours, rtn = (
            sum(loss for (_, of), loss in each.items() if of == scheme) for each in (found.choosing.losses, nearest)
        )
        assert 0 < ours < 1.5 * rtn, scheme
    made = runs.run(source, tmp_path / "out", recipe=str(tmp_path / "r.yaml"))
    assert made.prepared.steps


class TestPlace:
    """The folder of hidden states."""

    def test_goes_with_the_search_and_takes_what_a_kill_left(self, tmp_path: Path) -> None:
        (tmp_path / ".quark-search-dead").mkdir()
        (tmp_path / ".quark-search-dead" / "lock").touch()
        (tmp_path / ".quark-search-mine").mkdir()  # not one of ours: nothing locks it
        with pytest.raises(RuntimeError), place(tmp_path) as folder:
            (folder / "x").touch()
            assert not (tmp_path / ".quark-search-dead").exists()
            raise RuntimeError
        assert [path.name for path in tmp_path.iterdir()] == [".quark-search-mine"]

    def test_leaves_that_of_another_search(self, tmp_path: Path) -> None:
        with place(tmp_path) as other, place(tmp_path) as folder:
            assert other.is_dir()
            assert folder.is_dir()
