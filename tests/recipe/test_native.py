"""The native words of a cfg, and patterns."""

from __future__ import annotations

import pytest

from quarkcli.errors import ConfigError
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes import native
from quarkcli.recipe.load import parse
from quarkcli.recipe.match import matches, suggestions
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, PerToken, ScaleSpec, TensorSpec, spec_to_yaml


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
            "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, over: {dtype: f32}}}",
            TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", over=ScaleSpec("f32"))),
        ),
        (
            "{element: fp8_e4m3, scale: {constant_amax: 448}}",
            TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", constant_amax=448.0)),
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
        ("{element: int4, granularity: {channel: 1}}", "is unknown"),
        ("{element: int4, granularity: {tile: [1]}}", "is unknown"),
        ("{element: int4, scale: {rul: absmax}}", "unknown key 'rul' in scale"),
        ("{element: int4, scale: 5}", "scale must be a mapping"),
        ("{element: int4, scale: {dtype: f64}}", "scale.dtype 'f64' is unknown"),
        ("{element: int4, scale: {rule: even}}", "does not fit scale.dtype"),
        ("{element: fp4_e2m1, granularity: {group: 32}, scale: {dtype: e8m0, rule: absmax}}", "does not fit"),
        ("{element: fp8_e4m3, scale: {rule: half_range}}", "is for integers"),
        ("{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3}}", "needs a global scale"),
        ("{element: fp4_e2m1, scale: {dtype: e8m0}}", "belong to groups"),
        ("{element: int4, scale: {over: {dtype: f32}}}", "goes over e4m3 scales"),
        ("{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, over: {dtype: f16}}}", "one f32 scale"),
        ("{element: fp8_e4m3, granularity: token}", "cannot be static"),
        ("{element: fp8_e4m3, scale: {constant_amax: 0}}", "must be a positive number"),
        ("{element: fp8_e4m3, scale: {constant_amax: true}}", "must be a positive number"),
    ],
)
def test_wrong_words(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(text)
    assert what in caught.value.what


@pytest.mark.parametrize("kind", ["schemes", "kv_cache"])
def test_built_in_files_resolve(kind: str) -> None:
    for path in catalog.files(kind).values():
        data = catalog.document(path).data
        assert data["summary"]
        slots = [value for key, value in data.items() if key in ("weight", "input", "k", "v")]
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


def test_suggestions_fold_indices() -> None:
    names = [f"model.layers.{layer}.mlp.{leaf}" for layer in range(30) for leaf in ("up_proj", "down_proj")]
    assert suggestions("*dwn_proj", names)[0] == "*down_proj"
    assert suggestions("model.layers.*.mlp.up_prj", names)[0] == "model.layers.*.mlp.up_proj"
    assert suggestions("zzzzzz", names) == []
