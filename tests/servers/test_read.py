"""Verdicts that were read in the sources of servers, on plans alone: nothing is written."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from quarkcli import dialects, servers
from quarkcli.dialects.base import TensorInfo
from quarkcli.job import rates
from quarkcli.job import run as job
from quarkcli.plan.model import Plan
from tests import runs
from tests.plan import layouts

DATA = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}


def planned(dialect: str, scheme: str, **options: Any) -> job.Prepared:
    data = DATA if scheme in runs.CALIBRATED or "kv_cache" in options else {}
    return runs.prepare("demo", scheme=scheme, dialect=dialect, target="none", **data, **options)


def refused(server: str, dialect: str, plan: Plan) -> list[str]:
    writer = next(one for one in dialects.writers() if one.name == dialect)
    return servers.server(server).refusals(servers.planned(plan, writer))


# (scheme, dialect) -> what SGLang refuses; empty: it loads the plan
SCHEMES = [
    ("int8", "compressed-tensors", "no class for down: int8"),
    ("fp8_block128", "compressed-tensors", ""),
    ("fp8_block128", "quark", "no class for"),
    ("fp8_block128", "fp8", "passes over weight_scale_inv and goes on"),
    ("uint4_wo_64", "compressed-tensors", ""),
    ("uint4_wo_64", "awq", ""),
    ("int4_wo_64", "gptq", ""),
    ("nvfp4_weight_only", "modelopt", ""),
    ("ptpc_fp8", "modelopt", "no class for"),
    ("mxfp4", "compressed-tensors", "no class for"),
]


@pytest.mark.parametrize(("scheme", "dialect", "said"), SCHEMES)
def test_sglang_and_schemes(scheme: str, dialect: str, said: str) -> None:
    found = refused("sglang", dialect, planned(dialect, scheme).plan)
    assert said in found[0] if said else not found


@pytest.mark.parametrize(
    ("dialect", "scheme"), [("compressed-tensors", "int4_wo_64"), ("awq", "uint4_wo_64"), ("gptq", "int4_wo_64"),
                            ("quark", "ptpc_fp8")]
)  # fmt: skip
def test_sglang_does_not_find_members_of_fused_modules(dialect: str, scheme: str) -> None:
    """The class of Llama does not say what it fuses; that of Gemma 2 does, which helps where a config names members."""
    plan = planned(dialect, scheme, exclude=["*self_attn*"]).plan
    (reason,) = refused("sglang", dialect, plan)
    assert "model.layers.0.self_attn." in reason and "does not say of which modules" in reason
    helped = refused("sglang", dialect, replace(plan, architecture="Gemma2ForCausalLM"))
    assert bool(helped) == (dialect in ("awq", "gptq"))
    assert not refused("sglang", dialect, planned(dialect, scheme, exclude=["*o_proj"]).plan)


def test_sglang_knows_gate_and_up_in_the_quark_dialect() -> None:
    assert not refused("sglang", "quark", planned("quark", "ptpc_fp8", exclude=["*gate_proj", "*up_proj"]).plan)


def test_sglang_needs_nvfp4_in_a_mixed_modelopt_config() -> None:
    plan = planned("modelopt", "fp8", layers=["*down_proj=ptpc_fp8"]).plan
    assert any("taken for another method" in reason for reason in refused("sglang", "modelopt", plan))


def test_sglang_and_shapes_that_marlin_does_not_take() -> None:
    plan = planned("compressed-tensors", "int4_wo_64").plan
    targets = {
        name: replace(target, shape=(target.shape[0], 192)) if name.endswith("o_proj") else target
        for name, target in plan.targets.items()
    }
    (reason,) = refused("sglang", "compressed-tensors", replace(plan, targets=targets))
    assert "wants multiples of 64 rows and 128 columns, not 128 x 192" in reason


@pytest.mark.parametrize(
    ("scheme", "dialect", "options", "said"),
    [
        ("int8_dynamic", "compressed-tensors", {}, "no class for experts"),
        ("uint4_wo_64", "compressed-tensors", {}, "no class for experts"),
        ("int4_wo_64", "compressed-tensors", {"layers": ["*self_attn*=ptpc_fp8"]}, "experts in integers"),
        ("ptpc_fp8", "compressed-tensors", {"exclude": ["*experts*"]}, "asks for experts by gate_proj"),
        ("ptpc_fp8", "quark", {"exclude": ["*experts*"]}, ""),
        ("int4_wo_64", "gptq", {"exclude": ["*experts*"]}, "does not ask what is left out"),
        ("uint4_wo_64", "awq", {"exclude": ["*experts*"]}, "looks for the name of all experts"),
        ("int4_wo_64", "compressed-tensors", {}, ""),
        ("mxfp4", "quark", {}, ""),
    ],
)
def test_sglang_and_experts(scheme: str, dialect: str, options: dict[str, Any], said: str) -> None:
    found = refused("sglang", dialect, layouts.plan(scheme, layouts.MIXTRAL, **options))
    assert any(said in reason for reason in found) if said else not found


def test_vllm_has_dropped_classes() -> None:
    plan = planned("compressed-tensors", "ptpc_fp8").plan
    assert not refused("vllm", "compressed-tensors", plan)
    (reason,) = refused("vllm", "compressed-tensors", replace(plan, architecture="QWenLMHeadModel"))
    assert reason == "its last release with a class of QWenLMHeadModel is 0.23.0, and transformers has none"


def test_every_row_says_where_it_was_read() -> None:
    for member in servers.servers():
        assert all(row.read_in for row in member.kernels), member.name
    for writer in dialects.writers():
        assert all(
            rules.read_in.count(".py") or "_get_quant_method" in rules.read_in for rules in writer.classes.values()
        )
        assert all(bar.why for bars in writer.bars.values() for bar in bars)


def test_a_dialect_may_be_refused_where_another_runs() -> None:
    sglang = servers.server("sglang")
    by_name = {writer.name: writer for writer in dialects.writers()}
    kinds = ("fp8 channel", "fp8 token")
    assert sglang.way(kinds, "ampere", by_name["compressed-tensors"]) == "weight-only"
    assert sglang.way(kinds, "ampere", by_name["quark"]) is None
    assert sglang.way(kinds, "hopper", by_name["quark"]) == "fast"
    bars = [bar for writer in by_name.values() for several in writer.bars.values() for bar in several]
    assert bars and {one for bar in bars for one in bar.where.split()} <= set(rates.generations())


# --- TensorRT-LLM: its loader's rules, on the names, dtypes and shapes that the writer gives -------------------------

# `linear.py`: class -> tensors that it takes from a module's part of the files -> their dtypes there.
TAKES = {
    "FP8": {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weight": "F8_E4M3", "weight_scale": "F32"},
    "NVFP4": {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"},
}
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
ALONE = ("self_attn.o_proj", "mlp.down_proj")


def excluded(module: str, patterns: list[str]) -> bool:
    """`QuantConfig.is_module_excluded_from_quantization`: a module or one it is in."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def members(plan: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules of its tree of a Llama -> the modules of the files that they are made of."""
    layers = sorted({name.split(".self_attn.")[0] for name in plan.targets if ".self_attn." in name})
    for layer in layers:
        for fused, parts in FUSED.items():
            parent = f"{layer}.{fused.rpartition('.')[0]}"
            yield f"{layer}.{fused}", tuple(f"{parent}.{part}" for part in parts)
        yield from ((f"{layer}.{name}", (f"{layer}.{name}",)) for name in ALONE)
    yield "lm_head", ("lm_head",)


