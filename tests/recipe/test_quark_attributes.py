"""SPECs of AMD Quark -> TensorSpec. `quark_schemes.json` holds those of all its schemes, printed by release 0.13."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quarkcli.errors import ConfigError
from quarkcli.recipe import recipe
from quarkcli.recipe.attributes import native, to_spec
from quarkcli.spec import (
    SCALE_FORMATS,
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)

SCHEMES = json.loads((Path(__file__).parent.parent / "data" / "quark_schemes.json").read_text())
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "observer_cls": "PerTensorMinMaxObserver"}
INT8 = {
    "dtype": "int8", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True, "scale_type": "float32",
    "round_method": "half_even", "observer_cls": "PerTensorMinMaxObserver",
}  # fmt: skip
UINT4 = {
    "dtype": "uint4", "qscheme": "per_group", "group_size": 128, "ch_axis": 1, "is_dynamic": False, "symmetric": False,
    "scale_type": "float", "round_method": "half_even", "observer_cls": "PerGroupMinMaxObserver",
}  # fmt: skip
FP4 = {
    "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "is_dynamic": True, "scale_format": "e8m0",
    "scale_calculation_mode": "even", "observer_cls": "PerBlockMXObserver",
}  # fmt: skip
OVER = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "is_scale_quant": True}
HALF = ScaleSpec("f32", "half_range")


@pytest.mark.parametrize("slot", ["weight", "input_tensors"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_of_quark_is_ours(scheme: str, slot: str) -> None:
    """But for the dtype of plain 8-bit scales: Quark takes the model's, we keep float32."""
    model = recipe.scheme_model(scheme)
    own = model.weight if slot == "weight" else model.input
    given = SCHEMES[scheme][slot]
    if own is None or not given:
        assert own is None and not given
        return
    spec, wanted = to_spec(given, weight=slot == "weight"), native.to_spec(own)
    assert _wide(spec) == wanted


def _wide(spec: TensorSpec) -> TensorSpec:
    if spec.scale is None or spec.format.bits < 8 or SCALE_FORMATS[spec.scale.dtype].bits != 16:
        return spec
    return replace(spec, scale=replace(spec.scale, dtype="f32"))


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (INT8, TensorSpec("int8", PerTensor(), HALF)),
        ({**INT8, "scale_type": "float"}, TensorSpec("int8", PerTensor(), replace(HALF, dtype="model"))),
        ({**INT8, "scale_type": "bfloat16"}, TensorSpec("int8", PerTensor(), replace(HALF, dtype="bf16"))),
        ({**INT8, "scale_type": "float16"}, TensorSpec("int8", PerTensor(), replace(HALF, dtype="f16"))),
        ({**INT8, "scale_type": "pof2"}, TensorSpec("int8", PerTensor(), replace(HALF, dtype="pow2"))),
        ({**INT8, "scale_type": "power_of_2"}, TensorSpec("int8", PerTensor(), replace(HALF, dtype="pow2"))),
        ({**INT8, "scale_type": "float", "observer_cls": "PerTensorPowOf2MinMaxObserver"},
         TensorSpec("int8", PerTensor(), replace(HALF, dtype="pow2"))),
        ({**INT8, "round_method": "floor"}, TensorSpec("int8", PerTensor(), HALF, rounding="floor")),
        ({**INT8, "round_method": 2}, TensorSpec("int8", PerTensor(), HALF, rounding="round")),
        ({**INT8, "round_method": 8}, TensorSpec("int8", PerTensor(), HALF)),
        ({**INT8, "observer_cls": "PlaceholderObserver"}, TensorSpec("int8", PerTensor(), HALF)),
        ({**INT8, "observer_cls": None}, TensorSpec("int8", PerTensor(), HALF)),
        ({**INT8, "dtype": "Dtype.int8", "qscheme": "QSchemeType.per_tensor", "round_method": "RoundType.half_even",
          "scale_type": "ScaleType.float32"}, TensorSpec("int8", PerTensor(), HALF)),
        ({**INT8, "qscheme": "per_channel", "ch_axis": 0, "observer_cls": "PerChannelMinMaxObserver"},
         TensorSpec("int8", PerChannel(0), HALF)),
        (UINT4, TensorSpec("uint4", PerGroup(128), ScaleSpec("model", "half_range"), "int")),
        ({**UINT4, "zero_point_type": "float32"},
         TensorSpec("uint4", PerGroup(128), ScaleSpec("model", "half_range"), "float")),
        ({**FP8, "qscheme": "per_block", "block_size": [128, 64], "observer_cls": "PerBlock2DMinMaxObserver"},
         TensorSpec("fp8_e4m3", PerTile(128, 64), ScaleSpec("model"))),
        ({**FP8, "dtype": "fp8_e5m2", "scale_type": "float32"}, TensorSpec("fp8_e5m2", PerTensor(), ScaleSpec("f32"))),
        ({**FP4, "is_dynamic": False, "scale_calculation_mode": "ceil"},
         TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "ceil"))),
        ({"dtype": "mx", "mx_element_dtype": "fp6_e2m3", "ch_axis": -1, "group_size": 32},
         TensorSpec("fp6_e2m3", PerGroup(32), ScaleSpec("e8m0", "even"))),
        ({"dtype": "mx", "mx_element_dtype": "int8", "scale_calculation_mode": "floor"},
         TensorSpec("mxint8", PerGroup(32), ScaleSpec("e8m0", "floor"))),
        ({"dtype": "mx6", "ch_axis": 1, "group_size": 16}, TensorSpec("mx6", PerGroup(16), ScaleSpec("e8m0", "floor"))),
        ({"dtype": "bfp16", "ch_axis": 1, "group_size": 8}, TensorSpec("bfp16", PerGroup(8), ScaleSpec("e8m0", "fit"))),
        ({"dtype": "bfloat16", "observer_cls": "PlaceholderObserver"}, TensorSpec("bf16", PerTensor(), None)),
        ({"dtype": "float16"}, TensorSpec("fp16", PerTensor(), None)),
        ({"dtype": "int8", "dynamic": False, "axis": None, "qscheme": "per_tensor", "symmetric": True,
          "scale_type": "float32", "round_method": "half_even"}, TensorSpec("int8", PerTensor(), HALF)),
        ({"dtype": "int4", "tensor_spec": {"element": "int4", "narrow": True}},
         TensorSpec("int4", PerTensor(), ScaleSpec("model", "half_range"), narrow=True)),
    ],
)  # fmt: skip
def test_weights(specs: Any, expected: TensorSpec) -> None:
    assert to_spec(specs, weight=True) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PerTensorPercentileObserver", ObserverSpec("percentile", (("percentile", 99.99999999),))),
        ("PerTensorHistogramObserver", ObserverSpec("histogram")),
        ("PerTensorHistogramObserverPro", ObserverSpec("histogram")),
        ("PerTensorMSEObserver", ObserverSpec("mse", (("steps", 40.0), ("shrink", 0.4)))),
    ],
)
def test_observers_of_activations(name: str, expected: ObserverSpec) -> None:
    spec = to_spec({**INT8, "observer_cls": name}, weight=False)
    assert spec == TensorSpec("int8", PerTensor(), HALF, observer=expected)


