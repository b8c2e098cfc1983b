"""Algorithm settings of AMD Quark and NVIDIA ModelOpt."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli import algorithms
from quarkcli.recipe import peer_steps
from quarkcli.recipe.steps import Steps, from_modelopt, from_quark

# An imported file keeps what it says: damping as given or as theirs, no refinement, no held-out rows.
AS_GIVEN = {"damp": 0.01, "refine": "off", "holdout": 0}
IN_TURN = {**AS_GIVEN, "true_sequential": True}  # AMD Quark solves the weights of a block one after the other
DOWN = "*down_proj.weight_quantizer"
INSIDE = ["self_attn.q_proj", "self_attn.k_proj"]
PAIR = {"prev_op": "input_layernorm", "layers": INSIDE, "inp": "self_attn.q_proj", "module2inspect": "self_attn"}


def quark(value: Any) -> Steps:
    return from_quark(value, ("algo_config",))


def modelopt(value: Any) -> Steps:
    return from_modelopt(value, ("algorithm",))


def test_quark_fields_under_our_names() -> None:
    """As in Quark's own documentation."""
    given = {
        "name": "gptq", "damp_percent": 0.02, "desc_act": False, "static_groups": True, "true_sequential": True,
        "block_size": 64, "inside_layer_modules": INSIDE, "model_decoder_layers": "model.layers",
    }  # fmt: skip
    found = quark(given)
    slots = [f"*{name}.weight_quantizer" for name in INSIDE]
    assert found.steps == [("gptq", {**IN_TURN, "damp": 0.02, "act_order": False, "slots": slots})]
    noted = ["block_size", "model_decoder_layers"]
    assert [path for path, _ in found.notes] == [("algo_config", field) for field in noted]
    assert found.problems == []


def test_static_groups_go_without_the_order_of_activations() -> None:
    found = quark({"name": "gptq", "static_groups": False, "desc_act": False})
    assert (found.steps, found.problems) == ([("gptq", {**IN_TURN, "act_order": False})], [])
    assert [path[-1] for path, _ in found.notes] == ["static_groups"]
    assert quark({"name": "gptq", "static_groups": False, "desc_act": True}).problems


def test_the_one_known_condition_is_taken_apart() -> None:
    text = "module.self_attn.v_proj.weight.shape == module.self_attn.o_proj.weight.shape"
    rows = [PAIR, {"prev_op": "self_attn.v_proj", "layers": ["self_attn.o_proj"], "condition": text, "help": None}]
    found = quark([{"name": "awq", "scaling_layers": rows}])
    same = {"same_shape": ["self_attn.v_proj.weight", "self_attn.o_proj.weight"]}
    plain = {"prev_op": "self_attn.v_proj", "layers": ["self_attn.o_proj"], "condition": same}
    assert found.steps == [("awq", {"scaling_layers": [PAIR, plain]})]


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "a.shape != b.shape", "True", "a.shape == b.shape or 1"]
)
def test_no_other_condition_is_taken(text: str) -> None:
    found = quark({"name": "smooth", "scaling_layers": [{**PAIR, "condition": text}]})
    assert "which is not of the form 'A.shape == B.shape'" in found.problems[0][1]


