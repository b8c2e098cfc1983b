"""ModelOpt attributes -> TensorSpec: the numerics of its presets, its rules, and what is refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarkcli.errors import ConfigError
from quarkcli.recipe.attributes import compressed_tensors, modelopt, native, quark, to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.spec import (
    ELEMENTS,
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)

F32 = ScaleSpec("f32", "absmax")
NVFP4 = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}
INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}


def blocks(bits: Any, size: int, scale: Any, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "block_sizes": {-1: size, "type": "dynamic", "scale_bits": scale, **more}}


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({}, TensorSpec("int8", PerTensor(), F32)),
        ({"axis": 0}, TensorSpec("int8", PerChannel(0), F32)),
        ({"num_bits": 8, "axis": [-1]}, TensorSpec("int8", PerChannel(1), F32)),
        ({"num_bits": 8.0, "axis": None}, TensorSpec("int8", PerTensor(), F32)),
        ({"num_bits": [4, 3], "axis": None}, TensorSpec("fp8_e4m3", PerTensor(), F32)),
        ({"num_bits": "E4M3", "axis": 0}, TensorSpec("fp8_e4m3", PerChannel(0), F32)),
        ({"num_bits": "e5m2"}, TensorSpec("fp8_e5m2", PerTensor(), F32)),
        (INT4, TensorSpec("int4", PerGroup(128), ScaleSpec("model", "absmax"))),
        ({"num_bits": 4, "block_sizes": {"-1": 32}}, TensorSpec("int4", PerGroup(32), ScaleSpec("model", "absmax"))),
        ({"num_bits": "e4m3", "block_sizes": {-1: 128, -2: 64}}, TensorSpec("fp8_e4m3", PerTile(64, 128), F32)),
        ({"num_bits": "e4m3", "block_sizes": {1: 128, 0: 64}}, TensorSpec("fp8_e4m3", PerTile(64, 128), F32)),
        ({"num_bits": "e4m3", "block_sizes": {-1: None}}, TensorSpec("fp8_e4m3", PerChannel(0), F32)),
        (NVFP4, TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", global_scale=F32))),
        (
            {**NVFP4, "effective_bits": 4.5},
            TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", global_scale=F32)),
        ),
        (
            {"num_bits": "e2m1", "block_sizes": {-1: 16, "scale_bits": "e4m3", "four_over_six": True}},
            TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "four_over_six", global_scale=F32)),
        ),
        (blocks([2, 1], 32, [8, 0]), TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "rceil"))),
        (blocks([3, 2], 32, "e8m0"), TensorSpec("fp6_e3m2", PerGroup(32), ScaleSpec("e8m0", "rceil"))),
        (blocks([2, 3], 32, "e8m0"), TensorSpec("fp6_e2m3", PerGroup(32), ScaleSpec("e8m0", "rceil"))),
        (blocks([4, 3], 32, [8, 0]), TensorSpec("fp8_e4m3", PerGroup(32), ScaleSpec("e8m0", "rceil"))),
        (blocks(8, 32, [8, 0]), TensorSpec("mxint8", PerGroup(32), ScaleSpec("e8m0", "rceil"))),
        ({"num_bits": 4, "narrow_range": True}, TensorSpec("int4", PerTensor(), ScaleSpec("model"), narrow=True)),
        ({"fake_quant": False, "pass_through_bwd": True, "trt_high_precision_dtype": "Half", "learn_amax": False,
          "rotate": {"enable": False}, "bias": None, "backend": None}, TensorSpec("int8", PerTensor(), F32)),
    ],
)  # fmt: skip
def test_weights(cfg: dict[str, Any], expected: TensorSpec) -> None:
    assert to_spec(cfg, weight=True) == expected


DYNAMIC = ScaleSpec("f32", "absmax", "dynamic")


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({"num_bits": "e4m3"}, TensorSpec("fp8_e4m3", PerTensor(), F32)),
        ({"num_bits": "e4m3", "type": "dynamic"}, TensorSpec("fp8_e4m3", PerTensor(), DYNAMIC)),
        (
            {"num_bits": "e4m3", "type": "dynamic", "block_sizes": {-1: None}},
            TensorSpec("fp8_e4m3", PerToken(), DYNAMIC),
        ),
        (NVFP4, TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", "dynamic", F32))),
        (
            {**NVFP4, "constant_amax": 2688},
            TensorSpec("fp4_e2m1", PerGroup(16),
                       ScaleSpec("e4m3", "absmax", "dynamic", ScaleSpec("f32", constant_amax=2688.0))),
        ),
        (blocks([2, 1], 32, [8, 0]), TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "rceil", "dynamic"))),
        ({"num_bits": [4, 3], "use_constant_amax": True},
         TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", constant_amax=448.0))),
        ({"num_bits": 8, "axis": -1}, TensorSpec("int8", PerChannel(1), F32)),
        ({"calibrator": "histogram"}, TensorSpec("int8", PerTensor(), F32, observer=ObserverSpec("histogram"))),
        ({"calibrator": "max"}, TensorSpec("int8", PerTensor(), F32)),
    ],
)  # fmt: skip
def test_activations(cfg: dict[str, Any], expected: TensorSpec) -> None:
    assert to_spec(cfg, weight=False) == expected


@pytest.mark.parametrize(
    "cfg",
    [
        {"num_bits": [4, 3], "constant_amax": 10},
        {"num_bits": [4, 3], "use_constant_amax": True},
        {**NVFP4, "constant_amax": 2688},
        [INT4, {"num_bits": [4, 3], "constant_amax": 10}],
        {"element": "fp8_e4m3", "scale": {"constant_amax": 10}},
        {"element": "int8", "then": {"element": "fp8_e4m3", "scale": {"constant_amax": 10}}},
    ],
)
def test_a_fixed_range_of_a_weight_is_refused(cfg: Any) -> None:
    """ModelOpt would cut the weight's values off there."""
    with pytest.raises(ConfigError, match="constant_amax works only for activations") as caught:
        to_spec(cfg, weight=True)
    assert caught.value.kind == "E-FORMAT-IMPOSSIBLE"
    assert to_spec(cfg, weight=False).stages


