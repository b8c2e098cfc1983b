"""Defines the plan: the spec of each slot, and the entry that decided it. Pure data, torch-free.

Names are checkpoint names from the source's headers. A *target* is one 2-D weight [out, in] that a recipe can
reach: a linear, one expert's projection (also when the file stores experts fused), an embedding or the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar, cast

from quarkcli.family import TIED, Part, Rewrites, Site, Weight, WeightView
from quarkcli.plan.changes import Added, Changes
from quarkcli.plan.fused import matrix
from quarkcli.recipe.attributes import Cfg
from quarkcli.recipe.entries import ATTENTION_KINDS, TARGET_KINDS, Entry, Share
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from quarkcli.plan.compose import Basis

__all__ = [
    "ATTENTION_KINDS", "TARGET_KINDS", "Added", "Attention", "Changes", "Decision", "Fate", "Part", "Plan",
    "QuantizedTarget", "Site", "Target", "WeightView", "is_quantized",
]  # fmt: skip

Known = TypeVar("Known")


@dataclass(frozen=True)
class Decision:
    """Holds the outcome for one slot.

    spec   None: not quantized
    entry  the last one that spoke of it, an index into `Plan.entries`; None: nothing matched
    cfg    the attributes as written, or native where an entry changed a stage of a chain; a slot that is off keeps
           them; None: it was never given any
    """

    spec: TensorSpec | None
    entry: int | None
    cfg: Cfg | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Target(Weight):
    """A weight with what its slots ended as.

    slots   a decision per kind in TARGET_KINDS; targets that ended alike share the object
    shares  the scale group that the recipe puts it in, None: the family's
    """

    slots: Mapping[str, Decision] = field(default_factory=dict)
    shares: str | None = None

    @classmethod
    def of(cls, weight: Weight, slots: Mapping[str, Decision], shares: str | None) -> Target:
        """Returns a weight with its decisions. Fields are taken over at once: a large model has tens of thousands."""
        target = cls.__new__(cls)
        vars(target).update(vars(weight), slots=slots, shares=shares)
        return target

    @property
    def scale_group(self) -> str:
        """Returns the name of the scale group. Its weights share their per-tensor scales."""
        return self.group if self.shares is None else self.shares

    @property
    def weight(self) -> TensorSpec | None:
        return self.slots["weight"].spec

    @property
    def input(self) -> TensorSpec | None:
        """Returns the spec of the activation it reads; only where the weight is quantized.

        An embedding reads token numbers.
        """
        return self.slots["input"].spec if self.weight is not None and not self.is_embedding else None

    @property
    def output(self) -> TensorSpec | None:
        """Returns the spec of what the module returns.

        It is None where the weight is not quantized, and always for an embedding.
        """
        return self.slots["output"].spec if self.weight is not None and not self.is_embedding else None

    @property
    def bias_spec(self) -> TensorSpec | None:
        """Returns the spec of the bias [1, out]; only where there is one and the weight is quantized."""
        return self.slots["bias"].spec if self.weight is not None and self.bias is not None else None

    @property
    def is_embedding(self) -> bool:
        return self.parent_class == "nn.Embedding"

    @property
    def output_site(self) -> str | None:
        """Returns the name of the activation that the module returns, for its statistics.

        It is None when no forward pass reaches the module.
        """
        return f"{self.name}.output" if self.site is not None else None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


class QuantizedTarget(Target):
    """A target whose weight is quantized: a type for functions that take no other. `is_quantized` tells."""

    if TYPE_CHECKING:

        @property
        def weight(self) -> TensorSpec: ...


def is_quantized(target: Target) -> TypeGuard[QuantizedTarget]:
    return target.weight is not None


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
    slots: Mapping[str, Decision]
    head_dim: int | None = None
    latent: bool = False

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Returns the specs of the slots that are on, by kind."""
        return {kind: decision.spec for kind, decision in self.slots.items() if decision.spec is not None}


class Activation(NamedTuple):
    """A quantized activation.

    key     `<module>.input`, `<module>.output`, or `<attention>.<kind>`: where its static scale belongs
    site    where it is measured, None when no forward pass reaches it
    expert  the expert whose tokens alone are measured; None: all that pass the site
    """

    key: str
    site: str | None
    spec: TensorSpec
    expert: int | None = None


class Fate(NamedTuple):
    """Says whether a source tensor is `kept`, `quantized`, `changed` or `dropped`, and why or by which transform."""

    kind: str
    reason: str


class Step(NamedTuple):
    """An algorithm with its parameters. `weights`: names of those it works on; None: all."""

    name: str
    parameters: dict[str, Any]
    weights: frozenset[str] | None = None


