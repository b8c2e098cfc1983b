"""Quantizes activations as a server will: inputs of linears, experts and attention, and outputs of linears.

Torch-free to import.

The job puts these on a block before it moves hidden states on; the evaluation rebuilds them from a written checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quarkcli.model.handlers import Handlers
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ActivationQuantizer:
    """Fake quantization of the input of one weight, or of its module's output.

    tensor   file tensor whose owner's input or output is quantized
    spec     how
    static   stored static scale (see `numerics.quantize.static_scale`), None when it is dynamic
    expert   index of a routed expert, None for an ordinary linear
    down     the expert's inner activation instead of its input
    layer    name all experts of one layer share
    output   the module's output instead of its input
    """

    tensor: str
    spec: TensorSpec
    static: Tensor | None
    expert: int | None = None
    down: bool = False
    layer: str = ""
    output: bool = False


@dataclass(frozen=True)
class AttentionQuantizer:
    """Fake quantization inside one attention.

    tensor  weight of the k projection
    specs   by kind: q, k and v after rotary embedding, where the cache is written; p: the softmax output
    scales  stored static scales by kind
    """

    tensor: str
    specs: Mapping[str, TensorSpec]
    scales: Mapping[str, Tensor]

    def quantize(self, kind: str, x: Tensor) -> Tensor:
        """Returns `x` [b, heads, t, features] quantized; as it is when no spec is given for its kind."""
        from quarkcli.numerics.quantize import fake_quantize

        return fake_quantize(x, self.specs[kind], _at(self.scales.get(kind), x)) if kind in self.specs else x


def quantizing_handlers(
    activations: Iterable[ActivationQuantizer], attentions: Iterable[AttentionQuantizer]
) -> Handlers:
    """Returns the handlers that fake-quantize activations."""
    linear: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    layers: dict[str, tuple[str, _ExpertQuantizer]] = {}
    shared = _Last()
    for quantizer in activations:
        if quantizer.output:
            outputs[quantizer.tensor] = _Last().tap(quantizer)
        elif quantizer.expert is None:
            linear[quantizer.tensor] = shared.tap(quantizer)
        else:
            layer = layers.setdefault(quantizer.layer, (quantizer.tensor, _ExpertQuantizer()))[1]
            (layer.down if quantizer.down else layer.gate_up)[quantizer.expert] = quantizer
    attention: dict[str, Any] = {}
    softmax: dict[str, Any] = {}
    for inner in attentions:
        if inner.specs.keys() - {"p"}:
            attention[inner.tensor] = _operand_tap(inner)
        if "p" in inner.specs:
            softmax[inner.tensor] = partial(inner.quantize, "p")
    return Handlers(linear, outputs, dict(layers.values()), attention, softmax)


def turns(blocks: Mapping[str, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns what turns the inputs of weights by block Hadamards, by file tensor. `blocks`: their sizes."""
    last = _LastTurned()
    return {tensor: partial(last.turned, block) for tensor, block in blocks.items()}


class _LastTurned:
    """Remembers the last turned tensor: q, k and v read one tensor, which is turned once, and stays one."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.block = 0
        self.result: Tensor | None = None

    def turned(self, block: int, x: Tensor) -> Tensor:
        from quarkcli.numerics.online import turned

        if self.source is not x or self.block != block or self.result is None:
            self.source, self.block = x, block
            self.result = turned(x, block)
        return self.result


def _at(static: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns a static scale read from a file, on the device of the tensor it scales."""
    return static.to(x.device) if static is not None else None


class _Last:
    """Remembers the last quantized tensor: q, k and v read one tensor, which is quantized once."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.key: Any = None
        self.result: Tensor | None = None

    def tap(self, quantizer: ActivationQuantizer) -> Callable[[Tensor], Tensor]:
        static = quantizer.static
        key = (quantizer.spec, None if static is None else float(static))

        from quarkcli.numerics.quantize import fake_quantize

        def quantize(x: Tensor) -> Tensor:
            if self.source is not x or self.key != key or self.result is None:
                self.source, self.key = x, key
                self.result = fake_quantize(x, quantizer.spec, _at(static, x))
            return self.result

        return quantize


class _ExpertQuantizer:
    """Quantizes the inputs of experts (the protocol of `model.experts.ExpertHandler`)."""

    def __init__(self) -> None:
        self.gate_up: dict[int, ActivationQuantizer] = {}
        self.down: dict[int, ActivationQuantizer] = {}

    def observe(self, module: Any, hidden: Tensor, top_k_index: Tensor) -> None:
        return None

    def gate_up_input(self, expert: int, x: Tensor) -> Tensor:
        return self._apply(self.gate_up.get(expert), x)

    def down_input(self, expert: int, h: Tensor) -> Tensor:
        return self._apply(self.down.get(expert), h)

    def _apply(self, quantizer: ActivationQuantizer | None, x: Tensor) -> Tensor:
        if quantizer is None or not x.numel():
            return x
        from quarkcli.numerics.quantize import fake_quantize

        return fake_quantize(x, quantizer.spec, _at(quantizer.static, x))


def _operand_tap(inner: AttentionQuantizer) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    def tap(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return inner.quantize("q", q), inner.quantize("k", k), inner.quantize("v", v)

    return tap
