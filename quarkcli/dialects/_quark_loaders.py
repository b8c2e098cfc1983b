"""Says why the quark dialect cannot hold a plan, and which servers load what it holds. Torch-free.

vLLM 0.32: its Quark classes, for linears and for routed experts; most were loaded, the others read. transformers 5.23
loads through amd-quark, which renames one scale per tensor only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects import _sglang as sglang
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._kinds import Kinds
from quarkcli.dialects._quark_config import CACHE, PROJECTIONS, SOFTMAX, is_joined, leaf_of, projection, slots_of
from quarkcli.dialects._quark_layout import Matrix, problems, static_layout
from quarkcli.dialects.base import Bar, Classes, Key
from quarkcli.plan.model import Attention, Plan, QuantizedTarget
from quarkcli.spec import PerTensor, TensorSpec

_FP8_INPUTS = ("fp8 static", "fp8 token", "fp8 tensor")
_MXFP6 = ("mxfp6_e2m3", "mxfp6_e3m2")
_VLLM: frozenset[Kinds] = frozenset(
    [(f"fp8 {where}", source) for where in ("tensor", "channel") for source in _FP8_INPUTS]
    + [(f"int8 {where}", source) for where in ("tensor", "channel") for source in ("int8 static", "int8 token")]
    + [("fp8 tile", "fp8 group"), ("int4 group", "none"), ("uint4 group", "none"), ("nvfp4", "nvfp4")]
    + [(weight, source) for weight in ("mxfp4", *_MXFP6) for source in ("none", "mxfp4", *_MXFP6)]
    + [("mxfp4", "fp8 static"), ("mxfp8", "mxfp8")]
)
# Experts have classes of their own: weight and input of one granularity, and mixes of MX as they are listed there.
_VLLM_EXPERTS: frozenset[Kinds] = frozenset(
    [
        ("fp8 tensor", "fp8 static"),
        ("fp8 tensor", "fp8 tensor"),
        ("fp8 channel", "fp8 token"),
        ("fp8 tile", "fp8 group"),
    ]
    + [(f"int8 {where}", source) for where in ("tensor", "channel") for source in ("int8 static", "int8 token")]
    + [("int4 group", "none"), ("uint4 group", "none"), ("nvfp4", "nvfp4")]
    + [(weight, source) for weight in ("mxfp4", *_MXFP6) for source in ("none", "fp8 static", weight)]
    + [("mxfp4", source) for source in _MXFP6]
)
# vLLM's block kernel wants whole tiles of rows in all but the last member of a fused linear, amd-quark in both ways.
_TILE = 128
_TRANSFORMERS_WEIGHTS = frozenset(
    [f"fp8 {where}" for where in ("tensor", "channel", "tile")]
    + [f"{element} {where}" for element in ("int8", "int4", "uint4") for where in ("tensor", "channel", "group")]
    + ["mxfp4", *_MXFP6, "amdfp4"]
)
_TRANSFORMERS_INPUTS = frozenset({"none", *_FP8_INPUTS, "fp8 group", "int4 group", "mxfp4", *_MXFP6, "amdfp4"}) | {
    f"int8 {how}" for how in ("static", "token", "tensor")
}


VLLM_KEYS = (
    Key("export", dict, "it is refused"),
    Key("export.kv_cache_group", list, "the class fails on it"),
    Key("exclude", list, "the class fails on it"),
    Key("layer_type_quant_config", dict, "the class fails on it"),
)
# SGLang 0.5.23. Tiles of fp8 it would look for under another name (`weight_scale_inv`), but in DeepSeek's class.
_SGLANG_EXPERTS: frozenset[Kinds] = frozenset(
    [
        ("fp8 tensor", "fp8 static"),
        ("fp8 tensor", "fp8 tensor"),
        ("fp8 channel", "fp8 token"),
        ("mxfp4", "mxfp4"),
        ("mxfp4", "fp8 static"),
    ]
)


def _sglang_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what SGLang does not load besides: members of fused modules by name, and one scale for k and v."""
    named = {*(config.get("exclude") or ()), *(config.get("layer_quant_config") or ())}
    found = sglang.unsaid(plan, named, {sglang.GATE_UP, sglang.LATENT})
    joined = next((module for module in shared.cached(plan) if is_joined(module)), None)
    if joined is not None:
        found.append(
            f"it looks for the scales of the cache on k_proj and v_proj, and here one stands on {joined.k_proj}"
        )
    return found


SGLANG = Classes(
    kinds.pairs(["fp8 tensor", "fp8 channel"], _FP8_INPUTS) | {("mxfp4", "mxfp4")},
    _SGLANG_EXPERTS,
    "QuarkConfig._get_scheme_from_config, get_moe_scheme in layers/quantization/quark/quark.py",
    faults=_sglang_faults,
)
BARS = {
    "sglang": (Bar("fp8 *", "*", "ampere", "QuarkW8A8Fp8 asks for compute capability 8.9"),),
    "vllm": (Bar("fp8 *", "*", "ampere", "QuarkW8A8Fp8 asks for compute capability 8.9"),),
}


# --- refusals --------------------------------------------------------------------------------------------------------


def refusals(plan: Plan) -> list[str]:
    """Returns one sentence for every reason, with the first module it holds for."""
    reasons: dict[str, list[str]] = {}
    for run in plan.quantized_alike():
        for reason in _target_reasons(run[0]):
            reasons.setdefault(reason, []).extend(target.name for target in run)
    for reason, name in _attention_reasons(plan):
        reasons.setdefault(reason, []).append(name)
    return shared.sentences(reasons)


