"""Says what SGLang 0.5.23 does not load of a plan, in words that several dialects share. Torch-free.

Read in the source of its wheel (`sglang/srt/`), never run. It fuses q, k, v and gate, up as vLLM does. A config names
their members; which members a fused module has, most of its model classes do not say (`packed_modules_mapping`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from quarkcli.dialects import _shared as shared
from quarkcli.plan.model import Plan, Target

NAME = "sglang"
GATE_UP = "gate_proj+up_proj"
LATENT = "q_a_proj+kv_a_proj_with_mqa"
# Model classes that say of which members their `qkv_proj` and `gate_up_proj` are: read in `models/*.py`.
_SAYING = """
    Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration DeciLMForCausalLM Ernie4_5_ForCausalLM
    Ernie4_5_MoeForCausalLM Exaone4ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
    Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
    GemmaForCausalLM Glm5NextForConditionalGeneration GraniteMoeHybridForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM KimiK3ForConditionalGeneration LagunaForCausalLM Llama4ForCausalLM
    Llama4ForConditionalGeneration MellumForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration NemotronHForCausalLM PaddleOCRVLForConditionalGeneration Phi4MMForCausalLM
    PhiForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration SolarForCausalLM XllmForCausalLM
"""
# Classes with the loader of Llama, which takes the scales of tiles for scales of rows: `models/llama.py`.
_OF_LLAMA = """
    IQuestCoderForCausalLM InternLM3ForCausalLM LlamaForCausalLM Ministral3ForCausalLM MistralForCausalLM
    Phi3ForCausalLM TeleFLMForCausalLM
"""
_SAY, RENAMES_TILES = frozenset(_SAYING.split()), frozenset(_OF_LLAMA.split())
# What its Marlin kernel asks of a matrix: `layers/quantization/marlin_utils.py`.
_MARLIN_ROWS, _MARLIN_COLUMNS, _MARLIN_GROUPS = 64, 128, (32, 64, 128)


def unsaid(plan: Plan, named: Collection[str], known: Iterable[str] = (), *, all_classes: bool = False) -> list[str]:
    """Returns the reason for which it does not find what a config says of the members of fused modules.

    named        modules that the config names one by one
    known        members, as a group calls them, that it knows for every class
    all_classes  no class helps it in this dialect
    """
    if plan.architecture in _SAY and not all_classes:
        return []
    known = {*known}
    found = [target.name for target in plan.targets.values() if _fused(target, known) and target.name in named]
    of = "it" if all_classes else f"its class of {plan.architecture or 'the model'}"
    what = f"{of} does not say of which modules the fused one is, so that what the config says of its members is lost"
    return shared.sentences({what: found} if found else {})


def _fused(target: Target, known: set[str]) -> bool:
    members = target.group.rpartition(".")[2]
    return target.expert is None and "+" in members and members not in known


def kept_experts(plan: Plan, why: str) -> list[str]:
    """Returns the reason where experts are kept beside quantized weights."""
    kept = [target.name for target in shared.unquantized(plan) if target.expert is not None]
    return shared.sentences({why: kept} if kept else {})


def marlin(plan: Plan) -> list[str]:
    """Returns the reasons its kernel for packed integers does not take a dense matrix: groups, rows and columns."""
    rows: dict[str, int] = {}
    for run in plan.quantized_alike():
        for target in run if run[0].expert is None else ():
            rows[target.group] = rows.get(target.group, 0) + target.shape[0]
    reasons: dict[str, list[str]] = {}
    for run in plan.quantized_alike():
        size = run[0].weight.group_size
        if size is not None and size not in _MARLIN_GROUPS:
            reasons.setdefault(f"its kernel has no groups of {size}", []).extend(target.name for target in run)
        for target in run if run[0].expert is None else ():
            if rows[target.group] % _MARLIN_ROWS or target.shape[1] % _MARLIN_COLUMNS:
                size_ = f"{rows[target.group]} x {target.shape[1]}"
                what = f"its kernel wants multiples of {_MARLIN_ROWS} rows and {_MARLIN_COLUMNS} columns, not {size_}"
                reasons.setdefault(what, []).append(target.name)
    return shared.sentences(reasons)