@dataclass(repr=False)
class Plan:
    """A recipe resolved against one model's headers.

    targets           to change some, put another mapping in its place
    kept              source tensor -> why it is copied as it is
    matches           per entry: how many slots it matched
    tied_head         head absent from the file because it is the embedding
    doubled_head      tensors of a head and of the embedding, where config.json says that the two are one
    untied            they have different values in the source
    restores          entries that bring back what was said before the exclusions
    exclusions_start  index of the first exclusion
    share             rows of the recipe that join weights into scale groups; None: what the family says; empty: nothing
                      shares its scales
    own_expert_inputs  whether every expert has a static input scale of its own; else those of a layer share one
    rewrites          how blocks may be rewritten without changing what they compute, from the family file
    norms             tensors of norms, from the family file
    matrices          modules with a matrix that no recipe can reach; a loader may take them for linears
    changes           what transforms and tuners will change, by their names
    joined            attention module -> the kinds (q, k, v) that the one scale of its cache is for; modules with a
                      scale for each are left out
    carried           weights that have the source's own codes and scales; no algorithm works on them
    architecture      the class that config.json names; empty: none
    guessed           no family file knows the model: roles and names were guessed from tensor names
    basis             what it was resolved from, for edits (`plan.compose.Basis`)
    """

    scheme: str
    family: str
    entries: list[Entry]
    parts: list[Part]
    targets: Mapping[str, Target]
    attention: dict[str, Attention]
    sites: dict[str, Site]
    kept: dict[str, str]
    algorithms: list[Step]
    matches: list[int]
    tied_head: str | None = None
    doubled_head: tuple[str, str] | None = None
    untied: bool = False
    warnings: list[str] = field(default_factory=list)
    restores: frozenset[int] = frozenset()
    exclusions_start: int = 0
    share: Sequence[Share] | None = None
    own_expert_inputs: bool = False
    rewrites: Rewrites = field(default_factory=Rewrites)
    norms: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    changes: dict[str, Changes] = field(default_factory=dict)
    joined: dict[str, frozenset[str]] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    architecture: str = ""
    guessed: bool = False
    basis: Basis | None = field(default=None, repr=False, compare=False)
    _known: tuple[Mapping[str, Target], dict[str, Any]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        from quarkcli.plan.view import line

        return line(self)

    def _repr_html_(self) -> str:
        from quarkcli.plan.view import table

        return table(self)

    def once(self, name: str, make: Callable[[], Known]) -> Known:
        """Returns what `make` finds out about these targets, under a name: it is called once."""
        if self._known is None or self._known[0] is not self.targets:
            self._known = self.targets, {}
        facts = self._known[1]
        if name not in facts:
            facts[name] = make()
        return cast("Known", facts[name])

    def alike(self) -> list[list[Target]]:
        """Returns runs of targets that differ only in their names and places, by first appearance.

        Specs, shape, dtype, role and how the file stores them are one, so that facts about the first hold for all.
        """
        return self.once("alike", self._runs)

    def _runs(self) -> list[list[Target]]:
        runs: dict[tuple[object, ...], list[Target]] = {}
        for t in self.targets.values():
            stored = (t.bias is None, t.expert is None, t.view.expert is None, t.site is None)
            runs.setdefault((id(t.slots), t.shape, t.role, t.dtype, *stored), []).append(t)
        return list(runs.values())

    def quantized_alike(self) -> Iterator[list[QuantizedTarget]]:
        """Returns the runs of `alike` whose weights are quantized."""
        return (cast("list[QuantizedTarget]", run) for run in self.alike() if is_quantized(run[0]))

    def disagreeing(self) -> list[list[Target]]:
        """Returns the members of each fused group that has more than one (weight, input) spec."""
        return self.once("disagreeing", self._disagreeing)

    def _disagreeing(self) -> list[list[Target]]:
        slots: dict[str, Mapping[str, Decision]] = {}
        mixed = {matrix(t) for t in self.targets.values() if slots.setdefault(matrix(t), t.slots) is not t.slots}
        groups: dict[str, list[Target]] = {}
        for target in self.targets.values() if mixed else ():
            if matrix(target) in mixed:
                groups.setdefault(matrix(target), []).append(target)
        return [members for members in groups.values() if len({(t.weight, t.input) for t in members}) > 1]

    def shared(self) -> dict[str, list[Target]]:
        """Returns weights that share their per-tensor scales, by scale group; groups of two and more."""
        groups: dict[str, list[Target]] = {}
        for run in self.quantized_alike():
            for target in run if run[0].weight.has_tensor_scale else ():
                groups.setdefault(target.scale_group, []).append(target)
        return {name: members for name, members in groups.items() if len(members) > 1}

    @property
    def added(self) -> list[Added]:
        """Returns tensors of the output that the source lacks."""
        return [added for changes in self.changes.values() for added in changes.added]

    @property
    def dropped(self) -> dict[str, str]:
        """Returns a mapping from source tensor to the reason why it is not written."""
        return {name: why for changes in self.changes.values() for name, why in changes.dropped.items()}

    @property
    def changed(self) -> dict[str, str]:
        """Returns, for each source tensor, the algorithms that change its values before it is written or quantized."""
        found: dict[str, list[str]] = {}
        for by, changes in self.changes.items():
            for name in sorted(changes.tensors):
                found.setdefault(name, []).append(by)
        return {name: "+".join(by) for name, by in found.items()}

    @property
    def config_changes(self) -> dict[str, Any]:
        """Returns keys of config.json that change: transforms set them, or head and embedding are no longer one."""
        found = {key: value for changes in self.changes.values() for key, value in changes.config.items()}
        return found | ({TIED: False} if self.untied or self._parts_head() else {})

    def _parts_head(self) -> bool:
        """Returns whether a head and the embedding that it doubles come out different from each other."""
        if self.doubled_head is None:
            return False
        specs = {t.view.tensor: t.weight for t in self.targets.values() if t.view.tensor in self.doubled_head}
        same = len(specs) == len(set(self.doubled_head)) and len(set(specs.values())) == 1
        return not same or not self.changed.keys().isdisjoint(self.doubled_head)

    @property
    def online(self) -> dict[str, int]:
        """Returns weights whose inputs are multiplied by a block Hadamard while the model runs, with its size."""
        return {name: block for changes in self.changes.values() for name, block in changes.online.items()}

    def fates(self) -> dict[str, Fate]:
        """Returns the fate of every source tensor, in the order of the parts."""
        dropped, changed = self.dropped, self.changed
        owners: dict[str, str] = {}
        for target in self.quantized():
            owners.setdefault(target.view.tensor, target.name)
            if target.bias is not None and target.bias_spec is not None:
                owners.setdefault(target.bias, target.name)
        fates = {}
        for name in (tensor for part in self.parts for tensor in part.tensors):
            if name in dropped:
                fates[name] = Fate("dropped", dropped[name])
            elif name in owners:
                by = f"; changed by {changed[name]}" if name in changed else ""
                fates[name] = Fate("quantized", f"{owners[name]}{by}")
            elif name in changed:
                fates[name] = Fate("changed", f"by {changed[name]}")
            else:
                fates[name] = Fate("kept", self.kept[name])
        return fates

    def quantized(self, part: int | None = None) -> Iterator[QuantizedTarget]:
        """Yields the targets whose weight is quantized, in plan order; of one part when given."""
        if part is None:
            yield from self.once("quantized", lambda: [t for t in self.targets.values() if is_quantized(t)])
        else:
            yield from self.once("parts", self._by_part).get(part, ())

    def _by_part(self) -> dict[int, list[QuantizedTarget]]:
        found: dict[int, list[QuantizedTarget]] = {}
        for target in self.quantized():
            found.setdefault(target.part, []).append(target)
        return found

    def activations(self, part: int | None = None) -> Iterator[Activation]:
        """Yields every quantized input, output and attention operand, in plan order; of one part when given."""
        known: dict[tuple[int, bool], tuple[TensorSpec | None, TensorSpec | None]] = {}
        for target in self.quantized(part):
            key = id(target.slots), target.is_embedding
            if key not in known:
                known[key] = target.input, target.output
            read, returned = known[key]
            if read is not None:
                expert = target.expert[1] if target.expert and self.own_expert_inputs else None
                yield Activation(f"{target.name}.input", target.site, read, expert)
            if returned is not None:
                yield Activation(f"{target.name}.output", target.output_site, returned)
        for module in self.attention.values():
            if part is None or module.part == part:
                for kind, spec in module.specs.items():
                    yield Activation(f"{module.name}.{kind}", f"{module.name}.{kind}", spec)

    def measured(self) -> Iterator[tuple[str, TensorSpec]]:
        """Yields the sites where ranges must be measured for static scales, and the specs that ask for them."""
        for key, site, spec, _ in self.activations():
            if spec.needs_amax and site is not None and key.removesuffix(".input") not in self.carried:
                yield from ((one, spec) for one in self.under_one_scale(site))

    def under_one_scale(self, site: str) -> list[str]:
        """Returns the sites that the scale measured at `site` is for: itself, and what else its linear makes."""
        module, _, kind = site.rpartition(".")
        kinds = self.joined.get(module, frozenset())
        return [f"{module}.{one}" for one in sorted(kinds)] if kind in kinds else [site]

    def slots(self) -> Iterator[tuple[str, Decision]]:
        """Yields every slot by its full name, in plan order."""
        for target in self.targets.values():
            for kind, decision in target.slots.items():
                yield f"{target.name}.{kind}_quantizer", decision
        for attention in self.attention.values():
            for kind, decision in attention.slots.items():
                yield f"{attention.name}.{kind}_bmm_quantizer", decision
