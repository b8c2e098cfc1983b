"""Everything the quark dialect writes it reads back: every built-in scheme, every spec that a recipe can ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import yaml

from quarkcli import dialects
from quarkcli.errors import ConfigError
from quarkcli.numerics.quantize import QParams, Quantized, dequantize, quantize, static_scale
from quarkcli.plan.model import Decision, Plan, Target
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes import native
from quarkcli.spec import ELEMENTS, SCALE_FORMATS, PerTile, TensorSpec

from .plans import FP8, NVFP4_INPUT, Module, Pair, attention, linears, llama, plan
from .test_roundtrip import TEXTS, bits, headers

QUARK = dialects.writer("quark")


def scheme(name: str) -> Pair:
    """(weight, input) of a built-in scheme."""
    found = yaml.safe_load(catalog.files("schemes")[name].read_text())
    return native.to_spec(found["weight"]), native.to_spec(found["input"]) if "input" in found else None


SCHEMES = {name: scheme(name) for name in catalog.files("schemes")}


def awkward(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers with a zero row, an outlier, a tiny row, negative zeros and a row of one sign."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.02
    weight[0, :16] = -0.0
    weight[-1] = weight[-1].abs()
    if shape[0] > 3:
        weight[1] = 0.0
        weight[2] *= 1e-30
        weight[3, shape[1] // 2] = 300.0
    return weight.to(dtype)


def written(made: Plan) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Quantized], dict[str, Quantized]]:
    """(config after JSON, tensors, weights by module, biases by module) of a plan that is held."""
    assert QUARK.refusals(made) == []
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, Quantized] = {}
    biases: dict[str, Quantized] = {}
    for target in made.quantized():
        assert target.weight is not None
        weights[target.name] = quantize(awkward(target.shape), target.weight)
        if target.bias_spec is not None:
            biases[target.name] = quantize(awkward((1, target.shape[0])), target.bias_spec)
        own = QUARK.tensors(target, weights[target.name], statics(target), biases.get(target.name))
        infos = [(info.name, info.dtype, info.shape) for info in QUARK.infos(target)]
        assert infos == [(name, TEXTS[tensor.dtype], tuple(tensor.shape)) for name, tensor in own.items()]
        assert all(tensor.is_contiguous() for tensor in own.values())
        tensors |= own
    for module in made.attention.values():
        own = QUARK.attention_tensors(module, {kind: torch.tensor(0.5 + ord(kind)) for kind in "qkvp"})
        infos = [(info.name, info.dtype, info.shape) for info in QUARK.attention_infos(module)]
        assert infos == [(name, TEXTS[tensor.dtype], tuple(tensor.shape)) for name, tensor in own.items()]
        tensors |= own
    return json.loads(json.dumps(QUARK.config(made))), tensors, weights, biases


def statics(target: Target) -> dict[str, torch.Tensor]:
    """Scales of the static activations of a target, all different."""
    specs = {"input": target.input, "output": target.output}
    return {
        slot: static_scale(torch.tensor(3.25 + index), spec)
        for index, (slot, spec) in enumerate(specs.items())
        if spec is not None and spec.is_static
    }


def comes_back(made: Plan) -> dict[str, Any]:
    """Write and read a plan; assert that nothing was lost. Returns the config."""
    config, tensors, weights, biases = written(made)
    view = QUARK.reader.view(config, headers(tensors))
    assert sorted(view.targets) == sorted(target.name for target in made.quantized())
    for target in made.quantized():
        stored = view.targets[target.name]
        assert (stored.weight, stored.input) == (target.weight, target.input)
        assert (stored.output, stored.bias, stored.shape) == (target.output, target.bias_spec, target.shape)
        decoded = QUARK.reader.decode(stored, tensors)
        same(decoded.weight, weights[target.name], stored.weight)
        assert (decoded.bias is None) == (stored.bias is None)
        if decoded.bias is not None and stored.bias is not None:
            same(decoded.bias, biases[target.name], stored.bias)
        found = {slot: getattr(decoded, slot) for slot in ("input", "output")}
        assert {slot: value for slot, value in found.items() if value is not None} == statics(target)
    assert {name for stored in view.targets.values() for name in stored.tensors} | {
        name for stored in view.attention.values() for name in stored.scales.values()
    } == set(tensors)
    return config


def same(found: Quantized, wanted: Quantized, spec: TensorSpec) -> None:
    """Bit for bit: codes, scales, zero points, shift bits; and so the values."""
    assert (found.codes.dtype, found.codes.shape) == (wanted.codes.dtype, wanted.codes.shape)
    assert torch.equal(bits(found.codes), bits(wanted.codes))
    same_params(found.params, wanted.params)
    assert torch.equal(dequantize(found, spec), dequantize(wanted, spec))


def same_params(found: QParams, wanted: QParams) -> None:
    for name in ("scale", "global_scale", "zero_point", "shift"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert torch.equal(bits(one), bits(other)), name
    assert (found.then is None) == (wanted.then is None)
    if found.then is not None and wanted.then is not None:
        same_params(found.then, wanted.then)


def one(shape: tuple[int, int], pair: Pair) -> Plan:
    return plan([Module("model.layers.0.mlp.up_proj", shape, "up")], linears(pair))


@pytest.mark.parametrize("shape", [(24, 384), (17, 256), (1, 128)])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_built_in_scheme_comes_back(name: str, shape: tuple[int, int]) -> None:
    made = one(shape, SCHEMES[name])
    if not QUARK.refusals(made):
        config = comes_back(made)
        # Quark's own words say everything but the rule of mxfp8's exponents.
        assert ("tensor_spec" in json.dumps(config)) == (name == "mxfp8")
        return
    # Only codes that several rows share a word for, and their zero points, need rows in eights or fours.
    element = SCHEMES[name][0].codes.element
    assert shape[0] % 8 and element in ("int4", "uint4", "int2")


@pytest.mark.parametrize("name", SCHEMES)
def test_every_built_in_scheme_comes_back_from_a_model(name: str) -> None:
    config = comes_back(plan(llama(layers=1, hidden=128, mlp=256, kv=64), linears(SCHEMES[name]), kv=FP8))
    assert ("tensor_spec" in json.dumps(config)) == (name == "mxfp8")


def every_spec() -> list[dict[str, Any]]:
    """A cfg of every combination of element, granularity, scale format and zero point that a recipe may ask for."""
    granularities = ["tensor", {"channel": 0}, {"channel": 1}, {"group": 16}, {"group": 32}, {"tile": [8, 16]}]
    scales: list[dict[str, Any]] = [{"dtype": dtype} for dtype in SCALE_FORMATS if dtype != "e4m3"]
    scales += [{"dtype": dtype, "global_scale": {"dtype": "f32"}} for dtype in ("e4m3", "e5m3")]
    found = []
    for element, granularity, scale, zero in product(ELEMENTS, granularities, scales, ("none", "int", "float")):
        cfg = {"element": element, "granularity": granularity, "scale": scale, "zero_point": zero}
        try:
            spec = native.to_spec(cfg)
        except ConfigError:
            continue
        # The shift bits of mx6 and mx9 belong to groups along a row.
        if not (spec.format.sub_block and isinstance(spec.granularity, PerTile)):
            found.append(cfg)
    return found


@pytest.mark.parametrize("element", [name for name, row in ELEMENTS.items() if row.kind != "cast"])
def test_every_spec_comes_back(element: str) -> None:
    cfgs = [cfg for cfg in every_spec() if cfg["element"] == element]
    assert len(cfgs) >= 2
    for cfg in cfgs:
        comes_back(one((24, 96), (native.to_spec(cfg), None)))


OTHERS: dict[str, dict[str, Any]] = {
    "narrow": {"element": "int8", "granularity": "channel", "narrow": True},
    "floor": {"element": "int4", "granularity": {"group": 32}, "rounding": "floor"},
    "round": {"element": "uint8", "granularity": "tensor", "zero_point": "int", "rounding": "round"},
    "absmax": {"element": "int8", "granularity": "channel", "scale": {"rule": "absmax"}},
    "rceil": {"element": "fp4_e2m1", "granularity": {"group": 32}, "scale": {"dtype": "e8m0", "rule": "rceil"}},
    "ceil": {"element": "fp6_e2m3", "granularity": {"group": 32}, "scale": {"dtype": "e8m0", "rule": "ceil"}},
    "sweep": {
        "element": "fp4_e2m1", "granularity": {"group": 16},
        "scale": {"dtype": "e4m3", "rule": "sweep", "global_scale": {"dtype": "f32"}},
    },
    "minimum": {"element": "fp8_e4m3", "scale": {"minimum": 0.25}},
    "mse": {"element": "int8", "granularity": "tensor", "observer": "mse"},
    "percentile": {"element": "int8", "granularity": "tensor", "observer": {"name": "percentile", "percentile": 99.0}},
    "mx6-32": {"element": "mx6", "granularity": {"group": 32}},
    "mx": {"element": "mx", "mx_element": "fp6_e3m2"},
    "chain": {
        "element": "int4", "granularity": {"group": 32}, "stored": "first",
        "then": {"element": "fp8_e4m3", "granularity": "tensor"},
    },
    "chain-last": {
        "element": "fp8_e4m3", "granularity": {"channel": 0}, "stored": "last",
        "then": {"element": "uint4", "granularity": {"group": 32}, "zero_point": "int"},
    },
    "two-level-chain": {
        "element": "fp4_e2m1", "granularity": {"group": 16}, "stored": "first",
        "scale": {"dtype": "e4m3", "global_scale": {"dtype": "f32"}},
        "then": {"element": "int8", "granularity": {"channel": 0}},
    },
    "fp16": {"element": "fp16"},
    "bf16": {"element": "bf16"},
}  # fmt: skip


# What Quark's own dictionaries cannot say, of weights and of inputs; a spec of ours stands beside them.
BEYOND_ITS_WORDS = {
    "narrow", "absmax", "chain", "minimum", "percentile", "rceil", "sweep", "two-level-chain",
    "absmax token", "constant",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_quark_has_no_word_for_comes_back_too(name: str) -> None:
    spec = native.to_spec(OTHERS[name])
    for made in (one((24, 96), (spec, None)), plan(llama(layers=2), linears((spec, None)))):
        assert ("tensor_spec" in json.dumps(comes_back(made))) == (name in BEYOND_ITS_WORDS)


INPUTS: dict[str, dict[str, Any]] = {
    "absmax token": {"element": "int8", "granularity": "token", "scale": {"when": "dynamic", "rule": "absmax"}},
    "asymmetric": {"element": "uint8", "granularity": "token", "zero_point": "int", "scale": {"when": "dynamic"}},
    "int4 static": {"element": "int4", "granularity": "tensor"},
    "constant": {"element": "fp8_e4m3", "scale": {"constant_amax": 12.0}},
    "nvfp4": {
        "element": "fp4_e2m1", "granularity": {"group": 16},
        "scale": {"dtype": "e4m3", "when": "dynamic", "global_scale": {"dtype": "f32"}},
    },
    "mx9": {"element": "mx9", "granularity": {"group": 16}, "scale": {"when": "dynamic"}},
    "chain": {
        "element": "int8", "granularity": "token", "scale": {"when": "dynamic"},
        "then": {"element": "fp8_e4m3", "granularity": "tensor"},
    },
    "fp16": {"element": "fp16"},
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_outputs_and_biases_come_back(name: str) -> None:
    spec = native.to_spec(INPUTS[name])
    for made in (one((32, 64), (FP8, spec)), slotted(one((32, 64), (FP8, FP8)), output=spec)):
        assert ("tensor_spec" in json.dumps(comes_back(made))) == (name in BEYOND_ITS_WORDS)


@pytest.mark.parametrize(
    "cfg",
    [
        {"element": "int8", "granularity": "tensor"},
        {"element": "int8", "granularity": {"channel": 1}},
        {"element": "uint4", "granularity": {"group": 4}, "zero_point": "int"},
        {"element": "int3", "granularity": {"group": 8}},
        {"element": "mx6", "granularity": {"group": 16}},
        {
            "element": "fp4_e2m1",
            "granularity": {"group": 16},
            "scale": {"dtype": "e4m3", "global_scale": {"dtype": "f32"}},
        },
        {"element": "fp8_e5m2", "granularity": "tensor"},
        {"element": "bf16"},
    ],
)
def test_biases_come_back(cfg: dict[str, Any]) -> None:
    comes_back(slotted(one((32, 64), (FP8, FP8)), bias=native.to_spec(cfg)))
    some = plan(llama(layers=1), linears((FP8, FP8)))
    biased = slotted(some, bias=native.to_spec(cfg), only="q_proj")
    assert sum(target.bias_spec is not None for target in biased.quantized()) == 1
    comes_back(biased)


def slotted(made: Plan, only: str = "", **specs: TensorSpec) -> Plan:
    """The plan with more slots on, in modules whose name ends so; the others have no bias."""
    targets = {}
    for name, target in made.targets.items():
        slots = target.slots | {kind: Decision(spec, 0) for kind, spec in specs.items()}
        on = target.weight is not None and name.endswith(only)
        targets[name] = replace(target, slots=slots, bias=f"{name}.bias") if on else target
    return replace(made, targets=targets)


@pytest.mark.parametrize("kinds", ["kv", "qkv", "qkvp", "p", "q"])
@pytest.mark.parametrize("spec", [FP8, NVFP4_INPUT])
def test_attention_comes_back(kinds: str, spec: TensorSpec) -> None:
    made = plan(llama(), linears((FP8, FP8)))
    for name in made.attention:
        slots = {kind: Decision(spec if kind in kinds else None, 0) for kind in "qkvp"}
        made.attention[name] = replace(attention(name, None), slots=slots)
    config, tensors, _, _ = written(made)
    view = QUARK.reader.view(config, headers(tensors))
    assert set(view.attention) == set(made.attention)
    for stored in view.attention.values():
        assert stored.specs == dict.fromkeys(kinds, spec)
        assert QUARK.reader.decode_attention(stored, tensors) == {kind: torch.tensor(0.5 + ord(kind)) for kind in kinds}
    comes_back(made)


def test_embedding_and_head_come_back_and_no_server_is_named() -> None:
    made = plan(llama(layers=1), lambda module: (FP8, None) if module.role == "embedding" else (FP8, FP8))
    comes_back(made)
    assert QUARK.loaders(made) == set()
