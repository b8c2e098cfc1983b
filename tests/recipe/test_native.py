"""The native words of a cfg, and patterns."""

from __future__ import annotations

import pytest

from quarkcli.errors import ConfigError
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes import native
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.load import parse
from quarkcli.recipe.match import matches
from quarkcli.spec import (
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)


def spec(text: str) -> TensorSpec:
    return native.to_spec(parse(text, "f").data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("element: int4", TensorSpec("int4", PerTensor(), ScaleSpec("model", "half_range"))),
        ("element: int8", TensorSpec("int8", PerTensor(), ScaleSpec("f32", "half_range"))),
        ("element: fp8_e4m3", TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", "absmax"))),
        ("{element: int8, granularity: channel}", TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "half_range"))),
        ("{element: fp8_e4m3, granularity: {channel: 0}}", TensorSpec("fp8_e4m3", PerChannel(0), ScaleSpec("f32"))),
        (
            "{element: fp4_e2m1, granularity: {group: 32}, scale: {dtype: e8m0}}",
            TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even")),
        ),
        (
            "{element: fp8_e4m3, granularity: {tile: [128, 64]}}",
            TensorSpec("fp8_e4m3", PerTile(128, 64), ScaleSpec("f32")),
        ),
        (
            "{element: fp8_e4m3, granularity: token, scale: {when: dynamic}}",
            TensorSpec("fp8_e4m3", PerToken(), ScaleSpec("f32", "absmax", "dynamic")),
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, global_scale: {dtype: f32}}}",
            TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=ScaleSpec("f32"))),
        ),
        (
            "{element: fp8_e4m3, scale: {constant_amax: 448}}",
            TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", constant_amax=448.0)),
        ),
        (
            "{element: fp8_e4m3, scale: {minimum: 0.25, dtype: bf16}}",
            TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("bf16", minimum=0.25)),
        ),
        ("{element: fp8_e4m3, granularity: {channel: 1}}", TensorSpec("fp8_e4m3", PerChannel(1), ScaleSpec("f32"))),
        ("{element: fp8_e4m3, granularity: {channel: -1}}", TensorSpec("fp8_e4m3", PerChannel(1), ScaleSpec("f32"))),
        ("{element: int8, scale: {dtype: pow2}}", TensorSpec("int8", PerTensor(), ScaleSpec("pow2", "half_range"))),
        ("element: fp16", TensorSpec("fp16", PerTensor(), None)),
        (
            "{element: uint4, granularity: {group: 64}, zero_point: int}",
            TensorSpec("uint4", PerGroup(64), ScaleSpec("model", "half_range"), "int"),
        ),
        (
            "{element: uint8, granularity: channel, zero_point: float}",
            TensorSpec("uint8", PerChannel(0), ScaleSpec("f32", "half_range"), "float"),
        ),
        (
            "{element: int4, rounding: floor, narrow: true}",
            TensorSpec("int4", PerTensor(), ScaleSpec("model", "half_range"), rounding="floor", narrow=True),
        ),
        (
            "{element: int4, rounding: round}",
            TensorSpec("int4", PerTensor(), ScaleSpec("model", "half_range"), rounding="round"),
        ),
        ("{element: mx6, granularity: {group: 16}}", TensorSpec("mx6", PerGroup(16), ScaleSpec("e8m0", "floor"))),
        ("{element: mx9, granularity: {group: 32}}", TensorSpec("mx9", PerGroup(32), ScaleSpec("e8m0", "floor"))),
        ("{element: bfp16, granularity: {group: 8}}", TensorSpec("bfp16", PerGroup(8), ScaleSpec("e8m0", "fit"))),
        ("{element: mxint8, granularity: {group: 32}}", TensorSpec("mxint8", PerGroup(32), ScaleSpec("e8m0", "even"))),
        ("{element: mx, mx_element: fp6_e2m3}", TensorSpec("fp6_e2m3", PerGroup(32), ScaleSpec("e8m0", "even"))),
        ("{element: mx, mx_element: int8}", TensorSpec("mxint8", PerGroup(32), ScaleSpec("e8m0", "even"))),
        (
            "{element: mx, mx_element: fp8_e5m2, granularity: {group: 16}, scale: {rule: ceil, when: dynamic}}",
            TensorSpec("fp8_e5m2", PerGroup(16), ScaleSpec("e8m0", "ceil", "dynamic")),
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e5m3}}",
            TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e5m3")),
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, "
            "scale: {dtype: e4m3, rule: sweep, global_scale: {dtype: f32}}}",
            TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "sweep", global_scale=ScaleSpec("f32"))),
        ),
        (
            "{element: int8, observer: percentile}",
            TensorSpec(
                "int8", PerTensor(), ScaleSpec("f32", "half_range"),
                observer=ObserverSpec("percentile", (("percentile", 99.99),)),
            ),
        ),
        (
            "{element: int8, observer: {name: mse, steps: 10}}",
            TensorSpec(
                "int8", PerTensor(), ScaleSpec("f32", "half_range"),
                observer=ObserverSpec("mse", (("steps", 10.0), ("shrink", 0.4))),
            ),
        ),
        (
            "{element: fp8_e4m3, then: {element: int4, granularity: channel}, stored: last}",
            TensorSpec(
                "fp8_e4m3", PerTensor(), ScaleSpec("f32"),
                then=TensorSpec("int4", PerChannel(0), ScaleSpec("model", "half_range")), stored="last",
            ),
        ),
        (
            "{element: int4, granularity: {group: 128}, then: {element: fp8_e4m3}}",
            TensorSpec(
                "int4", PerGroup(128), ScaleSpec("model", "half_range"),
                then=TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32")),
            ),
        ),
    ],
)  # fmt: skip
def test_words(text: str, expected: TensorSpec) -> None:
    assert spec(text) == expected
    assert native.to_spec(spec_to_yaml(expected)) == expected  # what is written out says the same


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{}", "no 'element'"),
        ("element: fp4", "element 'fp4' is unknown"),
        ("{element: int4, granularity: rows}", "granularity 'rows' is unknown"),
        ("{element: int4, granularity: {group: 0}}", "must be a positive whole number, not 0"),
        ("{element: int4, granularity: {group: 1e2}}", "must be a positive whole number, not 100.0"),
        ("{element: int4, granularity: {group: true}}", "must be a positive whole number, not True"),
        ("{element: int4, granularity: {channel: 2}}", "is unknown"),
        ("{element: int4, granularity: {tile: [1]}}", "is unknown"),
        ("{element: int4, scale: {rul: absmax}}", "unknown key 'rul' in scale"),
        ("{element: int4, scale: 5}", "scale must be a mapping"),
        ("{element: int4, scale: {dtype: f64}}", "scale.dtype 'f64' is unknown"),
        ("{element: int4, scale: {rule: even}}", "does not fit scale.dtype"),
        ("{element: fp4_e2m1, granularity: {group: 32}, scale: {dtype: e8m0, rule: absmax}}", "does not fit"),
        ("{element: fp8_e4m3, scale: {rule: half_range}}", "scale.rule 'half_range' works only for integers"),
        ("{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3}}", "needs a global scale"),
        ("{element: fp4_e2m1, scale: {dtype: e8m0}}", "scales work only for groups"),
        ("{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, over: {}}}", "unknown key 'over'"),
        (
            "{element: int4, scale: {global_scale: {dtype: f32}}}",
            "a global scale works only over e4m3 or e5m3 scales, not over",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, global_scale: {dtype: f16}}}",
            "one f32 scale",
        ),
        ("{element: fp8_e4m3, granularity: token}", "cannot be static"),
        ("{element: fp8_e4m3, scale: {constant_amax: 0}}", "must be a positive number"),
        ("{element: int4, granularity: {channel: true}}", "is unknown"),
        ("{element: int8, scale: {minimum: -1}}", "scale.minimum must be a positive number"),
        ("{element: int8, scale: {minimum: .inf}}", "scale.minimum must be a positive number"),
        ("{element: int8, scale: {dtype: pow2, minimum: 0.5}}", "does not work with pow2"),
        ("{element: fp16, granularity: channel}", "unknown key 'granularity' in a cfg of fp16 (which has no scale)"),
        ("{element: mx}", "mx_element None is unknown"),
        ("{element: mx, mx_element: int4}", "mx_element 'int4' is unknown"),
        ("{element: mx, mx_element: fp16}", "mx_element 'fp16' is unknown"),
        ("{element: mx, mx_element: int8, narrow: true}", "unknown key 'narrow' in a cfg of mx"),
        ("{element: mx, mx_element: int8, scale: {dtype: f32}}", "has a shared exponent as its scale"),
        ("{element: mx, mx_element: fp4_e2m1, granularity: tensor}", "e8m0 scales work only for groups"),
        ("{element: int4, zero_point: true}", "zero_point 'True' is unknown"),
        ("{element: int4, rounding: up}", "rounding 'up' is unknown"),
        ("{element: int4, narrow: 1}", "narrow must be true or false"),
        ("{element: int4, stored: last}", "'stored' works only in a chain (two quantizations, one after the other)"),
        ("{element: int4, then: {element: int4}, stored: both}", "stored 'both' is unknown"),
        ("{element: int4, then: 5}", "cfg must be a mapping"),
        ("{element: int8, observer: 5}", "observer must be a name"),
        ("{element: int8, observer: {percentile: 99}}", "observer must be a name"),
        ("{element: int8, observer: msee}", "observer 'msee' is unknown"),
        ("{element: int8, observer: {name: mse, percentile: 99}}", "unknown key 'percentile' in observer mse"),
        ("{element: int8, observer: {name: percentile, percentile: 20}}", "between 50 and 100"),
        (
            "{element: int8, observer: {name: mse, steps: 5000}}",
            "steps must be a whole number from 1 to 1000, not 5000",
        ),
        (
            "{element: int8, observer: {name: headroom, anchor: 99.999}}",
            "observer.anchor (99.999) must not be above obs",
        ),
        ("{element: int8, observer: {name: mse, shrink: 1}}", "shrink must lie between 0 and 1"),
        ("{element: int8, observer: {name: mse, steps: 2.5}}", "steps must be a whole number from 1 to 1000"),
        ("{element: int8, observer: headroom}", "observer 'headroom' works only for inputs in nvfp4"),
        ("{element: int8, observer: {name: headroom, rho: 28672}}", "observer.rho must be less than 28672"),
        ("{element: int8, observer: {name: headroom, anchor: 101}}", "observer.anchor must be a percentage, not 101"),
        ("{element: mx6}", "e8m0 scales work only for groups"),
        ("{element: mx9, granularity: {group: 15}}", "needs groups of an even size"),
        ("{element: mx6, granularity: {tile: [16, 16]}}", "needs groups of an even size"),
        ("{element: int4, granularity: {group: 32}, scale: {dtype: e8m0}}", "no e8m0 scale is defined for int4"),
        (
            "{element: bfp16, granularity: {group: 8}, scale: {dtype: f32, rule: absmax}}",
            "has a shared exponent as its scale",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 32}, scale: {dtype: e8m0, rule: fit}}",
            "'fit' works only for integers",
        ),
        ("{element: fp8_e4m3, scale: {rule: sweep}}", "works only for static e4m3 scales of fp4_e2m1"),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e5m3, rule: sweep}}",
            "works only for static e4m3 scales of fp4_e2m1",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, rule: sweep, when: dynamic}}",
            "works only for static e4m3 scales of fp4_e2m1",
        ),
        (
            "{element: fp4_e2m1, granularity: {tile: [16, 16]}, "
            "scale: {dtype: e4m3, rule: sweep, global_scale: {dtype: f32}}}",
            "'sweep' works only for groups",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, observer: mse, "
            "scale: {dtype: e4m3, rule: four_over_six, global_scale: {dtype: f32}}}",
            "searches the scale itself, without an observer",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, "
            "scale: {dtype: e4m3, global_scale: {dtype: f32, global_scale: {dtype: f32}}}}",
            "scale.global_scale must be one f32 scale",
        ),
        ("{element: fp4_e2m1, scale: {dtype: e5m3}}", "e5m3 scales work only for groups"),
        ("{element: uint4}", "cannot hold negative values"),
        ("{element: fp8_e4m3, zero_point: int}", "works only for unsigned integers"),
        ("{element: mxint8, granularity: {group: 32}, zero_point: int}", "works only for unsigned integers"),
        ("{element: int8, zero_point: int, narrow: true}", "works only for unsigned integers"),
        ("{element: uint8, zero_point: int, scale: {constant_amax: 1}}", "gives no range for a zero point"),
        (
            "{element: uint4, granularity: {group: 16}, zero_point: int, "
            "scale: {dtype: e4m3, global_scale: {dtype: f32}}}",
            "a zero point does not work with e4m3 scales",
        ),
        ("{element: fp8_e4m3, rounding: floor}", "rounding 'floor' works only for integers"),
        ("{element: mx6, granularity: {group: 16}, rounding: round}", "rounding 'round' works only for integers"),
        ("{element: fp8_e4m3, narrow: true}", "narrow works only for signed integers"),
        ("{element: uint8, narrow: true, zero_point: float}", "works only for unsigned integers"),
        ("{element: int4, then: {element: int4, then: {element: int4}}}", "a chain has two stages"),
        ("{element: int4, then: {element: bf16}}", "the second stage bf16 has no scale"),
        ("{element: int4, then: {element: mx6, granularity: {group: 16}}}", "mx6 and mx9 cannot be part of a chain"),
        (
            "{element: int4, granularity: {group: 32}, then: {element: fp8_e4m3}, stored: last}",
            "one scale per tensor or output channel",
        ),
        (
            "{element: fp8_e4m3, granularity: {channel: 1}, then: {element: int4}, stored: last}",
            "one scale per tensor or output channel",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, "
            "scale: {dtype: e4m3, constant_amax: 3, global_scale: {dtype: f32}}}",
            "scale.constant_amax does not work under a global scale",
        ),
        ("{element: fp8_e4m3, scale: {constant_amax: true}}", "must be a positive number"),
    ],
)
def test_wrong_words(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(text)
    assert what in caught.value.what


@pytest.mark.parametrize("kind", ["schemes", "kv_cache", "attention"])
def test_built_in_files_resolve(kind: str) -> None:
    for path in catalog.files(kind).values():
        data = catalog.document(path).data
        assert data["summary"]
        slots = [value for value in data.values() if isinstance(value, dict) and "element" in value]
        assert slots
        for slot in slots:
            assert native.to_spec(spec_to_yaml(native.to_spec(slot))) == native.to_spec(slot)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*q_proj", "a.q_proj", True),
        ("q_proj", "a.q_proj", False),
        ("*.layers.?.mlp.*", "model.layers.3.mlp.up", True),
        ("*.layers.?.mlp.*", "model.layers.13.mlp.up", False),
        ("*.layers.[0-2].*", "model.layers.2.x", True),
        ("*.layers.[!0-2].*", "model.layers.2.x", False),
        ("re:.*layers\\.(1|13)\\..*", "model.layers.13.x", True),
        ("re:layers", "model.layers.13.x", False),  # the whole name
        ("A", "a", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, [name]) is expected
    assert matches(pattern, ["other", name]) is expected


def test_a_bad_expression() -> None:
    with pytest.raises(ConfigError, match="'re:\\(' is not a regular expression"):
        matches("re:(", ["a"])


def test_a_word_of_before_is_refused_with_todays() -> None:
    cfg = {"element": "fp4_e2m1", "granularity": {"group": 16}, "scale": {"dtype": "e4m3", "over": {"dtype": "f32"}}}
    with pytest.raises(ConfigError) as caught:
        native.to_spec(cfg)
    assert caught.value.hint == "did you mean 'global_scale'?"
