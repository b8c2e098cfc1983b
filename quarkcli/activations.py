"""Quantized activations: what linears, experts and the cache read once a model is served. Torch-free to import.

The job puts these on a block before it moves the carry on, and the evaluation rebuilds them from a written checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ActivationQuantizer:
    """Fake quantization of the input of one weight.

    tensor   file tensor whose owner's input is quantized
    spec     how
    static   stored static scale (see `numerics.quantize.static_scale`), None when it is dynamic
    expert   index of a routed expert, None for an ordinary linear
    down     the expert's inner activation instead of its input
    layer    name all experts of one layer share
    """

    tensor: str
    spec: TensorSpec
    static: Tensor | None
    expert: int | None = None
    down: bool = False
    layer: str = ""


@dataclass(frozen=True)
class CacheQuantizer:
    """Fake quantization of k and v where the cache is written; `tensor` is the weight of the k projection."""

    tensor: str
    specs: Mapping[str, TensorSpec]
    scales: Mapping[str, Tensor]


def quantizing_handlers(inputs: Iterable[ActivationQuantizer], caches: Iterable[CacheQuantizer]) -> dict[str, Any]:
    """Keyword arguments for `Runner.handlers` that fake-quantize activations."""
    linear: dict[str, Any] = {}
    layers: dict[str, tuple[str, _ExpertQuantizer]] = {}
    shared = _Last()
    for quantizer in inputs:
        if quantizer.expert is None:
            linear[quantizer.tensor] = shared.tap(quantizer)
        else:
            layer = layers.setdefault(quantizer.layer, (quantizer.tensor, _ExpertQuantizer()))[1]
            (layer.down if quantizer.down else layer.gate_up)[quantizer.expert] = quantizer
    attention = {cache.tensor: _cache_tap(cache) for cache in caches}
    return {"linear": linear, "experts": dict(layers.values()), "attention": attention}


def _at(static: Tensor | None, x: Tensor) -> Tensor | None:
    """A static scale read from a file, on the device of what it scales."""
    return static.to(x.device) if static is not None else None


class _Last:
    """q, k and v read one tensor: quantize it once."""

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
    """Quantizes what experts read (the protocol of `model.experts.ExpertHandler`)."""

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


def _cache_tap(cache: CacheQuantizer) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    from quarkcli.numerics.quantize import fake_quantize

    def tap(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if "k" in cache.specs:
            k = fake_quantize(k, cache.specs["k"], _at(cache.scales.get("k"), k))
        if "v" in cache.specs:
            v = fake_quantize(v, cache.specs["v"], _at(cache.scales.get("v"), v))
        return q, k, v

    return tap