def _target_reasons(target: QuantizedTarget) -> Iterator[str]:
    yield from problems(Matrix("weight", target.weight, target.shape))
    if target.bias_spec is not None:
        yield from problems(Matrix("bias", target.bias_spec, (1, target.shape[0])))
    features = {"input": target.shape[1], "output": target.shape[0]}
    for slot, spec in (("input", target.input), ("output", target.output)):
        if spec is None:
            continue
        for size in sorted(spec.group_sizes):
            if features[slot] % size:
                name = f"{features[slot]} {slot} features"
                yield f"{name} are not a multiple of the group of {size} of its {slot} ({spec.describe()})"
        yield from _static_reasons(slot, spec)


def _static_reasons(slot: str, spec: TensorSpec) -> Iterator[str]:
    """Yields the reasons a static scale cannot be written: one number is stored for an activation."""
    fixed = [stage for stage in spec.stages if stage.scale is not None and stage.scale.outermost.when == "static"]
    whole = [stage for stage in fixed if isinstance(stage.granularity, PerTensor) or stage.is_two_level]
    if len(fixed) > 1 or len(whole) < len(fixed):
        yield f"quark stores one static scale for its {slot}, and {spec.describe()} has others"


def _attention_reasons(plan: Plan) -> Iterator[tuple[str, str]]:
    active = shared.cached(plan)
    for attention in active:
        for kind, spec in attention.specs.items():
            for reason in _slot_reasons(plan, attention, kind, spec):
                yield reason, f"{attention.name}.{kind}_bmm_quantizer"
    leaves = {leaf_of(attention, "k") for attention in active}
    if len(leaves) > 1:
        yield (
            (
                "quark describes the KV cache once for the whole model, and here it differs: "
                f"{' and '.join(sorted(leaves))}"
            ),
            "",
        )
    for kind in (*PROJECTIONS, SOFTMAX):
        found = {attention.specs.get(kind) for attention in plan.attention.values()}
        if len(found) > 1 and (kind != SOFTMAX or len(found - {None}) > 1):
            other = next(a.name for a in plan.attention.values() if a.specs.get(kind) != active[0].specs.get(kind))
            yield f"quark describes attention {kind} once for the whole model, and here it differs", other


def _slot_reasons(plan: Plan, attention: Attention, kind: str, spec: TensorSpec) -> Iterator[str]:
    if not static_layout("output", spec):
        yield f"quark needs a stored scale for attention {kind}, and {spec.describe()} has none"
    yield from _static_reasons(f"attention {kind}", spec)
    if kind == SOFTMAX:
        return
    module, leaf = projection(attention, kind), leaf_of(attention, kind)
    if kind in CACHE and is_joined(attention) and attention.specs.get("k") != attention.specs.get("v"):
        yield f"quark has one scale for all outputs of {leaf}, so k and v must have the same format"
    if module.rpartition(".")[2] != leaf or module not in plan.targets:
        found = module if module in plan.targets else attention.k_proj
        yield (
            f"quark stores the scale of attention {kind} on a {leaf}, and here the module is {found.rpartition('.')[2]}"
        )
    elif plan.targets[module].output is not None:
        yield f"quark has one place for the output of {leaf}, and attention {kind} needs it"


# --- what loads it ---------------------------------------------------------------------------------------------------


def loaders(plan: Plan) -> set[str]:
    """Returns the servers that load the checkpoint of a plan that the dialect holds."""
    if any(slots_of(run[0])[2:] != (None, None) for run in plan.quantized_alike()):
        return set()  # vLLM refuses a quantized output or bias, and of the other only simple biases were tried
    if any(run[0].role == "embedding" for run in plan.quantized_alike()):
        return set()
    found = set()
    if _vllm_loads(plan):
        found.add("vllm")
    if _transformers_loads(plan):
        found.add("transformers")
    return found


def _vllm_loads(plan: Plan) -> bool:
    # Its head is never a quantized one here.
    if any(run[0].role == "head" for run in plan.quantized_alike()) or not _vllm_attends(plan):
        return False
    return shared.vllm_loads(plan, _VLLM, _VLLM_EXPERTS) and shared.tiles_fit(plan)


def _vllm_attends(plan: Plan) -> bool:
    """True when k and v are fp8 under one scale each, alike; q and the softmax output only beside them."""
    for attention in shared.cached(plan):
        specs = attention.specs
        if is_joined(attention):
            return False  # it maps the names of k_proj and v_proj alone
        fp8 = all(kinds.input_kind(spec) == "fp8 static" for spec in specs.values())
        if not fp8 or any(kind not in specs for kind in CACHE) or specs["k"] != specs["v"]:
            return False
    return True


def _transformers_loads(plan: Plan) -> bool:
    """True when transformers loads it.

    Routed experts are one fused parameter in memory, for which amd-quark has no quantized module.
    """
    if shared.own_code(plan) or shared.renames(plan) or shared.joined(plan) or shared.hides_cache(plan):  # not tried
        return False
    if shared.own_linears(plan):  # amd-quark replaces linears of one class
        return False
    if shared.quantizes_routers(plan) or any({"q", SOFTMAX} & set(a.specs) for a in shared.cached(plan)):
        return False
    if any(kinds.input_kind(spec) != "fp8 static" for a in shared.cached(plan) for spec in a.specs.values()):
        return False
    for target, *_ in plan.quantized_alike():
        weight, source = kinds.weight_kind(target.weight), kinds.input_kind(target.input)
        if target.expert or weight not in _TRANSFORMERS_WEIGHTS or source not in _TRANSFORMERS_INPUTS:
            return False
        if weight == "fp8 tile" and (target.shape[0] % _TILE or target.shape[1] % _TILE):
            return False
    return True