def test_older_names() -> None:
    assert quark({"name": "smooth", "alpha": 0.5}).steps == [("smoothquant", {"alpha": 0.5})]
    assert quark({"SmoothQuantConfig": {"alpha": 0.5}}).steps == [("smoothquant", {"alpha": 0.5})]
    assert quark({"GPTQConfig": {}}).steps == [("gptq", IN_TURN)]
    quarot = quark({"name": "quarot", "r3": False, "r4": False, "random": True})
    turned = {"r1": True, "r2": True, "random": True}
    assert quarot.steps == [("rotation", turned)] and "called 'rotation' today" in quarot.notes[0][1]
    gqa = quark({"name": "awq", "num_attention_heads": 32, "num_key_value_heads": 8})
    assert gqa.steps == [("awq", {})] and len(gqa.notes) == 2
    online = quark({"name": "rotation", "online_config": {"shared_parallel": True, "shared_input_rotation": True}})
    assert online.steps == [("rotation", {"r1": True, "r2": False, "random": False})] and len(online.notes) == 1


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [("rotation", {"r1": True, "r2": False, "random": False})]),
        ({"r2": True, "random_r1": True}, [("rotation", {"r1": True, "r2": True, "random": True})]),
        ({"rotation_size": 32}, [("rotation", {"r1": True, "r2": False, "random": False, "block": 32})]),
        (
            {"r4": True, "r3": False, "scaling_layers": {"first_layer": [{"next_modules": ["a"]}]}},
            [
                ("rotation", {"r1": True, "r2": False, "random": False}),
                ("hadamard", {"slots": ["*down_proj.weight_quantizer"], "block": "full"}),
            ],
        ),
        ({"r1": False, "r4": True, "rotation_size": 64}, [("hadamard", {"slots": [DOWN], "block": 64})]),
    ],
)
def test_rotations(given: dict[str, Any], steps: Any) -> None:
    found = quark({"name": "rotation", **given})
    assert (found.steps, found.problems) == (steps, [])


def test_defaults_that_differ_from_ours_are_theirs() -> None:
    assert quark({"name": "smooth"}).steps == [("smoothquant", {"alpha": 1.0})] == modelopt("smoothquant").steps
    assert quark({"name": "gptaq"}).steps == [("gptaq", {**IN_TURN, "strength": 0.25})]
    assert quark({"name": "gptaq", "alpha": 0.5}).steps == [("gptaq", {**IN_TURN, "strength": 0.5})]
    ridge = {**IN_TURN, "damp": 1e-3, "damp_of": "largest", "strength": 1.0}
    assert quark({"name": "qronos"}).steps == [("qronos", ridge)]
    assert quark({"name": "qronos", "alpha": 1e-2, "beta": 1e4}).steps == [("qronos", {**ridge, "damp": 1e-2})]
    rates = {"lr": 0.005, "minmax_lr": 0.005}
    assert quark({"name": "autoround", "iters": 20}).steps == [("autoround", {**rates, "iters": 20})]
    given = {"name": "autoround", "enable_minmax_tuning": False, "batch_size": 4, "inside_layer_modules": ["q_proj"]}
    slots = {"slots": ["*q_proj.weight_quantizer"]}
    assert quark(given).steps == [("autoround", {**rates, "minmax": False, "batch": 4, **slots})]


OWN_STEPS = [words for words in (*peer_steps.QUARK.values(), *peer_steps.MODELOPT.values()) if words.name != "mse"]


@pytest.mark.parametrize("words", OWN_STEPS)  # mse becomes a property of the weights
def test_our_words_are_parameters_of_our_algorithms(words: peer_steps.Words) -> None:
    assert {*words.renamed.values(), *words.usual} <= set(algorithms.create(words.name, {}).parameters)


def test_what_rows_say_without_effect_is_said() -> None:
    (note,) = quark({"name": "awq", "scaling_layers": [PAIR]}).notes
    assert note[0][-1] == "scaling_layers"
    assert "inp, module2inspect in scaling_layers have no effect" in note[1]
    bare = {key: PAIR[key] for key in ("prev_op", "layers")}
    assert not quark({"name": "awq", "scaling_layers": [bare]}).notes


def test_a_loss_that_is_not_what_its_name_says() -> None:
    found = quark({"name": "autosmoothquant", "compute_scale_loss": "RMSE"})
    assert found.steps == [("autosmoothquant", {"compute_scale_loss": "RMSE"})]
    assert ["mean root of the magnitude" in text for _, text in found.notes] == [True]
    assert not quark({"name": "autosmoothquant", "compute_scale_loss": "MAE"}).notes


def test_no_rows_are_those_of_the_family() -> None:
    found = quark({"name": "smooth", "alpha": 0.5, "scaling_layers": [], "model_decoder_layers": "model.layers"})
    assert found.steps == [("smoothquant", {"alpha": 0.5})]
    assert "quark knows the blocks from the model family" in found.notes[1][1]


