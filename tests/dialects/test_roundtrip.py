"""What all dialects promise: sizes known beforehand, and nothing lost on the way to disk and back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from quarkcli import dialects
from quarkcli.dialects.base import Writer
from quarkcli.errors import ModelError
from quarkcli.numerics.quantize import quantize, static_scale
from quarkcli.plan.model import Plan, Target

from .plans import (
    FP8,
    FP8_GROUP,
    FP8_TILE,
    FP8_TOKEN,
    INT4_CHANNEL,
    MXFP4,
    MXFP8,
    MXFP8_INPUT,
    PAIRS,
    Module,
    Pair,
    linears,
    llama,
    moe,
    plan,
    target,
)  # fmt: skip

TEXTS = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
MORE: dict[str, Pair] = {
    "int4-channel": (INT4_CHANNEL, None),
    "mxfp4-fp8": (MXFP4, FP8_TOKEN),
    "mxfp4-fp8-static": (MXFP4, FP8),
    "mxfp8": (MXFP8, MXFP8_INPUT),
    "fp8-block": (FP8_TILE, FP8_GROUP),
}


def held(dialect: Writer) -> dict[str, Pair]:
    """The pairs that the dialect does not refuse, by name."""
    small = llama(layers=1, hidden=128, mlp=384)
    return {name: pair for name, pair in {**PAIRS, **MORE}.items() if not dialect.refusals(plan(small, linears(pair)))}


HELD = {writer.name: held(writer) for writer in dialects.writers()}
# Of activations and caches as well; `test_every_scheme` has those of weights alone.
NAMES = [name for name in HELD if "fp8" in HELD[name]]
CASES = [(name, scheme) for name in NAMES for scheme in HELD[name]]


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


def headers(tensors: dict[str, torch.Tensor]) -> dict[str, Header]:
    return {name: Header(TEXTS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def weight_of(item: Target, seed: int = 0) -> torch.Tensor:
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[item.dtype]
    return torch.randn(item.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(dialect: Writer, item: Target, seed: int = 0):
    assert item.weight is not None
    quantized = quantize(weight_of(item, seed), item.weight)
    source = static_scale(torch.tensor(3.25), item.input) if item.input and item.input.is_static else None
    return quantized, source, dialect.tensors(item, quantized, {} if source is None else {"input": source})


def write(dialect: Writer, made: Plan) -> tuple[dict, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    for seed, item in enumerate(made.quantized()):
        tensors |= written(dialect, item, seed)[2]
    for attention in made.attention.values():
        scales = {kind: torch.tensor(0.5 + index) for index, kind in enumerate("kv")}
        tensors |= dialect.attention_tensors(attention, scales)
    return json.loads(json.dumps(dialect.config(made))), tensors


@pytest.mark.parametrize(("name", "scheme"), CASES)
@pytest.mark.parametrize("shape", [(64, 384), (96, 128), (8, 640)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_infos_equal_tensors(name: str, scheme: str, shape: tuple[int, int], dtype: str) -> None:
    dialect = dialects.writer(name)
    item = target(Module("model.layers.0.mlp.up_proj", shape, "up"), HELD[name][scheme], dtype)
    _, _, tensors = written(dialect, item)
    assert {info.name: (info.dtype, info.shape) for info in dialect.infos(item)} == {
        key: (TEXTS[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    assert list(tensors) == [info.name for info in dialect.infos(item)]
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_read_of_write_is_exact(name: str, scheme: str) -> None:
    dialect = dialects.writer(name)
    made = plan(llama(layers=1, hidden=128, mlp=384), linears(HELD[name][scheme]), kv=FP8)
    assert dialect.refusals(made) == []
    config, tensors = write(dialect, made)
    view = dialect.reader.view(config, headers(tensors))
    assert list(view.targets) == [item.name for item in made.quantized()]
    for seed, item in enumerate(made.quantized()):
        quantized, source, packed = written(dialect, item, seed)
        stored = view.targets[item.name]
        assert (stored.weight, stored.input, stored.shape) == (item.weight, item.input, item.shape)
        assert set(stored.tensors) == set(packed)
        decoded = dialect.reader.decode(stored, tensors)
        again, source_again = decoded.weight, decoded.input
        assert again.codes.dtype == quantized.codes.dtype
        assert torch.equal(bits(again.codes), bits(quantized.codes))
        assert again.params.scale.shape == quantized.params.scale.shape
        assert torch.equal(bits(again.params.scale), bits(quantized.params.scale))
        same_within_one_ulp(again.params.global_scale, quantized.params.global_scale)
        same_within_one_ulp(source_again, source)
    assert {key: dialect.reader.decode_attention(stored, tensors) for key, stored in view.attention.items()} == {
        "model.layers.0.self_attn": {"k": torch.tensor(0.5), "v": torch.tensor(1.5)}
    }
    assert all(stored.specs == {"k": FP8, "v": FP8} for stored in view.attention.values())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same_within_one_ulp(found: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.shape == wanted.shape == ()
        assert abs(found.view(torch.int32).item() - wanted.view(torch.int32).item()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_mixed_plan_is_read_back(name: str) -> None:
    dialect = dialects.writer(name)
    often = [scheme for scheme in ("mxfp4", "fp8", "int8-token") if scheme in HELD[name]]
    schemes = [*often, *(scheme for scheme in HELD[name] if scheme not in often)][:3]
    pairs = {role: HELD[name][scheme] for role, scheme in zip(("expert", "o", "q"), schemes, strict=True)}
    made = plan(moe(hidden=128, inner=128), lambda m: pairs.get(m.role.split("_")[0]), kv=FP8)
    if refused := dialect.refusals(made):
        assert len(refused) == 1 and "has one scheme for all weights" in refused[0]
        return
    config, tensors = write(dialect, made)
    view = dialect.reader.view(config, headers(tensors))
    assert {key: (stored.weight, stored.input) for key, stored in view.targets.items()} == {
        item.name: (item.weight, item.input) for item in made.quantized()
    }


@pytest.mark.parametrize("name", NAMES)
def test_reading_names_what_is_wrong(name: str) -> None:
    dialect = dialects.writer(name)
    made = plan(llama(layers=1), linears(PAIRS["fp8"]))
    config, tensors = write(dialect, made)
    known = headers(tensors)
    module = "model.layers.0.self_attn.q_proj"
    missing = {key: value for key, value in known.items() if key != f"{module}.input_scale"}
    with pytest.raises(ModelError, match=r"q_proj\.input_scale"):
        dialect.reader.view(config, missing)
    wrong = {**known, f"{module}.weight": Header("I8", (64, 64))}
    with pytest.raises(ModelError, match=r"q_proj\.weight: found I8"):
        dialect.reader.view(config, wrong)
    left_out = {"modules_to_not_convert": [module]}
    without = {**config, "config_groups": {}, "global_quant_config": {}, "quant_algo": None, **left_out}
    with pytest.raises(ModelError, match="q_proj"):
        dialect.reader.view(without, known)


@pytest.mark.parametrize("name", NAMES)
def test_scalars_may_be_stored_with_or_without_a_dimension(name: str) -> None:
    dialect = dialects.writer(name)
    made = plan(llama(layers=1), linears(HELD[name].get("nvfp4", PAIRS["fp8"])))
    config, tensors = write(dialect, made)
    for shape in ((), (1,)):
        other = {key: t.reshape(shape) if t.numel() == 1 else t for key, t in tensors.items()}
        view = dialect.reader.view(config, headers(other))
        for stored in view.targets.values():
            decoded = dialect.reader.decode(stored, other)
            quantized, source = decoded.weight, decoded.input
            params = quantized.params
            whole = params.scale if params.global_scale is None else params.global_scale
            assert whole.shape == source.shape == ()


@pytest.mark.parametrize("module", [name.replace("-", "_") for name in dialects.names()])
def test_importing_a_member_needs_no_torch(module: str) -> None:
    code = f"import sys, quarkcli.dialects.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_helpers_are_not_members() -> None:
    assert {"compressed-tensors", "quark"} <= set(dialects.names())
    assert not any(name.startswith(("-", "_")) or name == "base" for name in dialects.names())


def test_every_pair_is_held_or_refused_with_a_reason() -> None:
    """None is held by nobody, and no dialect refuses everything."""
    assert all(len(HELD[name]) >= 3 for name in NAMES)
    assert set().union(*HELD.values()) == {*PAIRS, *MORE}
    for dialect in dialects.writers():
        for name in {*PAIRS, *MORE} - set(HELD[dialect.name]):
            refused = dialect.refusals(plan(llama(layers=1), linears({**PAIRS, **MORE}[name])))
            assert any("model.layers.0.self_attn.q_proj" in reason and dialect.name in reason for reason in refused)
