"""The mxfp4 dialect: experts of gpt-oss as they are published, everything else whole. vLLM and transformers read it.

Two tensors hold a projection of all experts of a layer: `<name>_blocks` U8 [experts, out, in / 32, 16], two codes to a
byte, the even column in the low bits, and `<name>_scales` U8 [experts, out, in / 32], exponents + 127. Rows of gate and
up lie in turn. As in `openai/gpt-oss-20b` and transformers' `integrations/mxfp4.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._documents import Mxfp4Config
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
from quarkcli.family import HeaderLike, WeightView
from quarkcli.plan.model import Plan, QuantizedTarget, Target

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

NAME = "mxfp4"
_SPEC = kinds.weight_spec("mxfp4")
_GROUP, _BYTES = 32, 16
_ENDS = ("_blocks", "_scales")


class Mxfp4Reader(Reader):
    name = NAME
    quant_method = NAME
    lists = ("modules_to_not_convert",)
    unlisted = frozenset({"embedding", "head"})

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint. Raises ModelError for blocks without scales, and for other tensors."""
        check(Mxfp4Config, config, CONFIG_KEY)
        view = StoredView()
        for name in headers:
            fused = name.removesuffix(_ENDS[0])
            if fused != name:
                view.targets |= {stored.name: stored for stored in _stored(fused, headers)}
        return view

    def untouched(self, config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
        """Returns all of them that are no expert: the scheme is for experts alone, whatever is listed."""
        experts = re.compile(
            rf".*\.\d+\.({'|'.join(leaf for leaves in shared.FUSED_EXPERTS.values() for leaf in leaves)})$"
        )
        return {module for module in modules if not experts.match(module)}

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        from quarkcli.numerics.packed import Packed, Streamed
        from quarkcli.numerics.quantize import QParams

        blocks, scales = (stored.own(tensors)[end] for end in _ENDS)
        packed = Packed(blocks.reshape(len(blocks), -1).contiguous(), QParams(scales.contiguous()))
        return Decoded(Streamed(packed, stored.weight, stored.shape[1]))


READER = Mxfp4Reader()


class Mxfp4(Writer):
    name = NAME
    reader = READER
    classes: ClassVar[Mapping[str, Classes]] = {
        "sglang": Classes(
            frozenset(), frozenset({("mxfp4", "none")}), "Mxfp4Config, Mxfp4MoEMethod in layers/quantization/mxfp4.py"
        ),
        "tensorrt-llm": Classes(
            frozenset(),
            frozenset({("mxfp4", "none")}),
            "ModelConfig.load_hf_quant_config in tensorrt_llm/_torch/model_config.py",
        ),
    }
    preferences: ClassVar[Mapping[str, int]] = {NAME: 30}  # what it holds is gpt-oss as its own servers expect it

    def refusals(self, plan: Plan) -> list[str]:
        """Returns the reasons the plan cannot be held: it is for all fused experts of a model, and nothing else."""
        return _schemes(plan) + _sentences(plan, _place_reasons)

    def loaders(self, plan: Plan) -> set[str]:
        return set() if _schemes(plan) else {"vllm", "transformers"}

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        rows, groups = target.shape[0], target.shape[1] // _GROUP
        blocks, scales = self.places(target)
        return [TensorInfo(blocks, "U8", (rows, groups, _BYTES)), TensorInfo(scales, "U8", (rows, groups))]

    def places(self, target: Target) -> dict[str, WeightView]:
        view = target.view
        return {
            f"{target.name}.{end}": WeightView(view.tensor + end, view.expert, rows=view.rows) for end in _ENDS
        }  # fmt: skip

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        scale = quantized.params.scale
        assert scale is not None
        blocks = quantized.stream(4).reshape(*scale.shape, _BYTES)
        return dict(zip(self.places(target), (blocks, scale.contiguous()), strict=True))

    def config(self, plan: Plan) -> dict[str, Any]:
        """Returns the config; numbers of blocks are stars in it, as in the published files."""
        left = [target.name for target in plan.targets.values() if target.weight is None]
        names = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in [*left, *shared.tied_head(plan)])
        return {"quant_method": NAME, "modules_to_not_convert": list(dict.fromkeys(names))}

    def files(self, plan: Plan) -> dict[str, dict[str, Any]]:
        return {CONFIG_FILE: {CONFIG_KEY: self.config(plan)}}


def _schemes(plan: Plan) -> list[str]:
    """Returns the reasons for which what is quantized, and how, cannot be held."""
    found = shared.refusals(plan, NAME, shared.Places(frozenset({("mxfp4", "none")}), attention=frozenset()))
    if not any(target.expert for target in plan.quantized()):
        found.append(f"{NAME} holds only experts, and no expert is quantized")
    return found + _sentences(plan, _scheme_reasons)


def _sentences(plan: Plan, reasons_of: Callable[[Target], Iterator[str]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for target in plan.targets.values():
        for reason in reasons_of(target):
            reasons.setdefault(reason, []).append(target.name)
    return shared.sentences(reasons)


def _scheme_reasons(target: Target) -> Iterator[str]:
    if target.expert is None and target.weight is not None:
        yield f"{NAME} holds only quantized experts"
    if target.expert is not None and target.weight is None:
        yield f"{NAME} has one scheme for all experts, and this one is not quantized"


def _place_reasons(target: Target) -> Iterator[str]:
    if target.expert is None:
        return
    leaf = target.view.tensor.rpartition(".")[2]
    turns = len(shared.FUSED_EXPERTS.get(leaf, ()))
    step = target.view.rows[2] if target.view.rows is not None else 1
    if not turns or target.view.expert is None or step != turns:
        yield f"{NAME} holds only experts stored as in gpt-oss: one tensor for all, rows of gate and up in turn"


def _stored(fused: str, headers: Mapping[str, HeaderLike]) -> Iterator[StoredTarget]:
    """Yields every expert's projections that lie in a fused tensor. Raises ModelError."""
    blocks, scales = (fused + end for end in _ENDS)
    prefix, _, leaf = fused.rpartition(".")
    shape = headers[blocks].shape
    leaves = shared.FUSED_EXPERTS.get(leaf)  # their rows lie in turn
    if leaves is None or len(shape) != 4 or shape[1] % len(leaves):
        raise ModelError(
            f"blocks of shape {list(shape)} are not those of gpt-oss' experts",
            where=blocks,
            kind="E-SOURCE-CONTRADICTS",
        )
    experts, rows, groups = shape[:3]
    names = shared.check_headers(
        [TensorInfo(blocks, "U8", (experts, rows, groups, _BYTES)), TensorInfo(scales, "U8", (experts, rows, groups))],
        headers,
    )
    for expert in range(experts):
        for start, projection in enumerate(leaves):
            turn = (start, rows, len(leaves)) if len(leaves) > 1 else None
            places = {end: WeightView(fused + end, expert, rows=turn) for end in _ENDS}
            own = (rows // len(leaves), groups * _GROUP)
            yield StoredTarget(f"{prefix}.{expert}.{projection}", _SPEC, None, own, names, places=places)


WRITER = Mxfp4()