def test_order_and_nothing() -> None:
    both = quark([{"name": "rotation", "r1": True, "trainable": False}, {"name": "gptaq", "alpha": 0.25}])
    turned = {"r1": True, "r2": False, "random": False}
    assert both.steps == [("rotation", turned), ("gptaq", {**IN_TURN, "strength": 0.25})]
    assert quark(None) == Steps() == quark([])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rho": 28672}, "rho must lie between 0 and 28672"),
        ({"anchor_percentile": 0}, "anchor_percentile must be more than 0 and at most 100"),
        ({"weight_scale_algorithm": {"method": "mse", "sweep": True}}, "mse has no field 'sweep'"),
        ({"weight_scale_algorithm": 4}, "an algorithm must be the name of a method, or a mapping with 'method'"),
    ],
)
def test_headroom(parameters: dict[str, Any], message: str) -> None:
    [(_, problem)] = modelopt({"method": "nvfp4_act_headroom", **parameters}).problems
    assert message in problem


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gptq", "an algorithm must be a mapping with 'name'"),
        ({"damp_percent": 1}, "an algorithm must be a mapping with 'name'"),
        ({"GPTQConfig": 4}, "an algorithm must be a mapping with 'name'"),
        ({"name": "gptr"}, "algorithm 'gptr' is unknown (did you mean 'gptq'?)"),
        ({"name": "svdquant"}, "'svdquant' is not supported: no checkpoint format here holds a low-rank part"),
        ({"name": "twobitscalar"}, "'twobitscalar' is not supported"),
        ({"name": "rotation", "trainable": True}, "'trainable' is not supported: transforms are learned"),
        ({"name": "rotation", "train_smooth": True}, "'train_smooth' is not supported"),
        ({"name": "rotation", "r3": True}, "'r3' is not supported: no checkpoint format can say that queries and keys"),
        ({"name": "rotation", "online_r1_rotation": True}, "R1 becomes part of the weights; the"),
        ({"name": "rotation", "scaling_layers": []}, "scaling_layers must be a mapping with first_layer"),
        ({"name": "rotation", "scaling_layers": {"first_layer": [{"prev_op": "x"}]}}, "unknown key 'prev_op'"),
        ({"name": "gptq", "static_groups": False}, "static_groups: false does not work"),
        ({"name": "gptq", "damp": 0.1}, "gptq has no field 'damp' (did you mean 'damp_percent'?)"),
        ({"name": "gptq", "damp_percent": "1"}, "damp_percent must be a number"),
        ({"name": "gptq", "desc_act": 1}, "desc_act must be true or false"),
        ({"name": "gptq", "block_size": 1.5}, "block_size must be a whole number"),
        ({"name": "gptq", "block_size": 0}, "block_size must be at least 1"),
        ({"name": "gptq", "damp_percent": float("nan")}, "damp_percent must be a number"),
        ({"name": "gptq", "inside_layer_modules": [""]}, "inside_layer_modules must be a list of names"),
        ({"name": "gptq", "inside_layer_modules": []}, "inside_layer_modules names no module; leave it out to name"),
        ({"name": "autoround", "iters": -1}, "iters must be a whole number, not below 0"),
        ({"name": "gptq", "inside_layer_modules": "q_proj"}, "inside_layer_modules must be a list of names"),
        ({"name": "awq", "model_decoder_layers": 3}, "model_decoder_layers must be text"),
        ({"name": "awq", "scaling_layers": "all"}, "scaling_layers must be a list"),
        ({"name": "awq", "scaling_layers": ["a"]}, "holds 'a', which is no mapping"),
        ({"name": "awq", "scaling_layers": [{"prev_op": "a"}]}, "must have 'prev_op' and 'layers' in every row"),
        ({"name": "awq", "scaling_layers": [{**PAIR, "layer": []}]}, "unknown key 'layer' (did you mean 'layers'?)"),
        ({"name": "awq", "scaling_layers": [{**PAIR, "layers": "a"}]}, "has a 'layers' that must be a list of names"),
    ],
)  # fmt: skip
def test_quark_refusals(value: Any, message: str) -> None:
    assert message in quark(value).problems[0][1]


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (None, []),
        ("max", []),
        ({"method": "max", "distributed_sync": True}, []),
        ("awq_lite", [("awq", {"clip": "off", "n_grid": 10})]),
        ({"method": "awq_full", "alpha_step": 0.05}, [("awq", {"clip": "on", "n_grid": 20})]),
        (
            {"method": "awq_clip", "min_clip_ratio": 0.6, "shrink_step": 0.1},
            [("awq", {"scales": False, "clip": "on", "min_clip_ratio": 0.6, "shrink_step": 0.1})],
        ),
        ("local_hessian", [("rtn", {"scale_search": True})]),
        ({"method": "gptq", "perc_damp": 0.02, "layerwise": {"enable": True}}, [("gptq", {**AS_GIVEN, "damp": 0.02})]),
        ({"method": "gptq", "block_size": 64, "fused": True}, [("gptq", AS_GIVEN)]),
        ({"method": "mse", "fp8_scale_sweep": True}, [("mse", {"fp8_scale_sweep": True})]),
        ({"method": "local_hessian", "shared_states": None}, [("rtn", {"scale_search": True})]),
        (["awq_lite", {"method": "gptq"}], [("awq", {"clip": "off", "n_grid": 10}), ("gptq", AS_GIVEN)]),
        (
            {"method": "nvfp4_act_headroom", "weight_scale_algorithm": {"method": "local_hessian"}},
            [("nvfp4_act_headroom", {}), ("rtn", {"scale_search": True})],
        ),
        (
            ["smoothquant", {"method": "max"}, {"method": "gptq", "perc_damp": 0.05}],
            [("smoothquant", {"alpha": 1.0}), ("gptq", {**AS_GIVEN, "damp": 0.05})],
        ),
        (
            {"method": "nvfp4_act_headroom", "rho": 16384, "weight_scale_algorithm": {"method": "max"}},
            [("nvfp4_act_headroom", {"rho": 16384})],
        ),
        (
            {"method": "nvfp4_act_headroom", "weight_scale_algorithm": {"method": "mse", "fp8_scale_sweep": True}},
            [("nvfp4_act_headroom", {}), ("mse", {"fp8_scale_sweep": True})],
        ),
    ],
)  # fmt: skip
def test_modelopt(value: Any, steps: Any) -> None:
    found = modelopt(value)
    assert (found.steps, found.problems) == (steps, [])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "an algorithm must be the name of a method, or a mapping with 'method'"),
        ({"name": "max"}, "a mapping with 'method'"),
        ("nosuch", "algorithm 'nosuch' is unknown; known: max"),
        ("smothquant", "did you mean 'smoothquant'?"),
        ({"method": "svdquant", "lowrank": 32}, "'svdquant' is not supported"),
        ({"method": "lsq"}, "'lsq' is not supported: scales are learned only in training"),
        ({"method": "gptq", "damp": 1}, "gptq has no field 'damp' (did you mean 'perc_damp'?)"),
        ({"method": "smoothquant", "alpha": "half"}, "alpha must be a number"),
        ({"method": "awq_lite", "alpha_step": 0}, "alpha_step must be more than 0 and at most 1"),
        ({"method": "mse", "step_size": 0}, "step_size must be a positive number"),
        ({"method": "mse", "step_size": -0.1}, "step_size must be a positive number"),
        ({"method": "mse", "step_size": float("nan")}, "step_size must be a number"),
        ({"method": "mse", "step_size": 1e-9}, "'step_size' is not supported: it asks for more than 1000 ranges"),
        ({"method": "mse", "start_multiplier": 5}, "'stop_multiplier' is not supported: it must be above start_mult"),
        ({"method": "mse", "stop_multiplier": 0.2}, "'stop_multiplier' is not supported: it must be above start_mult"),
        ({"method": "max", "moe_calib_experts_ratio": 2}, "moe_calib_experts_ratio must be more than 0 and at most 1"),
    ],
)
def test_modelopt_refusals(value: Any, message: str) -> None:
    assert message in modelopt(value).problems[0][1]