def algorithm(inner: Mapping[str, Any], module: str, parts: tuple[str, ...]) -> str | None:
    """`_build_modelopt_quant_config`, `apply_layerwise_quant_config`, `apply_quant_config_exclude_modules`."""
    if any(excluded(name, inner["exclude_modules"]) for name in (module, *parts)):
        return None
    if inner["quant_algo"] != "MIXED_PRECISION":
        return str(inner["quant_algo"])
    layer = inner["quantized_layers"].get(parts[0])
    return layer["quant_algo"] if layer else None


@pytest.mark.parametrize(
    ("scheme", "options", "algo"),
    [
        ("fp8", {}, "FP8"),
        ("fp8", {"kv_cache": "fp8"}, "FP8"),
        ("ptpc_fp8", {}, "FP8_PER_CHANNEL_PER_TOKEN"),
        ("nvfp4", {}, "NVFP4"),
        ("nvfp4", {"exclude": ["*self_attn*"]}, "NVFP4"),
        ("nvfp4", {"layers": ["*self_attn*=fp8"]}, "MIXED_PRECISION"),
    ],
)
def test_tensorrt_llm_finds_what_it_looks_for(scheme: str, options: dict[str, Any], algo: str) -> None:
    prepared = planned("modelopt", scheme, **options)
    plan, writer = prepared.plan, prepared.dialect
    assert not refused("tensorrt-llm", "modelopt", plan)
    described = writer.files(plan)
    nested, flat = described["hf_quant_config.json"], described["config.json"]["quantization_config"]
    inner = nested["quantization"]
    assert nested["producer"]["name"] == "modelopt" and flat["quant_method"].startswith("modelopt")
    assert inner["quant_algo"] == flat["quant_algo"] == algo
    assert inner["exclude_modules"] == flat["ignore"]
    assert inner["kv_cache_quant_algo"] == ("FP8" if "kv_cache" in options else None)
    if "kv_cache" in options:  # `_kv_cache_scheme_to_algo` of the flat form
        assert (flat["kv_cache_scheme"]["type"], flat["kv_cache_scheme"]["num_bits"]) == ("float", 8)
    infos = {info.name: info for target in plan.quantized() for info in writer.infos(target)}
    infos |= {info.name: info for attention in plan.attention.values() for info in writer.attention_infos(attention)}
    seen = {name for module, parts in members(plan) for name in checked(plan, module, parts, inner, infos)}
    assert seen == set(infos)


