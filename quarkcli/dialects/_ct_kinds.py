"""Lists the kinds that compressed-tensors 0.20 holds, and those that vLLM 0.32 and transformers 5.23 load. Torch-free.

The library describes weights, inputs and outputs apart, so that every weight goes with every input. vLLM: read in
`compressed_tensors/compressed_tensors.py` and `compressed_tensors_moe/`; transformers: tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects import _sglang as sglang
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._kinds import Kinds
from quarkcli.dialects._patterns import WrittenNames, unfound
from quarkcli.dialects.base import Bar, Classes, Key
from quarkcli.errors import some
from quarkcli.plan.model import Plan, QuantizedTarget

WORD_BITS = 32
CONFIG_CLASS = "Linear"  # what a target of a config calls every linear
UNPACKED = "int-quantized"  # a signed byte for every integer


_WHERE = ("group", "channel")
_SUB_BYTE = [f"{short} {where}" for short in ("int2", "int3", "int4", "uint2", "uint4") for where in _WHERE]
_PACKED = [*_SUB_BYTE, *(f"{short} {where}" for short in ("int8", "uint8") for where in _WHERE)]
_FP8 = ["fp8 tensor", "fp8 channel"]
WEIGHTS = [*_PACKED, "int8 tensor", *_FP8, "fp8 tile", "mxfp4", "mxfp6_e2m3", "mxfp8", "nvfp4"]
_MX_INPUTS = ["mxfp4", "mxfp6_e2m3", "mxfp8"]
_FP8_INPUTS = ["fp8 static", "fp8 token", "fp8 tensor"]
_INT8_INPUTS = ["int8 static", "int8 token", "int8 tensor", "uint8 token"]
_DYNAMIC_INTS = ["int8 token", "int8 group"]
_DYNAMIC_INT4 = ["int4 token", "int4 group"]
INPUTS = ["none", *_FP8_INPUTS, "fp8 group", *_INT8_INPUTS, "int8 group", *_DYNAMIC_INT4, *_MX_INPUTS, "nvfp4"]
OUTPUTS = [*_FP8_INPUTS, *_INT8_INPUTS]
HOLDS = kinds.pairs(WEIGHTS, INPUTS)

# mxfp4 and mxfp8 have one class with and without quantized inputs: the kernel decides whether it quantizes them.
_VLLM = (
    kinds.pairs(_PACKED, ["none"])
    | kinds.pairs([*_SUB_BYTE, "int8 group", "uint8 group", "uint8 channel"], _DYNAMIC_INTS)
    | kinds.pairs(_SUB_BYTE, _DYNAMIC_INT4)
    | kinds.pairs(["int8 tensor", "int8 channel"], ["int8 static", "int8 token", "uint8 token"])
    | kinds.pairs(_FP8, ["none", *_FP8_INPUTS])
    | kinds.pairs(["fp8 tile"], ["none", "fp8 group"])
    | kinds.pairs(["mxfp4"], ["none", "mxfp4", "fp8 token", "fp8 group"])
    | kinds.pairs(["mxfp8"], ["none", "mxfp8"])
    | kinds.pairs(["nvfp4"], ["none", "nvfp4"])
    | {("int4 group", "fp8 token")}
)
_VLLM_EXPERTS: frozenset[Kinds] = frozenset(
    {("fp8 tensor", "fp8 static"), ("fp8 channel", "fp8 token"), ("fp8 tile", "fp8 group")}
    | kinds.pairs([f"{short} {where}" for short in ("int4", "uint4", "int8", "uint8") for where in _WHERE], ["none"])
    | {("int8 channel", "int8 token"), ("int4 group", "fp8 token")}
    | kinds.pairs(["mxfp4"], ["none", "mxfp4", "fp8 token", "fp8 group"])
    | {("mxfp8", "mxfp8"), ("nvfp4", "none"), ("nvfp4", "nvfp4")}
)
VLLM_KEYS = (Key("config_groups", dict, "no scheme is found"), Key("ignore", list, "the class fails"))
# SGLang 0.5.23. int8 with a scale per tensor: its kernel wants one per row. int8 inputs: by token, whatever the config
# says. Zero points of experts: taken for those of AWQ, which lie in another order.
_SGLANG_WORDS = kinds.pairs([f"{short} {where}" for short in ("int4", "int8") for where in _WHERE], ["none"])
_SGLANG_FP4 = {("nvfp4", "nvfp4"), ("nvfp4", "none")}
_SGLANG_INPUTS = ["int8 static", "int8 token"]
_SGLANG_ZEROS = kinds.pairs([f"uint4 {where}" for where in _WHERE], ["none"])
_TILES = ("fp8 tile", "fp8 group")
_WORD_EXPERTS = "pack-quantized"


def _sglang_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what SGLang does not load besides: members of fused modules by name, mixed experts, odd matrices."""
    groups = config.get("config_groups") or {}
    targets = [text for group in groups.values() for text in group.get("targets") or ()]
    found = sglang.unsaid(plan, {*targets, *(config.get("ignore") or ())})
    experts = [run[0] for run in plan.quantized_alike() if run[0].expert is not None]
    if config.get("format") != _WORD_EXPERTS and any(target.weight.format.kind == "integer" for target in experts):
        found.append(f"experts in integers are loaded where the whole model is {_WORD_EXPERTS}")
    found += _misnamed_experts(plan, several=len(groups) > 1)
    heads = [run[0].name for run in plan.quantized_alike() if run[0].role == "head" and _tiled(run[0])]
    found += [f"{name}: a head in tiles is refused" for name in heads]
    return [*found, *(sglang.marlin(plan) if _packs_words(plan) else [])]


