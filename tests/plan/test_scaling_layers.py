"""Rows of `scaling_layers` in imported files: whose channels are scaled, and where a condition holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quarkcli.errors import ConfigError
from tests import runs

MXFP4 = {
    "dtype": "fp4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "scale_format": "e8m0",
    "scale_calculation_mode": "even", "is_dynamic": False, "observer_cls": "PerBlockMXObserver",
}  # fmt: skip
NORM = {"prev_op": "input_layernorm", "layers": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
VALUES = {"prev_op": "self_attn.v_proj", "layers": ["self_attn.o_proj"]}
SAME = {"condition": "module.self_attn.v_proj.weight.shape == module.self_attn.o_proj.weight.shape"}
ALWAYS = {"condition": "module.self_attn.k_proj.weight.shape == module.self_attn.v_proj.weight.shape"}


def planned(folder: Path, rows: Any) -> Any:
    config = {
        "global_quant_config": {"weight": MXFP4},
        "exclude": ["lm_head"],
        "algo_config": [{"name": "smooth", "alpha": 0.5, "scaling_layers": rows}],
    }
    (folder / "quark.json").write_text(json.dumps(config))
    return runs.prepare("demo", recipe=str(folder / "quark.json"), calib_data="builtin").plan


def scaled(plan: Any) -> set[str]:
    """Names, below block 0, of the weights that the transform changes."""
    inside = "model.layers.0."
    return {name.removeprefix(inside).removesuffix(".weight") for name in plan.changed if name.startswith(inside)}


def test_a_row_scales_its_channels_alone(tmp_path: Path) -> None:
    attention = {f"self_attn.{leaf}_proj" for leaf in "qkv"}
    assert scaled(planned(tmp_path, [NORM])) == {"input_layernorm", *attention}
    assert scaled(planned(tmp_path, [NORM, VALUES])) == {"input_layernorm", *attention, "self_attn.o_proj"}


def test_a_row_holds_where_its_condition_does(tmp_path: Path) -> None:
    """The demo model has fewer key than query heads: v and o differ in shape, k and v do not."""
    with_both = planned(tmp_path, [NORM, {**VALUES, **SAME}])
    assert "self_attn.o_proj" not in scaled(with_both)
    assert "self_attn.o_proj" in scaled(planned(tmp_path, [NORM, {**VALUES, **ALWAYS}]))
    (step,) = with_both.algorithms
    assert [row["prev_op"] for row in step.parameters["scaling_layers"]] == ["input_layernorm"]


def test_a_layer_that_no_block_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no block has a layer 'self_attn\.q_prj'") as caught:
        planned(tmp_path, [{**NORM, "layers": ["self_attn.k_proj", "self_attn.q_prj"]}])
    assert "self_attn.q_proj" in caught.value.hint


def test_no_row_that_holds_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no condition of scaling_layers is true for this model") as caught:
        planned(tmp_path, [{**VALUES, **SAME}])
    assert "quark.json" in str(caught.value)


@pytest.mark.parametrize(
    "condition", ["a == b", {"same_shape": ["a"]}, {"same_shape": ["a", 1]}, {"shape": ["a", "b"]}]
)
def test_a_native_recipe_says_its_conditions_as_they_are_converted(condition: Any, tmp_path: Path) -> None:
    step = {"method": "smoothquant", "scaling_layers": [{"prev_op": "input_layernorm", "condition": condition}]}
    own = {"schema": "quark/recipe/1", "quantize": {"scheme": "mxfp4", "algorithm": [step]}}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match="has the unknown condition") as caught:
        runs.prepare("demo", recipe=str(tmp_path / "own.yaml"), calib_data="builtin")
    assert "own.yaml" in str(caught.value)


def test_rows_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no channels to scale in 'ln_1'"):
        planned(tmp_path, [{"prev_op": "ln_1", "layers": ["attn.c_attn"]}])
