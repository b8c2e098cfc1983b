"""Gives facts about the activations of a plan: the part of each, and how weights read it."""

from __future__ import annotations

from quarkcli.plan.model import Plan
from quarkcli.spec import TensorSpec


def reads(plan: Plan, part: int) -> dict[str, TensorSpec]:
    """Returns how the quantized weights of a part read each activation.

    Left out are those that weights read as they are, or each in its own way.
    """
    found: dict[str, set[TensorSpec | None]] = {}
    for target in plan.quantized(part):
        if target.site is not None:
            found.setdefault(target.site, set()).add(target.input)
    alike = {site: specs.pop() for site, specs in found.items() if len(specs) == 1}
    return {site: spec for site, spec in alike.items() if spec is not None}


def site_parts(plan: Plan) -> dict[str, int]:
    """Returns the part index by site name, those of outputs and attention included."""
    parts = {site.name: site.part for site in plan.sites.values()}
    parts.update({target.output_site: target.part for target in plan.quantized() if target.output_site is not None})
    for module in plan.attention.values():
        parts.update({f"{module.name}.{kind}": module.part for kind in module.slots})
    return parts
