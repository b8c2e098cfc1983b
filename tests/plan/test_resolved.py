"""The resolved recipe in a checkpoint repeats its job, and a scheme of one's own is one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quarkcli.disk import verify
from quarkcli.errors import ConfigError
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from quarkcli.job import finish
from quarkcli.plan.model import Plan
from tests import runs

PARTIAL = """\
schema: quark/recipe/1
quantize:
  quant_cfg:
    - {quantizer_path: '*', enable: false}
    - quantizer_path: '*.weight_quantizer'
      cfg: {element: int4, granularity: {group: 64}}
    - {quantizer_path: '*o_proj*', enable: false}
    - quantizer_path: '*mlp*weight_quantizer'
      parent_class: nn.Linear
      cfg: {element: fp8_e4m3}
    - quantizer_path: '*mlp*input_quantizer'
      cfg: {element: fp8_e4m3, scale: {when: dynamic}}
  algorithm: [{method: gptq, damp: 2e-2}]
calibration: {samples: 5, seqlen: 32}
export: {dialect: compressed-tensors}
"""


def decisions(plan: Plan) -> dict[str, Any]:
    return {name: decision.spec for name, decision in plan.slots()}


def again(prepared: Any, folder: Path) -> Any:
    path = folder / "resolved.yaml"
    path.write_text(finish.resolved_recipe(prepared))
    return runs.prepare("demo", recipe=str(path), target=prepared.options.target)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "mxfp4"},
        {"scheme": "nvfp4", "kv_cache": "fp8", "calib_samples": 7, "calib_seqlen": 40},
        {"scheme": "fp8", "seed": 3, "moe_calibration": "all", "calib_column": "body"},
        {"scheme": "int4_wo_128", "algorithm": "gptq", "unprotect": ["head"]},
        {
            "scheme": "fp8",
            "layer_types": ["Linear=mxfp4"],
            "layers": ["*mlp*=nvfp4", "re:.*up_proj=fp8"],
            "exclude": ["*layers.1.*", "*layers.2.mlp*"],
            "include": ["*layers.1.mlp.up_proj"],
            "target": "none",  # up apart from gate
        },
        {"recipe": "nvfp4-kv_fp8", "kv_cache": "none", "include": ["lm_head"]},
        {"recipe": "PARTIAL", "exclude": ["*layers.0.*"], "include": ["*layers.0.mlp.up_proj"], "target": "none"},
        {"scheme": "mxfp4", "exclude": ["*nothing"], "allow_unmatched": True},
        {"scheme": "fp8", "layers": ["*=int4_wo_128"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_resolved_recipe_gives_the_same_plan(options: dict[str, Any], tmp_path: Path) -> None:
    if options.get("recipe") == "PARTIAL":
        (tmp_path / "own.yaml").write_text(PARTIAL)
        options = {**options, "recipe": str(tmp_path / "own.yaml")}
    first = runs.prepare("demo", calib_data="builtin", **options)
    second = again(first, tmp_path)
    assert decisions(second.plan) == decisions(first.plan)
    assert second.plan.kept.keys() == first.plan.kept.keys()
    assert (second.dialect.name, second.needs) == (first.dialect.name, first.needs)
    assert [(step.key, step.weights, vars(step.algorithm)) for step in second.steps] == [
        (step.key, step.weights, vars(step.algorithm)) for step in first.steps
    ]
    assert second.calibration == first.calibration
    assert finish.resolved_recipe(again(second, tmp_path)) == finish.resolved_recipe(second)


def test_include_over_what_a_recipe_left_off(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(PARTIAL)
    first = runs.prepare(
        "demo", recipe=str(tmp_path / "own.yaml"), calib_data="builtin", exclude=["*layers.0.*"],
        include=["*layers.0.self_attn*"],
    )  # fmt: skip
    assert first.plan.targets["model.layers.0.self_attn.o_proj"].weight is None
    assert decisions(again(first, tmp_path).plan) == decisions(first.plan)


def test_the_copy_in_a_checkpoint_makes_the_same_bytes(tmp_path: Path) -> None:
    text = runs.text_file(tmp_path / "t.txt")
    first = runs.run("demo", tmp_path / "one", scheme="fp8", exclude=["*o_proj"], kv_cache="fp8", **runs.data(text, 8))
    second = runs.run("demo", tmp_path / "two", recipe=str(first.folder / "quark" / "recipe.yaml"))
    assert runs.same_files(first.folder, second.folder)
    configs = [json.loads((made.folder / "config.json").read_text()) for made in (first, second)]
    assert configs[0] == configs[1]


class TestOwnScheme:
    """One YAML file in the user's folder, from the command to the measured checkpoint."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
        (tmp_path / "home" / "schemes").mkdir(parents=True)
        (tmp_path / "home" / "schemes" / "own_g32.yaml").write_text(
            "summary: groups of 32\nweight: {element: int4, granularity: {group: 32}}\n"
        )

    def test_end_to_end(self, tmp_path: Path) -> None:
        made = runs.run("demo", tmp_path / "out", scheme="own-g32")
        assert made.report["recipe"]["name"] == "own_g32"
        assert made.report["size"]["effective_bits"] == 4.5  # a 16-bit scale for 32 weights
        assert made.report["dialect"]["reason"] == "auto: loads in vLLM and transformers"
        assert verify.directory(str(made.folder), str(made.source))[-1].startswith("all ")
        written = runs.read_all(made.folder)
        assert written["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 384 // 32)
        assert yaml.safe_load((made.folder / "quark" / "recipe.yaml").read_text())["metadata"]["name"] == "own_g32"
        (tmp_path / "page.txt").write_text(runs.topics(0, 3)[:4000])
        coarse = runs.run("demo", tmp_path / "coarse", scheme="int4_wo_128")
        losses = [
            evaluate(
                str(some.folder), baseline=str(made.source), text=str(tmp_path / "page.txt"), device="cpu", tell=silent
            )["kl"]
            for some in (made, coarse)
        ]
        assert 0 < losses[0] < losses[1]  # finer groups lose less

    def test_in_flags_and_recipes(self, tmp_path: Path) -> None:
        prepared = runs.prepare("demo", scheme="mxfp4", layers=["*down_proj=own_g32"])
        assert prepared.plan.targets["model.layers.0.mlp.down_proj"].weight.element == "int4"
        (tmp_path / "own.yaml").write_text("schema: quark/recipe/1\nquantize: {scheme: own-g32}\n")
        recipe = runs.prepare("demo", recipe=str(tmp_path / "own.yaml"))
        assert recipe.plan.targets["model.layers.0.mlp.down_proj"].weight.group_size == 32

    def test_what_no_dialect_holds_is_refused(self, tmp_path: Path) -> None:
        odd = "weight: {element: int4, granularity: {group: 32}, scale: {when: dynamic}}\n"  # weights are stored
        (tmp_path / "home" / "schemes" / "odd.yaml").write_text(odd)
        with pytest.raises(ConfigError, match="no checkpoint format can hold this plan") as caught:
            runs.prepare("demo", scheme="odd")
        assert "quark: " in caught.value.what and "compressed-tensors: " in caught.value.what