def checked(
    plan: Plan, module: str, parts: tuple[str, ...], inner: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> Iterator[str]:
    """The tensors that a module takes, each with the dtype and the shape that its class copies."""
    algo = algorithm(inner, module, parts)
    for part in parts:
        mine = {name.removeprefix(f"{part}."): info for name, info in infos.items() if name.startswith(f"{part}.")}
        local = {name: info for name, info in mine.items() if name not in ("k_scale", "v_scale")}
        assert bool(local) == (algo is not None), part
        if algo is None:
            continue
        assert {name: info.dtype for name, info in local.items()} == TAKES[algo], part
        rows, cols = plan.targets[part].shape
        assert local["weight"].shape == ((rows, cols // 2) if algo == "NVFP4" else (rows, cols))
        wanted = {"FP8": (), "NVFP4": (rows, cols // 16)}.get(algo, (rows,))
        assert local["weight_scale"].shape == wanted
        assert all(info.shape == () for name, info in mine.items() if name not in ("weight", "weight_scale"))
        yield from (f"{part}.{name}" for name in mine)
    caches = [part.rpartition(".")[2] for part in parts if f"{part}.{part.rpartition('.')[2][0]}_scale" in infos]
    assert caches in ([], ["k_proj", "v_proj"])


@pytest.mark.parametrize(
    ("scheme", "dialect"),
    [("fp8_block128", "modelopt"), ("mxfp8", "modelopt"), ("nvfp4_weight_only", "modelopt"), ("fp8", "quark"),
     ("nvfp4", "compressed-tensors"), ("int4_wo_64", "gptq"), ("fp8", "fp8")],
)  # fmt: skip
def test_what_tensorrt_llm_does_not_load_is_said(scheme: str, dialect: str) -> None:
    assert refused("tensorrt-llm", dialect, planned(dialect, scheme).plan)


def test_tensorrt_llm_finds_the_scales_of_tiles() -> None:
    assert not refused("tensorrt-llm", "compressed-tensors", planned("compressed-tensors", "fp8_block128").plan)
    prepared = planned("fp8", "fp8_block128")
    assert not refused("tensorrt-llm", "fp8", prepared.plan)
    names = {
        info.name.rpartition(".")[2] for target in prepared.plan.quantized() for info in prepared.dialect.infos(target)
    }
    assert names == {"weight", "weight_scale_inv"}
