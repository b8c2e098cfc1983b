"""Turns `--min-kv-scale`, a lower bound for the scales of the KV cache, into entries at the end of the list."""

from __future__ import annotations

import math
from dataclasses import replace

from quarkcli.errors import ConfigError, UsageError
from quarkcli.family import Layout
from quarkcli.plan.compose import Composed
from quarkcli.plan.names import Names
from quarkcli.plan.order import Order
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.spec import TensorSpec

_FLAG = "--min-kv-scale"


def minimum_entries(composed: Composed, layout: Layout, minimum: float) -> list[Entry]:
    """Returns entries that give what k and v end as a smallest scale; of a two-level scale, its global one.

    Raises UsageError for a number that is no scale, ConfigError where k and v are not quantized or have no stored
    scale.
    """
    if not math.isfinite(minimum) or minimum <= 0:
        raise UsageError(
            f"{minimum:g} cannot be a scale",
            where=_FLAG,
            hint=f"use a positive number: {_FLAG} 0.0005",
            kind="E-FLAG-VALUE",
        )
    before = composed.entries[: composed.edits_start]
    names = Names(before)
    order = Order(before, frozenset(composed.restores), composed.exclusions_start)
    origin = Origin(f"{_FLAG} {minimum:g}")
    entries = []
    for kind in ("k", "v"):
        slots = [f"{module.name}.{kind}_bmm_quantizer" for module in layout.attention]
        names.learn(slots)
        specs = {slot: order.decision(names.of_slot([slot]), "nn.Module", weight=False)[0].spec for slot in slots}
        bounded = {slot: _bounded(spec, minimum, slot) for slot, spec in specs.items() if spec is not None}
        alike = len(set(bounded.values())) == 1 and len(bounded) == len(slots)
        rows = {f"*.{kind}_bmm_quantizer": bounded[slots[0]]} if alike else bounded
        entries += [
            Entry(p, spec_to_yaml(spec), True, None, True, origin, str(origin), True) for p, spec in rows.items()
        ]
    if not entries:
        raise ConfigError(
            "there is no KV cache in this plan", where=_FLAG, hint="add --kv-cache fp8", kind="E-KV-SCALE"
        )
    return entries


def _bounded(spec: TensorSpec, minimum: float, slot: str) -> TensorSpec:
    scale = spec.scale
    if scale is None or spec.then is not None or scale.outermost.when != "static":
        raise ConfigError(
            f"{slot} has no scale that is stored ({spec.describe()})",
            where=_FLAG,
            hint="add --kv-cache fp8",
            kind="E-KV-SCALE",
        )
    if scale.global_scale is not None:
        return replace(spec, scale=replace(scale, global_scale=replace(scale.global_scale, minimum=minimum)))
    return replace(spec, scale=replace(scale, minimum=minimum))
