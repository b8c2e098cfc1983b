"""Solves a block in stages: later weights see the inputs that the quantized earlier ones give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quarkcli.forward.statistics import Statistics
from quarkcli.forward.walk import SERVED, SOURCE
from quarkcli.job.solving import Solved
from quarkcli.numerics.quantize import dequantize
from quarkcli.plan.model import QuantizedTarget


def stages(targets: Sequence[QuantizedTarget], statistics: Statistics | None) -> list[list[QuantizedTarget]]:
    """Returns the weights by the activation that they read, in the order in which a forward reaches them.

    Weights that read no activation that was seen come first, inner weights of experts last.
    """
    order = {site: number for number, site in enumerate(statistics.reached)} if statistics is not None else {}
    found: dict[int, list[QuantizedTarget]] = {}
    for target in targets:
        unseen = len(order) if target.expert is not None else -1
        found.setdefault(order.get(target.site or "", unseen), []).append(target)
    return [found[number] for number in sorted(found)]


class Decoded:
    """The tensors of a part with those weights decoded that are solved already; the source's stay as they are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._source = tensors
        self._changed: dict[str, Tensor] = {}
        self._next: set[str | None] = set()

    def put(self, rows: Sequence[Solved], coming: Sequence[QuantizedTarget]) -> None:
        """Takes over a stage's weights. coming: the weights of the next stage."""
        self._next = {target.site for target in coming}
        for target, _, quantized in rows:
            name = target.view.tensor
            if name not in self._changed:
                self._changed[name] = self._source[name].clone()
            with torch.no_grad():
                target.view.of(self._changed[name]).copy_(dequantize(quantized, target.weight))

    def needs(self, all_: Mapping[str, set[str]]) -> dict[str, set[str]]:
        """Returns the statistics that the next stage asks for, of all."""
        return {site: kinds for site, kinds in all_.items() if site in self._next}

    def tensors(self) -> dict[str, Tensor]:
        return {**self._source, **self._changed}

    def apart(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors that are others in the two streams, by stream."""
        return {SERVED: self._changed, SOURCE: {name: self._source[name] for name in self._changed}}