def _misnamed_experts(plan: Plan, *, several: bool) -> list[str]:
    """Returns the reason where SGLang does not find what is said of experts, which it asks for by usual names."""
    others = [target for target in plan.targets.values() if target.expert is not None and not _is_usual(target.name)]
    names = [target.name for target in others if several or target.weight is None]
    what = "it asks for experts by gate_proj, up_proj and down_proj, and does not find what is said of this one"
    return shared.sentences({what: names} if names else {})


def _is_usual(name: str) -> bool:
    return name.endswith((".gate_proj", ".up_proj", ".down_proj"))


def _tiled(target: QuantizedTarget) -> bool:
    return kinds.weight_kind(target.weight) == "fp8 tile"


def _packs_words(plan: Plan) -> bool:
    """True when integers are packed in words, and inputs are as they are."""
    runs = (run[0] for run in plan.quantized_alike())
    return any(target.weight.format.kind == "integer" and target.input is None for target in runs)


SGLANG = Classes(
    kinds.pairs(_FP8, [*_FP8_INPUTS, "none"])
    | {_TILES}
    | _SGLANG_WORDS
    | _SGLANG_ZEROS
    | _SGLANG_FP4
    | kinds.pairs(["int8 channel"], _SGLANG_INPUTS),
    _SGLANG_WORDS
    | _SGLANG_FP4
    | {("fp8 tensor", "fp8 static"), ("fp8 tensor", "fp8 tensor"), ("fp8 channel", "fp8 token"), _TILES},
    "CompressedTensorsConfig._get_scheme_from_parts, get_moe_scheme, get_lm_head_scheme in "
    "layers/quantization/compressed_tensors/compressed_tensors.py",
    heads=True,
    faults=_sglang_faults,
)


