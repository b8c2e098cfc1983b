"""Makes the plan of a checkpoint that is quantized already, for a writer of another dialect."""

from __future__ import annotations

from collections.abc import Mapping

from quarkcli.errors import ModelError
from quarkcli.family import AttentionModule, Layout
from quarkcli.plan.model import ATTENTION_KINDS, TARGET_KINDS, Attention, Changes, Decision, Plan, Target
from quarkcli.plan.resolve import kept
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.spec import TensorSpec

Specs = tuple[TensorSpec, TensorSpec | None, TensorSpec | None, TensorSpec | None]  # in the order of TARGET_KINDS

_LEFT, _STORED = 0, 1
_ENTRIES = [
    Entry("*", None, False, origin=Origin("not quantized in the checkpoint")),
    Entry("*", None, True, origin=Origin("quantized in the checkpoint")),
]
_STAGE = "stored"


def of_stored(
    name: str,
    layout: Layout,
    weights: Mapping[str, Specs],
    attention: Mapping[str, Mapping[str, TensorSpec]],
    online: Mapping[str, int],
) -> Plan:
    """Returns the plan that holds what is stored and changes nothing.

    weights, attention  specs by the names of weights and attention modules; all others are not quantized
    online              weight -> size of the Hadamard blocks that its input is multiplied by while the model runs

    Raises ModelError for a name that the layout does not know.
    """
    known = {*layout.weights, *(module.name for module in layout.attention)}
    for lost in (name for name in (*weights, *attention) if name not in known):
        raise ModelError(
            "is quantized, but the model family knows no such weight or attention module",
            where=lost,
            kind="E-MODEL-FAMILY",
        )
    alike: dict[Specs | None, dict[str, Decision]] = {}
    targets = {}
    for weight in layout.weights.values():
        specs = weights.get(weight.name)
        slots = alike.setdefault(specs, _slots(specs))
        targets[weight.name] = Target.of(weight, slots, None)
    return Plan(
        scheme=name,
        family=layout.family,
        architecture=layout.architecture,
        guessed=layout.inferred,
        entries=_ENTRIES,
        parts=layout.parts,
        targets=targets,
        attention={module.name: _attention(module, attention.get(module.name, {})) for module in layout.attention},
        sites=layout.sites,
        kept=kept(layout, targets, _ENTRIES),
        algorithms=[],
        matches=[0 for _ in _ENTRIES],
        tied_head=layout.tied_head,
        doubled_head=layout.doubled_head,
        rewrites=layout.rewrites,
        norms=tuple(name for name, role in layout.tensor_roles.items() if role == "norm"),
        changes={_STAGE: Changes(online=online)} if online else {},
    )


def _slots(specs: Specs | None) -> dict[str, Decision]:
    found = specs or (None,) * len(TARGET_KINDS)
    return {kind: _decision(spec) for kind, spec in zip(TARGET_KINDS, found, strict=True)}


def _decision(spec: TensorSpec | None) -> Decision:
    return Decision(spec, _LEFT if spec is None else _STORED)


def _attention(module: AttentionModule, specs: Mapping[str, TensorSpec]) -> Attention:
    slots = {kind: _decision(specs.get(kind)) for kind in ATTENTION_KINDS}
    return Attention(module.name, module.part, module.k_proj, module.v_proj, slots, module.head_dim, module.latent)