def test_a_list_is_a_chain_whose_first_codes_are_stored() -> None:
    """W4A8: the second stage rounds what the first gives."""
    spec = to_spec([INT4, {"num_bits": [4, 3]}], weight=True)
    assert spec == TensorSpec(
        "int4", PerGroup(128), ScaleSpec("model", "absmax"), then=TensorSpec("fp8_e4m3", PerTensor(), F32)
    )
    assert spec.codes.element == "int4"
    assert to_spec([{}], weight=True) == TensorSpec("int8", PerTensor(), F32)
    with pytest.raises(ConfigError, match="a chain has two stages, and this one has"):
        to_spec([INT4, INT4, INT4], weight=True)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"num_bit": 4}, "unknown attribute 'num_bit'; did you mean 'num_bits'?"),
        ({"axis": 0, "block_sizes": {-1: 16}}, "axis and block_sizes exclude each other"),
        ({"use_constant_amax": True, "constant_amax": 3}, "use_constant_amax and constant_amax exclude each other"),
        ({"constant_amax": 0}, "constant_amax must be a positive number"),
        ({"constant_amax": True}, "constant_amax must be a positive number"),
        ({"effective_bits": 0}, "effective_bits must lie between 0 and 16"),
        ({"effective_bits": 17}, "effective_bits must lie between 0 and 16"),
        ({"num_bits": 8.5}, "num_bits must be a pair"),
        ({"num_bits": True}, "num_bits must be a pair"),
        ({"num_bits": "fp8"}, "num_bits must be a pair such as [4, 3] or a text such as e4m3"),
        ({"num_bits": 0}, "num_bits 0 is not supported"),
        ({"num_bits": 5}, "num_bits 5 is not supported; use 2, 3, 4 or 8"),
        ({"num_bits": [1, 2]}, "num_bits [1, 2] is not supported"),
        ({"num_bits": [0, 3]}, "num_bits [0, 3] is not supported"),
        ({"num_bits": [4, 3, 1]}, "num_bits must be a pair"),
        ({"num_bits": [4, 3], "unsigned": True}, "for integers"),
        ({"num_bits": [4, 3], "narrow_range": True}, "for integers"),
        ({"unsigned": True}, "'unsigned' is not supported"),
        ({"unsigned": "yes"}, "unsigned must be true or false"),
        ({"fake_quant": "yes"}, "fake_quant must be true or false"),
        ({"block_sizes": 16}, "block_sizes must be a mapping"),
        ({"block_sizes": {"type": "static"}}, "block_sizes names no axis"),
        ({"block_sizes": {-1: 0}}, "block_sizes.-1 must be a positive whole number or null"),
        ({"block_sizes": {-1: -16}}, "block_sizes.-1 must be"),
        ({"block_sizes": {-1: 16, "-1": 32}}, "block_sizes names axis -1 twice"),
        ({"block_sizes": {-1: 16, "typ": "static"}}, "unknown key 'typ' in block_sizes; did you mean 'type'?"),
        ({"block_sizes": {-1: 16, True: 2}}, "unknown key 'True'"),
        ({"block_sizes": {-1: 16, "type": "static "}}, "type must be static or dynamic"),
        ({"type": "Dynamic"}, "type must be static or dynamic"),
        ({"block_sizes": {-1: 16, -2: 16, "type": "dynamic"}}, "dynamic blocks can have only one axis"),
        ({"block_sizes": {-2: 16}}, "blocks along [-2] are not supported"),
        ({"block_sizes": {-1: 16, 1: 16}}, "are not supported"),
        ({"block_sizes": {-3: 16}}, "are not supported"),
        ({"block_sizes": {-1: 16, -2: None}}, "are not supported"),
        ({"axis": 2}, "axis 2 is not supported"),
        ({"axis": [0, 1]}, "axis [0, 1] is not supported"),
        ({"block_sizes": {-1: 16, "scale_bits": [5, 3]}}, "scale_bits (5, 3) is not supported"),
        ({"block_sizes": {-1: 16, "scale_bits": 8}}, "block_sizes.scale_bits must be a pair"),
        ({"num_bits": [2, 1], "block_sizes": {-1: 16, "four_over_six": True}}, "four_over_six works only with"),
        ({"num_bits": [2, 1], "block_sizes": {-1: 16, "four_over_six": 6}}, "four_over_six must be true or false"),
        ({**NVFP4, "block_sizes": {**NVFP4["block_sizes"], "scale_block_sizes": {-1: 4}}}, "'scale_block"),
        (blocks(4, 32, [8, 0]), "no MX format has 4-bit integers"),
        ({"bias": {-2: None, "type": "static"}}, "'bias' is not supported"),
        ({"rotate": True}, "'rotate' is not supported"),
        ({"rotate": {"enable": True, "block_size": 16}}, "'rotate' is not supported"),
        ({"learn_amax": True}, "'learn_amax' is not supported: scales are learned only in training"),
        ({"backend": "mine"}, "'backend' is not supported"),
        ({"backend_extra_args": {"a": 1}}, "'backend_extra_args' is not supported"),
        ({"calibrator": "entropy"}, "calibrator 'entropy' is not supported"),
        ({"calibrator": "histogram"}, "calibrator histogram works only for static activations"),
        ({"trt_high_precision_dtype": "half"}, "trt_high_precision_dtype 'half' is unknown"),
    ],
)  # fmt: skip
def test_refusals(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_spec(cfg, weight=True)
    assert message in f"{caught.value.what}; {caught.value.hint}"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"axis": 0}, "axis 0 is not supported"),
        ({"block_sizes": {1: 16}}, "are not supported"),
        ({"type": "dynamic", "calibrator": "histogram"}, "for static activations"),
        (
            {**NVFP4, "block_sizes": {**NVFP4["block_sizes"], "four_over_six": True}},
            "four_over_six works only with static blocks",
        ),
    ],
)
def test_refusals_of_activations(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        to_spec(cfg, weight=False)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"element": "int4", "num_bits": 4}, "'element' and 'num_bits' are words of different tools"),
        ({"element": "int4", "dtype": "int4"}, "'element' and 'dtype' are words of different tools"),
        ([{"num_bits": 4}, {"dtype": "int4"}], "'dtype' and 'num_bits' are words of different tools"),
        ({"element": "int4", "block_sizes": {-1: 16}}, "'block_sizes' and 'element' are words of different tools"),
        ({"dtype": "int8", "granularity": "tensor"}, "'granularity' and 'dtype' are words of different tools"),
        ({"granularity": "tensor"}, "'granularity' needs 'element' beside it"),
        ({"qscheme": "per_tensor", "symmetric": True}, "'qscheme' needs 'dtype' beside it"),
        (
            [{"element": "int4"}, {"element": "int4"}],
            "a chain (two quantizations, one after the other) is written with 'then'",
        ),
        ([], "cfg must be a mapping or a list of mappings"),
        ("fp8", "cfg must be a mapping or a list of mappings"),
        (4, "cfg must be a mapping or a list of mappings"),
    ],
)
def test_one_vocabulary_at_a_time(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_spec(cfg, weight=True)
    assert message in caught.value.what


def test_the_vocabulary_is_told_by_its_word() -> None:
    native = to_spec({"element": "int8"}, weight=True)
    assert native.scale is not None and native.scale.rule == "half_range"
    modelopt = to_spec({"num_bits": 8}, weight=True)
    assert modelopt.scale is not None and modelopt.scale.rule == "absmax"
    spec = {"dtype": "int8", "qscheme": "per_tensor", "symmetric": True, "scale_type": "float32", "is_dynamic": False}
    assert to_spec(spec, weight=True) == native


# --- any value of any field ------------------------------------------------------------------------------------------

_WORDS = sorted({*native.KEYS, *modelopt.FIELDS, *quark.FIELDS, "mx_element"})
_NAMES = st.sampled_from([
    "e4m3", "int8", "int4", "fp4", "fp8_e4m3", "mx", "mx6", "bf16", "per_group", "per_tensor", "token", "static",
    "dynamic", "half_even", "PerTensorMSEObserver", "histogram", "e8m0", "float", "x",
])  # fmt: skip
_LEAVES = st.none() | st.booleans() | st.integers(-3, 130) | st.floats() | _NAMES
_PARTS = st.sampled_from([
    {-1: 16}, {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}, {-1: 16, "scale_bits": [4, 3]}, [4, 3], [2, 1],
    {"group": 16}, {"dtype": "e8m0"}, {"dtype": "e4m3", "global_scale": {}}, {"element": "int8"}, {"name": "mse"},
    [128, 128],
])  # fmt: skip
_VALUES = st.recursive(_LEAVES | _PARTS, lambda inner: st.lists(inner, max_size=2), max_leaves=3)


def _around(good: dict[str, Any], fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A cfg that is fine, with up to three fields put in or replaced."""
    return st.dictionaries(st.sampled_from(sorted(fields)), _VALUES, max_size=3).map(lambda more: {**good, **more})


SPEC = {"dtype": "int8", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True, "scale_type": "float"}
_CFGS = (
    st.dictionaries(st.sampled_from(_WORDS), _VALUES, max_size=6)
    | _around({"element": "int8"}, native.KEYS)
    | _around({"element": "mx", "mx_element": "fp4_e2m1"}, ("mx_element", "scale", "granularity"))
    | _around({}, modelopt.FIELDS)
    | _around(NVFP4, modelopt.FIELDS)
    | _around(SPEC, quark.FIELDS)
)


@settings(max_examples=400)
@given(_CFGS | st.lists(_CFGS, max_size=3), st.booleans())
def test_anything_is_a_spec_or_refused(cfg: Any, weight: bool) -> None:
    """And what is one can be written in the native words."""
    try:
        spec = to_spec(cfg, weight=weight)
    except ConfigError:
        return
    assert native.to_spec(spec_to_yaml(spec)) == spec


@given(st.dictionaries(st.sampled_from(compressed_tensors.FIELDS), _VALUES, max_size=6), st.booleans())
def test_any_arguments_are_a_spec_or_refused(args: Any, weight: bool) -> None:
    with contextlib.suppress(ConfigError):
        assert compressed_tensors.to_spec(args, weight=weight).element in ELEMENTS
