"""Says what servers load of the gptq dialect: kinds of weights, and what a config must say. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.dialects import _sglang as sglang
from quarkcli.dialects import _shared as shared
from quarkcli.dialects import _words as words
from quarkcli.dialects.base import Bar, Classes
from quarkcli.errors import some
from quarkcli.plan.model import Plan

HOLDS = frozenset((f"{short} {where}", "none") for short in ("int4", "int8") for where in ("group", "channel"))
QUANTIZED = "modules_in_block_to_quantize"  # where it is missing, vLLM asks the headers which modules have codes


def _sglang_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what SGLang does not load besides: what `dynamic` leaves out of what it fuses, and odd matrices."""
    kept = {target.name for target in shared.unquantized(plan)}
    found = sglang.unsaid(plan, kept, all_classes=True)
    found += sglang.kept_experts(plan, "its class for experts does not ask what is left out")
    return found + sglang.marlin(plan)


SGLANG = Classes(
    HOLDS, HOLDS, "GPTQMarlinConfig in layers/quantization/gptq/gptq.py", heads=True, faults=_sglang_faults
)
BARS = {sglang.NAME: (Bar("*", "*", "cdna2 cdna3 cdna4", "gptq is not in rocm_supported_quantization"),)}


def vllm_faults(config: Mapping[str, Any], plan: Plan | None) -> list[str]:
    """Returns what vLLM does not load under a config: groups in another order, modules that it does not find."""
    unordered = config.get("desc_act") is True and config.get("group_size") != words.WHOLE_ROW
    found = ["desc_act is true, and it does not load groups in the order of activations"] if unordered else []
    lost = shared.vllm_names.unlisted(plan, config.get(QUANTIZED) or []) if plan is not None else []
    return found + ([f"{QUANTIZED} does not list what it asks for: {some(lost)}"] if lost else [])
