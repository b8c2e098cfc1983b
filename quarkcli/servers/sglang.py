"""SGLang: rules read from its source, never run here.

https://github.com/sgl-project/sglang, python/sglang/srt/layers/quantization/. The dialects say what its classes for
them take, and where that was read (`Writer.classes`). Of other methods it knows the names
(`BASE_QUANTIZATION_METHODS`); their classes were not read.
"""

from __future__ import annotations

from quarkcli.dialects._kinds import kinds_of
from quarkcli.dialects.base import Classes
from quarkcli.plan.model import QuantizedTarget
from quarkcli.servers._kernels import NVIDIA, Kernel
from quarkcli.servers.base import Server, Written, what


class Sglang(Server):
    name = "sglang"
    title = "SGLang 0.5"
    evidence = " (read, not run)"
    kernels_from = "what is published of it; neither its source was read for this nor a GPU tried"
    kernels = (
        Kernel("fp8 *", "fp8 *", fast="ada hopper blackwell cdna3 cdna4", weights="ampere"),
        Kernel("int8 *", "int8 *", fast="ampere ada hopper"),
        Kernel("*int4 *", "none", weights=NVIDIA),
        Kernel("mxfp4*", "mxfp4*", fast="cdna4"),
        Kernel("nvfp4", "nvfp4", fast="blackwell"),
    )

    def _classes(self, written: Written) -> Classes | None:
        return written.writer.classes.get(self.name) if written.writer is not None else None

    def unknown(self, written: Written) -> str:
        return "" if self._classes(written) else f"no rules are known of what it loads as {written.dialect}"

    def refusals(self, written: Written) -> list[str]:
        rules = self._classes(written)
        if rules is None:
            return [self.unknown(written)]
        found = self.misnamed(written)
        for run in written.plan.quantized_alike():
            reason = _reason(run[0], rules)
            if reason is not None:
                found.append(f"{reason} ({run[0].name}{f' and {len(run) - 1} more' if len(run) > 1 else ''})")
        if written.plan.disagreeing():
            found.append("weights that it fuses have more than one scheme")
        if written.plan.online:
            found.append("it turns no inputs while the model runs")
        return found


def _reason(target: QuantizedTarget, rules: Classes) -> str | None:
    if target.output is not None or target.bias_spec is not None:
        return "no class for quantized outputs or biases"
    if target.role in ("head", "embedding", "router"):
        return f"no class for a quantized {target.role}"
    known = rules.linears if target.expert is None else rules.experts
    return None if kinds_of((target.weight, target.input)) in known else f"no class for {what(target)}"


SERVER = Sglang()
