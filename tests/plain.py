"""A dialect that holds every slot with every spec: codes and scales as they are, specs in native words in the config.

For tests of what lies between a plan and a dialect, whatever the dialects of servers can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from quarkcli import dialects
from quarkcli.dialects.base import Decoded, Reader, StoredAttention, StoredTarget, StoredView, TensorInfo, Writer
from quarkcli.numerics.quantize import QParams, Quantized, quantize
from quarkcli.plan.model import Attention, Plan, Target
from quarkcli.recipe.attributes import native
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.spec import TensorSpec

_TEXTS = {
    torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16",
    torch.float16: "F16",
}  # fmt: skip
_TORCH = {text: dtype for dtype, text in _TEXTS.items()}
_FIELDS = ("scale", "global_scale", "zero_point", "shift")


class PlainReader(Reader):
    name = "plain"
    quant_method = "plain"

    def view(self, config: Mapping[str, Any], headers: Mapping[str, Any]) -> StoredView:
        view = StoredView()
        for name, row in config["targets"].items():
            weight, given, output, bias = (_spec(row[kind]) for kind in ("weight", "input", "output", "bias"))
            assert weight is not None
            names = tuple(row["tensors"])
            view.targets[name] = StoredTarget(name, weight, given, tuple(row["shape"]), names, output, bias)
        for name, row in config["attention"].items():
            specs = {kind: native.to_spec(cfg) for kind, cfg in row.items()}
            scales = {kind: f"{name}.{kind}_scale" for kind, spec in specs.items() if spec.is_static}
            view.attention[name] = StoredAttention(name, specs, scales)
        return view

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        return Decoded(
            _whole(f"{stored.name}.weight", tensors),
            tensors.get(f"{stored.name}.input_scale"),
            tensors.get(f"{stored.name}.output_scale"),
            _whole(f"{stored.name}.bias", tensors) if stored.bias is not None else None,
        )

    def decode_attention(self, stored: StoredAttention, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {kind: tensors[name] for kind, name in stored.scales.items()}


class Plain(Writer):
    name = "plain"
    reader = PlainReader()

    def refusals(self, plan: Plan) -> list[str]:
        return []

    def loaders(self, plan: Plan) -> set[str]:
        return set()

    def caveat(self, plan: Plan) -> str:
        return ""

    def infos(self, target: Target) -> list[TensorInfo]:
        bias = _like(target.bias_spec, (1, target.shape[0]), target.dtype)
        weight = _like(target.weight, target.shape, target.dtype)
        kinds = (("input", target.input), ("output", target.output))
        static = {kind: torch.zeros(()) for kind, spec in kinds if spec and spec.is_static}
        assert weight is not None
        made = self.tensors(target, weight, static, bias)
        return [TensorInfo(name, _TEXTS[tensor.dtype], tuple(tensor.shape)) for name, tensor in made.items()]

    def tensors(
        self, target: Target, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        out = dict(_flat(f"{target.name}.weight", quantized))
        out |= dict(_flat(f"{target.name}.bias", bias)) if bias is not None else {}
        return out | {f"{target.name}.{kind}_scale": scale for kind, scale in static.items()}

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        static = [kind for kind, spec in attention.specs.items() if spec.is_static]
        return [TensorInfo(f"{attention.name}.{kind}_scale", "F32", ()) for kind in static]

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{attention.name}.{kind}_scale": scale for kind, scale in scales.items()}

    def config(self, plan: Plan) -> dict[str, Any]:
        targets = {
            target.name: {
                "shape": list(target.shape),
                "tensors": [info.name for info in self.infos(target)],
                "weight": _yaml(target.weight),
                "input": _yaml(target.input),
                "output": _yaml(target.output),
                "bias": _yaml(target.bias_spec),
            }
            for target in plan.quantized()
        }
        attention = {
            module.name: {kind: spec_to_yaml(spec) for kind, spec in module.specs.items()}
            for module in plan.attention.values()
            if module.specs
        }
        return {"quant_method": "plain", "targets": targets, "attention": attention}


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write and read this dialect, and no other."""
    only = Plain()
    monkeypatch.setattr(dialects, "readers", lambda: [only.reader])
    monkeypatch.setattr(dialects, "asked_for", lambda text: [only])
    monkeypatch.setattr(dialects, "choose", lambda asked, plan, favoured: [only])


def _like(spec: TensorSpec | None, shape: tuple[int, int], dtype: str) -> Quantized | None:
    return quantize(torch.ones(shape, dtype=_TORCH[dtype]), spec) if spec is not None else None


def _flat(prefix: str, quantized: Quantized) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.codes", quantized.codes
    for field in _FIELDS:
        tensor = getattr(quantized.params, field)
        if tensor is not None:
            yield f"{prefix}.{field}", tensor.clone()


def _whole(prefix: str, tensors: Mapping[str, Tensor]) -> Quantized:
    params = QParams(tensors.get(f"{prefix}.scale"), *(tensors.get(f"{prefix}.{field}") for field in _FIELDS[1:]))
    return Quantized(tensors[f"{prefix}.codes"], params)


def _yaml(spec: TensorSpec | None) -> dict[str, Any] | None:
    return spec_to_yaml(spec) if spec is not None else None


def _spec(cfg: dict[str, Any] | None) -> TensorSpec | None:
    return native.to_spec(cfg) if cfg is not None else None
