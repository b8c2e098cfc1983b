"""One problem whose served activation is off, and what solvers make of it; shared by the tests of gptaq and qronos."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quarkcli.algorithms import create
from quarkcli.algorithms.base import Moment, Outcome, Problem
from quarkcli.numerics.quantize import Quantized, dequantize
from quarkcli.spec import PerGroup, ScaleSpec, TensorSpec

SPECS = {
    "int3": TensorSpec("int3", PerGroup(32), ScaleSpec("bf16", "half_range")),
    "nvfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=ScaleSpec("f32"))),
    "mxfp4": TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even")),
}
N, R = 96, 64


class _Target:
    """As much of a target as solvers of columns look at."""

    def __init__(self, name: str, spec: TensorSpec) -> None:
        self.name, self.weight, self.input = name, spec, None
        self.element = spec.element


@dataclass
class Streams:
    """Activations s of the source model and x of the served one, [tokens, N] each, every eighth token held out."""

    x: Tensor
    s: Tensor
    weight: Tensor
    outcomes: list[Outcome] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def moment(self, held: bool = True, equal: bool = False) -> Moment:
        other = self.x if equal else self.s
        out = torch.arange(len(self.x)) % 8 == 7 if held else torch.zeros(len(self.x), dtype=torch.bool)

        def mean(one: Tensor, two: Tensor) -> Tensor:
            return one.T @ two / len(one)

        fit = ~out
        val = (mean(self.x[out], self.x[out]), mean(self.x[out], other[out])) if held else (None, None)
        gram = mean(self.x[fit], self.x[fit])
        cross = gram.clone() if equal else mean(self.x[fit], other[fit])
        return Moment(gram, int(fit.sum()), cross, *val)

    def problem(self, spec: TensorSpec, moment: Moment) -> Problem:
        """The problem owns its moment: it gets one of its own."""
        return Problem(
            "site", None, 0, (_Target("weight", spec),), (self.weight,), (None,), replace(moment),  # type: ignore[arg-type]
            self.warnings.append, self.outcomes.append,
        )  # fmt: skip

    def solve(self, name: str, spec: TensorSpec, moment: Moment, **parameters: Any) -> list[Quantized]:
        made = create(name, parameters).solve(self.problem(spec, moment))  # type: ignore[attr-defined]
        assert made is not None
        return made

    def lost(self, quantized: list[Quantized], spec: TensorSpec) -> float:
        """||W s - Q x||^2 over all tokens, in float64."""
        decoded = dequantize(quantized[0], spec).double()
        return float((self.s.double() @ self.weight.double().T - self.x.double() @ decoded.T).square().sum())


def streams(mismatch: float = 1.0, seed: int = 0, features: int = N, rows: int = R) -> Streams:
    g = torch.Generator().manual_seed(seed)
    tokens = min(24 * features, 6144)
    s = torch.randn(tokens, 12, generator=g) @ torch.randn(12, features, generator=g)
    s += 0.3 * torch.randn(tokens, features, generator=g)
    blur = torch.eye(features) + mismatch / features * torch.randn(features, features, generator=g)
    x = s @ blur + 0.3 * mismatch * torch.randn(tokens, features, generator=g)
    return Streams(x, s, torch.randn(rows, features, generator=g) * 0.05)
