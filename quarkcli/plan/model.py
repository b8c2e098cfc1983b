"""The plan: which slot gets which spec, and which entry decided it. Pure data, torch-free.

Names are checkpoint names from the source's headers. A *target* is one 2-D weight [out, in] that a recipe can
reach: a linear, one expert's projection (also when the file stores experts fused), an embedding or the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from quarkcli.family import Part, Site, Weight, WeightView
from quarkcli.recipe.entries import Entry
from quarkcli.spec import TensorSpec

__all__ = ["ATTENTION_KINDS", "TARGET_KINDS", "Attention", "Decision", "Part", "Plan", "Site", "Target", "WeightView"]

TARGET_KINDS = ("weight", "input", "output", "bias")
ATTENTION_KINDS = ("q", "k", "v", "p")


@dataclass(frozen=True)
class Decision:
    """What a slot ended as. `spec` None: not quantized. `entry` indexes `Plan.entries`; None: nothing matched."""

    spec: TensorSpec | None
    entry: int | None


@dataclass(frozen=True)
class Target(Weight):
    """A weight with what its slots ended as: `slots` holds a decision per kind in TARGET_KINDS."""

    slots: dict[str, Decision] = field(default_factory=dict)

    @property
    def weight(self) -> TensorSpec | None:
        return self.slots["weight"].spec

    @property
    def input(self) -> TensorSpec | None:
        """Spec of the activation it reads; only where the weight is quantized. An embedding reads token numbers."""
        return self.slots["input"].spec if self.weight is not None and not self.is_embedding else None

    @property
    def output(self) -> TensorSpec | None:
        """Spec of what the module returns; only where the weight is quantized, and never of an embedding."""
        return self.slots["output"].spec if self.weight is not None and not self.is_embedding else None

    @property
    def bias_spec(self) -> TensorSpec | None:
        """Spec of the bias [1, out]; only where there is one and the weight is quantized."""
        return self.slots["bias"].spec if self.weight is not None and self.bias is not None else None

    @property
    def is_embedding(self) -> bool:
        return self.parent_class == "nn.Embedding"

    @property
    def output_site(self) -> str | None:
        """Name of the activation that the module returns, for its statistics; None when no forward pass reaches it."""
        return f"{self.name}.output" if self.site is not None else None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Attention:
    """The attention slots of one block. `name` is the parent of the k projection.

    head_dim   features of one head of q, k and v; None when the config does not say
    latent     the cache keeps a compressed latent, not k and v
    """

    name: str
    part: int
    k_proj: str
    v_proj: str
    slots: dict[str, Decision]
    head_dim: int | None = None
    latent: bool = False

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The specs of the slots that are on, by kind."""
        return {kind: decision.spec for kind, decision in self.slots.items() if decision.spec is not None}


class Activation(NamedTuple):
    """A quantized activation.

    key    `<module>.input`, `<module>.output`, or `<attention>.<kind>`: where its static scale belongs
    site   where it is measured, None when no forward pass reaches it
    """

    key: str
    site: str | None
    spec: TensorSpec


@dataclass
class Plan:
    """A recipe resolved against one model's headers."""

    scheme: str
    family: str
    entries: list[Entry]
    parts: list[Part]
    targets: dict[str, Target]
    attention: dict[str, Attention]
    sites: dict[str, Site]
    kept: dict[str, str]  # source tensor -> why it is copied as it is
    algorithms: list[tuple[str, dict[str, object]]]
    matches: list[int]  # per entry: how many slots it matched
    tied_head: str | None = None  # head absent from the file because it is the embedding
    warnings: list[str] = field(default_factory=list)
    restores: frozenset[int] = frozenset()  # entries that bring back what was said before the exclusions

    def quantized(self, part: int | None = None) -> Iterator[Target]:
        """Targets whose weight is quantized, in plan order; of one part when given."""
        for target in self.targets.values():
            if target.weight is not None and (part is None or target.part == part):
                yield target

    def activations(self, part: int | None = None) -> Iterator[Activation]:
        """Every quantized input, output and attention operand, in plan order; of one part when given."""
        for target in self.quantized(part):
            if target.input is not None:
                yield Activation(f"{target.name}.input", target.site, target.input)
            if target.output is not None:
                yield Activation(f"{target.name}.output", target.output_site, target.output)
        for module in self.attention.values():
            if part is None or module.part == part:
                for kind, spec in module.specs.items():
                    yield Activation(f"{module.name}.{kind}", f"{module.name}.{kind}", spec)

    def slots(self) -> Iterator[tuple[str, Decision]]:
        """Every slot by its full name, in plan order."""
        for target in self.targets.values():
            for kind, decision in target.slots.items():
                yield f"{target.name}.{kind}_quantizer", decision
        for attention in self.attention.values():
            for kind, decision in attention.slots.items():
                yield f"{attention.name}.{kind}_bmm_quantizer", decision
