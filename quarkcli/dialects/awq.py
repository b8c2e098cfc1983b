"""The awq dialect: AutoAWQ's GEMM layout, 4-bit codes with whole zero points. vLLM reads it.

Layout and config as AutoAWQ writes them, and vLLM 0.32 reads them (`quantization/auto_awq.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.dialects import _sglang as sglang
from quarkcli.dialects import _shared as shared
from quarkcli.dialects import _words as words
from quarkcli.dialects._documents import AwqConfig
from quarkcli.dialects.base import (
    CONFIG_FILE,
    CONFIG_KEY,
    Classes,
    Decoded,
    Reader,
    StoredTarget,
    StoredView,
    TensorInfo,
    Writer,
)
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

NAME = "awq"
_VERSION = "gemm"
_BITS = 4
_PER_WORD = words.WORD_BITS // _BITS
_HOLDS = frozenset({("uint4 group", "none"), ("uint4 channel", "none")})
_PLACES = shared.Places(_HOLDS, attention=frozenset())
_EXPERTS = frozenset({("uint4 group", "none")})


def _sglang_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what SGLang does not load besides: members of fused modules and experts that are left out by name."""
    found = sglang.unsaid(plan, config.get("modules_to_not_convert") or (), all_classes=True)
    return found + sglang.kept_experts(plan, "it looks for the name of all experts of a layer among those left out")


_SGLANG = Classes(
    _HOLDS, _HOLDS, "AWQMarlinConfig, AWQConfig in layers/quantization/awq/awq.py", heads=True, faults=_sglang_faults
)


class AwqReader(Reader):
    name = NAME
    quant_method = NAME
    beside = ("quant_config.json", "quantize_config.json")
    lists = ("modules_to_not_convert",)
    unlisted = frozenset({"embedding", "head"})
    lists_parts = True
    head_key = words.HEAD

    def packs(self, headers: Mapping[str, HeaderLike]) -> bool:
        return words.packed_along(headers) == words.OUTPUTS

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint: what has codes is quantized, whatever parts of names the config leaves out.

        Raises ModelError for another layout than GEMM, and for tensors that do not fit the config.
        """
        check(AwqConfig, config, CONFIG_KEY)
        version = config.get("version") or config.get("checkpoint_format") or config.get("format") or _VERSION
        bits = config.get("bits", config.get("w_bit", _BITS))
        if str(version).lower() != _VERSION:
            raise ModelError(
                f"quark cannot read AWQ version {version!r}, only {_VERSION}", where=CONFIG_KEY, kind="E-SOURCE-FORMAT"
            )
        if bits != _BITS:
            raise ModelError(
                f"quark cannot read AWQ codes of {bits} bits, only those of {_BITS}",
                where=CONFIG_KEY,
                kind="E-SOURCE-FORMAT",
            )
        # GPTQModel says so of symmetric weights, whose zero points are in the files all the same.
        if config.get("zero_point", True) is False and not any(name.endswith(f".{words.ZEROS}") for name in headers):
            raise ModelError(
                "quark cannot read AWQ weights without zero points", where=CONFIG_KEY, kind="E-SOURCE-FORMAT"
            )
        size = config.get("group_size", config.get("q_group_size"))
        found = (_stored(module, size, headers) for module in words.modules(headers))
        return StoredView({stored.name: stored for stored in found})

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        from quarkcli.numerics.packing import unpack_awq
        from quarkcli.numerics.quantize import QParams, Quantized

        local = stored.own(tensors)
        codes, zeros = (words.transposed(unpack_awq(local[name], signed=False)) for name in (words.CODES, words.ZEROS))
        return Decoded(Quantized(codes, QParams(words.transposed(local[words.SCALES]), zero_point=zeros)))


READER = AwqReader()


class Awq(Writer):
    name = NAME
    reader = READER
    classes: ClassVar[Mapping[str, Classes]] = {sglang.NAME: _SGLANG, "tensorrt-llm": shared.TENSORRT_LLM_NONE}

    def refusals(self, plan: Plan) -> list[str]:
        return words.refusals(plan, self.name, _PLACES) + _left_out_by_parts(plan)

    def loaders(self, plan: Plan) -> set[str]:
        """Returns `vllm` where it loads the plan; transformers needs gptqmodel, which was not tried."""
        return {"vllm"} if not self.refusals(plan) and shared.vllm_loads(plan, _HOLDS, _EXPERTS) else set()

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        return _layout(target.name, target.weight, target.shape, target.dtype)

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        from quarkcli.numerics.packing import pack_awq

        params = quantized.params
        assert params.scale is not None and params.zero_point is not None
        return {
            f"{target.name}.{words.CODES}": pack_awq(words.transposed(quantized.codes)),
            f"{target.name}.{words.ZEROS}": pack_awq(words.transposed(params.zero_point)),
            f"{target.name}.{words.SCALES}": words.transposed(params.scale),
        }

    def config(self, plan: Plan) -> dict[str, Any]:
        quantized = list(plan.quantized())
        return {
            "quant_method": NAME,
            "version": _VERSION,
            "bits": _BITS,
            "group_size": words.group_size(quantized[0].weight) if quantized else words.WHOLE_ROW,
            "zero_point": True,
            words.HEAD: any(target.role == "head" for target in quantized),
            "modules_to_not_convert": _left_out(plan),
        }

    def files(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return {CONFIG_FILE: {CONFIG_KEY: self.config(plan)}}


def _left_out(plan: Plan) -> list[str]:
    return [*(target.name for target in shared.unquantized(plan)), *shared.further(plan)]


def _left_out_by_parts(plan: Plan) -> list[str]:
    """Returns a sentence where the name of a module that is left out is part of a quantized one's: both would be."""
    left, quantized = _left_out(plan), [target.name for target in plan.quantized()]
    joined = "\n".join(quantized)
    reasons = {}
    for name in left:
        if name in joined:
            other = next(other for other in quantized if name in other)
            reasons[f"{NAME} excludes modules by parts of their names, and that would exclude {other} too"] = [name]
    return shared.sentences(reasons)


def _layout(module: str, spec: TensorSpec, shape: tuple[int, int], dtype: str) -> list[TensorInfo]:
    rows, cols = shape
    codes = TensorInfo(f"{module}.{words.CODES}", "I32", (cols, rows // _PER_WORD))
    return [codes, *words.scale_infos(module, spec, shape, dtype)]


def _stored(module: str, size: int | None, headers: Mapping[str, HeaderLike]) -> StoredTarget:
    cols, packed = words.features(module, headers)
    shape = (packed * _PER_WORD, cols)
    spec = words.read_spec(module, "uint4", size, cols, headers)
    names = shared.check_headers(_layout(module, spec, shape, "F16"), headers)
    return StoredTarget(module, spec, None, shape, names)


WRITER = Awq()