def _tensorrt_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what TensorRT-LLM does not load besides: several schemes, and the scales of a cache."""
    several = len(config.get("config_groups") or ()) > 1
    cached = next(iter(shared.cached(plan)), None)
    found = ["which modules it finds for several config groups is not known"] if several else []
    if cached is not None:
        found.append(f"{cached.name}: it looks for the scales of the cache on k_proj and v_proj")
    return found


# TensorRT-LLM: a scale per row it copies without its second axis, and packed weights have another name (`weight`).
TENSORRT_LLM = Classes(
    frozenset({_TILES}),
    frozenset(),
    "update_quant_config_from_compressed_tensors in tensorrt_llm/models/quant_config_utils.py; "
    "FP8BlockScalesLinearMethod in tensorrt_llm/_torch/modules/linear.py",
    faults=_tensorrt_faults,
)
SGLANG_BARS = (
    Bar("fp8 tile", "*", "ampere", "CompressedTensorsW8A16Fp8 refuses tiles"),
    Bar("*int4 *", "none", "cdna2 cdna3 cdna4", "CompressedTensorsWNA16 packs for a kernel that is CUDA's alone"),
)
# With 8-bit floats integers run in groups of one size, on Hopper.
_INT4_FP8 = ("int4 group", "fp8 token")
_INT4_FP8_GROUP = 128
# Outputs are quantized around a product with whole inputs, both by one static scale.
_VLLM_OUTPUTS = kinds.pairs(
    [f"{short} {where}" for short in ("int2", "int4", "int8") for where in _WHERE], ["int8 static"]
)
# transformers decodes per-expert tensors while it fuses them. It has no place for a static input scale there (an
# unexpected key), knows neither zero points nor the global scale of nvfp4, multiplies 8-bit floats by their stored
# scale as it is, so by none of MX or of tiles, and unpacks only `weight_packed`.
_SIGNED_PACKED = [*(kind for kind in _SUB_BYTE if not kind.startswith("u")), "int8 group"]
_INPUTS_OF_EXPERTS = [kind for kind in INPUTS if not kind.endswith("static") and kind not in kinds.TWO_LEVEL]
_TRANSFORMERS_EXPERTS: frozenset[Kinds] = kinds.pairs(
    [*_FP8, *_SIGNED_PACKED, "mxfp4", "mxfp6_e2m3"], _INPUTS_OF_EXPERTS
) | {("int8 channel", "none")}


def vllm_loads(plan: Plan) -> bool:
    """True when vLLM has a class for every quantized module, with the shapes that its fused modules need."""
    if shared.vllm_lacks(plan):
        return False
    if not shared.fused_agree(plan) or not shared.tiles_fit(plan):
        return False
    members = Counter(target.group for target in plan.targets.values())
    return all(
        _vllm_loads(run[0], alone=alone)
        for run in plan.quantized_alike()
        for alone in {members[target.group] == 1 for target in run}
    )


def _vllm_loads(target: QuantizedTarget, *, alone: bool) -> bool:
    """True when vLLM has a class for the module. `alone`: the module is not fused with others."""
    spec, found = target.weight, kinds.kinds_of(shared.pair_of(target))
    # Half of its model classes give the embedding no quantization config or no name to find it by.
    if target.role == "embedding":
        return False
    # Fused along the output, zero points must end with a word.
    words = spec.symmetric or target.shape[0] * spec.format.bits % WORD_BITS == 0
    if not words or (found == _INT4_FP8 and spec.group_size != _INT4_FP8_GROUP):
        return False
    if target.output is not None:
        # One scale is kept for a fused module, whichever comes last.
        static = kinds.input_kind(target.output) == kinds.input_kind(target.input)
        return alone and static and target.expert is None and found in _VLLM_OUTPUTS
    return found in (_VLLM_EXPERTS if target.expert else _VLLM)


def vllm_faults(config: Mapping[str, Any], plan: Plan | None) -> list[str]:
    """Returns what vLLM does not load under a config: bytes where it reads words, and towers taken for quantized."""
    return _unpacked(config) + (_lost_patterns(config, plan) if plan is not None else [])


def _lost_patterns(config: Mapping[str, Any], plan: Plan) -> list[str]:
    """Returns the modules that a pattern leaves out by the name of the files alone. It maps names, and no patterns."""
    own = shared.vllm_names.beside_model(plan)
    if not own:
        return []
    ignore = config.get("ignore") or []
    targets = [text for group in (config.get("config_groups") or {}).values() for text in group.get("targets") or ()]
    names = WrittenNames([*ignore, *targets], [*own, *own.values()])
    lost = [
        name
        for module, name in own.items()
        if module not in ignore and not names.named(name, ignore)
        if CONFIG_CLASS in targets or names.named(name, targets)
    ]
    return [f"no pattern in ignore matches its names of modules that are not quantized: {some(lost)}"] if lost else []


def _unpacked(config: Mapping[str, Any]) -> list[str]:
    """Returns the groups whose integers below 8 bits have a byte each, which one of vLLM's classes alone reads."""
    found = []
    for name, group in (config.get("config_groups") or {}).items():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        bits, form = weights.get("num_bits", 8), group.get("format") or config.get("format")
        tokens = (inputs.get("type", "int"), inputs.get("num_bits", 8), inputs.get("dynamic")) == ("int", 8, True)
        read = bits == 4 and weights.get("symmetric", True) and inputs and tokens
        if form == UNPACKED and weights.get("type", "int") == "int" and bits < 8 and not read:
            found.append(f"{name}: integers of {bits} bits have a byte each ({form}), and its class reads packed words")
    return found


