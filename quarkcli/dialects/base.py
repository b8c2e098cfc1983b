"""The contract of a dialect. Facts (what it can hold, names, sizes, config) are torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from quarkcli.plan.model import Attention, Plan, Target
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized


class TensorInfo(NamedTuple):
    """Name, safetensors dtype (`U8`, `F8_E4M3`, `I32`, `BF16`, `F32` ...) and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class HeaderLike(Protocol):
    """The part of a safetensors header a reader needs."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredTarget:
    """One quantized weight found in a checkpoint.

    shape    (out, in) of the weight it decodes to
    tensors  the file tensors it is made of, in the checkpoint's names
    output   spec of the module's output, None when it is not quantized
    bias     spec of its bias, None when the bias is an ordinary tensor
    """

    name: str
    weight: TensorSpec
    input: TensorSpec | None
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    output: TensorSpec | None = None
    bias: TensorSpec | None = None


@dataclass
class Decoded:
    """What the tensors of a target hold.

    weight         codes and scales as they were before packing
    input, output  static scales (multipliers, float32 []), None when there is none
    bias           codes and scales of a quantized bias [1, out]
    """

    weight: Quantized
    input: Tensor | None = None
    output: Tensor | None = None
    bias: Quantized | None = None


@dataclass(frozen=True)
class StoredAttention:
    """Attention slots found in a checkpoint: `specs` and the names of scalar `scales`, both by kind (q, k, v, p)."""

    name: str
    specs: dict[str, TensorSpec]
    scales: dict[str, str]


@dataclass
class StoredView:
    """What a quantized checkpoint holds; every tensor not named here is an ordinary one."""

    targets: dict[str, StoredTarget] = field(default_factory=dict)
    attention: dict[str, StoredAttention] = field(default_factory=dict)


class Dialect(Protocol):
    """One on-disk convention."""

    name: str
    quant_method: str

    def refusals(self, plan: Plan) -> list[str]:
        """Why this dialect cannot hold the plan, one sentence each; empty when it can."""

    def loaders(self, plan: Plan) -> set[str]:
        """Which of `vllm`, `transformers` load what this dialect would write for the plan."""

    def caveat(self, plan: Plan) -> str:
        """What some releases of a loader do with it otherwise, a sentence; empty when all do the same."""

    def infos(self, target: Target) -> list[TensorInfo]:
        """The tensors that replace the target's weight, exactly as `tensors` will return them."""

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        """The tensors added for the enabled attention slots."""

    def tensors(
        self, target: Target, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        """Packed tensors by file name.

        static   scales (float32 [], from `static_scale`) by slot kind: `input`, `output`; those that are stored
        bias     codes of the bias [1, out] where its slot is quantized
        """

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale tensors by file name from multipliers (amax / 448) by kind."""

    def config(self, plan: Plan) -> dict[str, Any]:
        """The `quantization_config` object."""

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """What a written checkpoint holds, from its `quantization_config` and headers. Raises ModelError."""

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        """Codes and scales as they were before packing, and the static scales."""

    def decode_attention(self, stored: StoredAttention, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scale multipliers (float32 []) by kind."""
