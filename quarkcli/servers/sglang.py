"""SGLang: rules read from its source, never run here.

Sources (https://github.com/sgl-project/sglang, python/sglang/srt/layers/quantization/):
    quark/quark.py, commit f1dea624c8f5 (0.5.6.post1): `QuarkConfig._get_scheme_from_config`, `_is_fp8_w8a8`,
        `_is_mx_fp4`; experts: the same two kinds, `get_moe_scheme` of a later commit
    compressed_tensors/compressed_tensors.py, commit 000659aed4db: `_get_scheme_from_parts`, `_is_wNa16_group_channel`,
        `_is_fp8_w8a8`, `_is_static_tensor_w8a8`, `_is_dynamic_token_w8a8`; nvfp4 and experts: `_is_fp4a4_nvfp4` and
        `get_moe_scheme` of a later commit, which refuses int8 experts off Ascend
Of other methods it knows the names (`BASE_QUANTIZATION_METHODS`); their classes were not read.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from quarkcli.dialects._kinds import Kinds, kinds_of
from quarkcli.plan.model import QuantizedTarget
from quarkcli.servers.base import Server, Written, what


class _Loads(NamedTuple):
    linears: frozenset[Kinds]
    experts: frozenset[Kinds]


def _pairs(weights: list[str], inputs: list[str]) -> frozenset[Kinds]:
    return frozenset(product(weights, inputs))


# A dynamic input goes with every weight of 8 bits; a static one is of the whole tensor.
_FP8 = _pairs(["fp8 tensor", "fp8 channel"], ["fp8 static", "fp8 token", "fp8 tensor"])
_INT8 = _pairs(["int8 tensor", "int8 channel"], ["int8 static", "int8 token"])
_WORDS = _pairs(["int4 group", "int4 channel", "int8 group", "int8 channel"], ["none"])
_NVFP4 = frozenset({("nvfp4", "nvfp4")})
# quant_method -> what its class takes.
_RULES = {
    "quark": _Loads(_FP8 | {("mxfp4", "mxfp4")}, _FP8 | {("mxfp4", "mxfp4")}),
    "compressed-tensors": _Loads(
        _FP8 | _INT8 | _WORDS | _NVFP4 | _pairs(["fp8 tensor", "fp8 channel"], ["none"]), _FP8 | _WORDS | _NVFP4
    ),
}


class Sglang(Server):
    name = "sglang"
    title = "SGLang 0.5"
    evidence = " (read, not run)"

    def unknown(self, written: Written) -> str:
        method = str(written.config.get("quant_method"))
        return "" if method in _RULES else f"no rules are known of what it loads as {method}"

    def refusals(self, written: Written) -> list[str]:
        rules = _RULES.get(str(written.config.get("quant_method")))
        if rules is None:
            return [self.unknown(written)]
        found = []
        for run in written.plan.quantized_alike():
            reason = _reason(run[0], rules)
            if reason is not None:
                found.append(f"{reason} ({run[0].name}{f' and {len(run) - 1} more' if len(run) > 1 else ''})")
        if written.plan.disagreeing():
            found.append("weights that it fuses have more than one scheme")
        if written.plan.online:
            found.append("it turns no inputs while the model runs")
        return found


def _reason(target: QuantizedTarget, rules: _Loads) -> str | None:
    if target.output is not None or target.bias_spec is not None:
        return "no class for quantized outputs or biases"
    if target.role in ("head", "embedding", "router"):
        return f"no class for a quantized {target.role}"
    known = rules.linears if target.expert is None else rules.experts
    return None if kinds_of((target.weight, target.input)) in known else f"no class for {what(target)}"


SERVER = Sglang()