# Weights whose tensors all have a row for each output.
_ROW_UPON_ROW = {"mxfp4", "fp8 channel"}


def transformers_faults(config: Mapping[str, Any], plan: Plan | None) -> list[str]:
    """Returns why transformers would make weights up: it does not look for codes, or looks under another name."""
    family = plan.rewrites.family if plan is not None else None
    status, groups = config.get("quantization_status"), config.get("config_groups") or {}
    found = (
        [] if status == "compressed" else [f"quantization_status is {status}, not compressed: it looks for no codes"]
    )
    for texts in (config.get("ignore"), *(group.get("targets") for group in groups.values())):
        found += [
            f"it has {text} under another name, which the config does not say" for text in unfound(texts or (), family)
        ]
    return found + (_mistaken(config, plan) if plan is not None else [])


def _mistaken(config: Mapping[str, Any], plan: Plan) -> list[str]:
    """Returns modules that patterns leave out, or do not, by the name of the files alone, where it has another name."""
    family = plan.rewrites.family
    if family is None:
        return []
    singles = [target.name for target in plan.targets.values() if target.expert is None]
    own = {name: memory for name in singles if (memory := family.in_memory(name)) != name}
    ignore = config.get("ignore") or []
    names = WrittenNames(ignore, [*own, *own.values()])
    other = [name for name, memory in own.items() if names.named(name, ignore) != names.named(memory, ignore)]
    return [f"patterns in ignore match one of its two names for a module: {some(other)}"] if other else []


def transformers_loads_experts(targets: list[QuantizedTarget]) -> bool:
    """True when transformers decodes these quantized experts: of one scheme, which it knows."""
    found = {shared.pair_of(target) for target in targets}
    known = {kinds.kinds_of(pair) for pair in found}
    return len(found) == 1 and known <= _TRANSFORMERS_EXPERTS and all(target.output is None for target in targets)


def transformers_joins(plan: Plan, *, leaves_others_alone: bool) -> bool:
    """True where transformers can lay the tensors of modules that it joins upon each other: all left out, or none.

    Where all of the model are left out it decodes them as experts: they are lost unless the first scheme leaves other
    weights alone.
    """
    together: dict[str, set[str | None]] = {}
    for name, target in shared.joined(plan).items():
        kind = "kept" if target is None or target.weight is None else kinds.weight_kind(target.weight)
        together.setdefault(name.rpartition(".")[0], set()).add(kind)
    if any(len(found) > 1 or not found <= {"kept", *_ROW_UPON_ROW} for found in together.values()):
        return False
    return leaves_others_alone or not together or any(found != {"kept"} for found in together.values())