def test_activations() -> None:
    token = {
        **FP8,
        "qscheme": "per_channel",
        "ch_axis": 1,
        "is_dynamic": True,
        "observer_cls": "PerChannelMinMaxObserver",
    }
    assert to_spec(token, weight=False) == TensorSpec("fp8_e4m3", PerToken(), ScaleSpec("model", when="dynamic"))
    assert to_spec(FP4, weight=False) == TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even", "dynamic"))
    # What needs no calibration leaves is_dynamic open.
    assert to_spec({"dtype": "mx9", "group_size": 16}, weight=False).scale == ScaleSpec("e8m0", "floor", "dynamic")


def test_lists() -> None:
    """A scale over the scales, and a second quantization whose codes are stored."""
    group = {**FP4, "group_size": 16, "scale_format": "float32"}
    over = ScaleSpec("f32", "absmax", "static")
    assert to_spec([group, OVER], weight=False).scale == ScaleSpec("e4m3", "absmax", "dynamic", over)
    e5m3 = {**OVER, "dtype": "fp8_e5m3"}
    assert to_spec([{**group, "is_dynamic": False}, e5m3], weight=True).scale == ScaleSpec("e5m3", global_scale=over)
    int4 = {**INT8, "dtype": "int4", "qscheme": "per_channel", "ch_axis": 0, "observer_cls": "PerChannelMinMaxObserver"}
    spec = to_spec([{**FP8, "scale_type": "float32"}, int4], weight=True)
    assert (spec.stored, spec.codes.element, spec.element) == ("last", "int4", "fp8_e4m3")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"dtype": None, "qscheme": "per_tensor"}, "a SPEC has no 'dtype'"),
        ({**INT8, "dtype": "int16"}, "dtype 'int16' is not supported"),
        ({**INT8, "dtype": "fp8_e4m4"}, "dtype 'fp8_e4m4' is not supported; did you mean 'fp8_e"),
        ({**INT8, "dtype": "mxint8"}, "dtype 'mxint8' is not supported"),
        ({**INT8, "symetric": True}, "unknown key 'symetric' in a SPEC; did you mean 'symmetric'?"),
        ({**INT8, "symmetric": "yes"}, "symmetric must be true, false or null"),
        ({**INT8, "qat_spec": {"threshold": 1}}, "'qat_spec' is not supported: scales are learned only in training"),
        ({**INT8, "observer_cls": "LSQObserver"}, "'LSQObserver' is not supported"),
        ({**INT8, "observer_cls": "TQTObserver"}, "'TQTObserver' is not supported"),
        ({**FP4, "observer_cls": "PerBlockMXDiffsObserver", "is_dynamic": False}, "'PerBlockMXDiffsObserver' is not"),
        ({**INT8, "observer_cls": "PerTensorMinMaxObserve"}, "did you mean 'PerTensorMinMaxObserver'?"),
        ({**INT8, "observer_cls": "PerChannelMinMaxObserver"}, "does not fit qscheme per_tensor"),
        ({**INT8, "qscheme": "per_channel", "ch_axis": 0}, "PerTensorMinMaxObserver does not fit qscheme per_channel"),
        ({**INT8, "qscheme": "per_tenser"}, "qscheme 'per_tenser' is unknown; did you mean 'per_tensor'?"),
        ({**INT8, "qscheme": None}, "a SPEC has no 'qscheme'"),
        ({**INT8, "group_size": 32}, "group_size contradicts qscheme per_tensor"),
        ({**INT8, "block_size": [1, 2]}, "block_size contradicts qscheme per_tensor"),
        ({**INT8, "ch_axis": "last"}, "ch_axis must be a whole number"),
        ({**UINT4, "group_size": None}, "group_size must be a positive whole number"),
        ({**UINT4, "group_size": -1}, "group_size must be a positive whole number"),
        ({**UINT4, "ch_axis": 0}, "groups must be along the last axis, not along"),
        ({**UINT4, "zero_point_type": "int8"}, "zero_point_type 'int8' is unknown"),
        ({**UINT4, "symmetric": True}, "cannot hold negative values"),
        ({**FP8, "symmetric": False}, "zero_point 'int' works only for unsigned integers"),
        ({**FP8, "qscheme": "per_block", "block_size": [128], "observer_cls": None}, "block_size must be two"),
        ({**INT8, "is_dynamic": True}, "a weight cannot be dynamic"),
        ({**INT8, "round_method": "up"}, "round_method 'up' is unknown"),
        ({**INT8, "scale_type": "float8"}, "scale_type 'float8' is unknown"),
        ({**INT8, "observer_cls": "PerTensorPowOf2MinMaxObserver"}, "scale_type float32 contradicts"),
        ({**INT8, "mx_element_dtype": "fp4"}, "mx_element_dtype works only with dtype mx"),
        ({**FP4, "scale_format": "e4m3", "is_dynamic": False}, "needs a second SPEC with is_scale_quant"),
        ({**FP4, "scale_calculation_mode": "rceil", "is_dynamic": False}, "scale_calculation_mode 'rceil' is unknown"),
        ({"dtype": "mx"}, "dtype mx needs mx_element_dtype"),
        ({"dtype": "mx", "mx_element_dtype": "int4"}, "mx_element_dtype 'int4' is unknown"),
        ({"dtype": "float16", "qscheme": "per_tensor"}, "'qscheme' contradicts dtype float16"),
        ({"dtype": "float16", "observer_cls": "PerTensorMinMaxObserver"}, "has no range to observe"),
        ({"dtype": "int8", "dynamic": False, "is_dynamic": False}, "is the old name of 'is_dynamic'"),
        ([OVER], "is_scale_quant needs a spec before it"),
        ([{**FP4, "is_dynamic": False}, OVER, OVER], "is_scale_quant needs a spec before it"),
        ([{**FP4, "is_dynamic": False}, {**OVER, "qscheme": "per_channel"}], "one per tensor"),
        ([{**FP4, "is_dynamic": False}, {**OVER, "dtype": "int8"}], "dtype 'int8' is unknown"),
        ([{"dtype": "mx6"}, OVER], "the exponents of mx6"),
    ],
)  # fmt: skip
def test_refusals(specs: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_spec(specs, weight=True)
    assert message in f"{caught.value.what}; {caught.value.hint}"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({**UINT4, "dtype": "int4", "symmetric": True}, "an activation in groups cannot be static"),
        ({**FP8, "is_dynamic": None}, "'is_dynamic' is missing beside dtype fp8_e4m3"),
    ],
)
def test_refusals_of_activations(specs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_spec(specs, weight=False)
