"""Applies a family to one checkpoint's headers: it gives the weights, the activations they read, and the parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.config import head_size, hidden_size, kv_heads, text_config
from quarkcli.family.orientation import decide, hidden_transpositions, stored_transposed
from quarkcli.family.parts import Part, parts_of
from quarkcli.family.rewrites import Rewrites
from quarkcli.family.schema import (
    PROTECTED,
    TOWERS,
    ExpertsModel,
    FamilyModel,
    HeaderLike,
)
from quarkcli.family.tying import doubled_head, tied_head
from quarkcli.family.views import WeightView, fused_views, view_shape
from quarkcli.memory import without_collection
from quarkcli.recipe.match import ignores_numbers, matchers

_EXPERT_NUMBER = re.compile(r"(?<=\.experts)\.\d+(?=\.)")


@dataclass(frozen=True)
class Weight:
    """A weight a recipe can reach, before any entry has spoken.

    name          module name in checkpoint spelling, without `.weight`
    view          where its values lie in the source file
    shape         (out, in)
    dtype         safetensors dtype of the source tensor, for example `BF16`
    role          what it is in its family: q, gate, expert_down, head, embedding, router, linear ...
    part          index of its part
    site          name of the activation it reads (see Site), or None when no forward pass reaches it
    group         name of the scale group it shares per-tensor scales with; its own when alone
    expert        (layer's expert prefix, expert index) for routed experts, else None
    bias          name of the bias tensor in the source, if it has one
    aliases       other spellings of the name that a pattern may use
    parent_class  `nn.Linear` or `nn.Embedding`
    """

    name: str
    view: WeightView
    shape: tuple[int, int]
    dtype: str
    role: str
    part: int
    site: str | None
    group: str
    expert: tuple[str, int] | None
    bias: str | None
    aliases: tuple[str, ...] = ()
    parent_class: str = "nn.Linear"


@dataclass(frozen=True)
class Site:
    """An activation that weights read. `kind`: linear, experts_in or experts_down (see `plan.model.Site`)."""

    name: str
    part: int
    kind: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class AttentionModule:
    """`name` is the parent of the k projection; `k_proj` and `v_proj` are module names.

    latent     k and v are not what the cache keeps, but a compressed latent
    head_dim   features of one head, as the config says; None when it does not
    """

    name: str
    part: int
    k_proj: str
    v_proj: str
    latent: bool = False
    head_dim: int | None = None


@dataclass
class Layout:
    """A family applied to one checkpoint's headers.

    protected   module -> role it is left alone for
    unlisted    roles of modules that loaders leave whole, whether a config lists them or not
    rewrites    how its blocks may be rewritten without changing what they compute
    architecture  the class that config.json names, empty: none
    transposed_experts  fused tensors whose square matrices lie [in, out], where other files have them as [out, in]
    transposed  weights of blocks that the file stores [in, out] and the family knows nothing of; see `orientation`
    matrices    modules with a matrix that no recipe can reach; a loader may take them for linears
    """

    family: str
    inferred: bool
    parts: list[Part]
    weights: dict[str, Weight]
    sites: dict[str, Site]
    attention: list[AttentionModule]
    tensor_roles: dict[str, str]
    tied_head: str | None
    doubled_head: tuple[str, str] | None
    aliases: dict[str, str] = field(default_factory=dict)
    protected: dict[str, str] = field(default_factory=dict)
    unlisted: frozenset[str] = frozenset()
    transposed_experts: frozenset[str] = frozenset()
    transposed: tuple[str, ...] = ()
    rewrites: Rewrites = field(default_factory=Rewrites)
    architecture: str = ""
    matrices: tuple[str, ...] = ()


@without_collection()
def lay_out(
    name: str, family: FamilyModel, inferred: bool, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> Layout:
    """Applies a family to headers. Raises ModelError when the checkpoint has no decoder block where it should."""
    parts = parts_of(family, config, headers)
    builder = _Builder(family, config, headers, parts)
    for tensor in headers:
        builder.add(tensor)
    builder.connect(head_size(config))
    tables = [weight.view.tensor for weight in builder.weights.values() if weight.role == "embedding"]
    router_whole = family.experts is not None and family.experts.router_whole
    return Layout(
        family=name,
        inferred=inferred,
        parts=parts,
        weights=builder.weights,
        sites=builder.sites,
        attention=builder.attention,
        tensor_roles=builder.tensor_roles,
        tied_head=tied_head(family, config, headers),
        doubled_head=doubled_head(family, config, headers, tables),
        aliases=family.aliases,
        protected=builder.protected(),
        unlisted=frozenset({"router"} if router_whole else ()),
        transposed_experts=hidden_transpositions(family, config, headers),
        transposed=stored_transposed(builder.blocks_weights(), headers, config),
        rewrites=Rewrites(
            family=family.suited(config),
            width=hidden_size(config),
            headers=headers,
            head_dim=head_size(config),
            kv_heads=kv_heads(config),
            unserved=family.unserved(config),
            unserved_by=family.unserved_by(config),
        ),
        architecture=str(next(iter(config.get("architectures") or ()), "")),
        matrices=tuple(builder.matrices),
    )


def _around(alias: str, index: int) -> tuple[str, str | None]:
    """Returns the text before and after an expert's number, the last step but one; (alias, None) without a number."""
    parent, _, leaf = alias.rpartition(".")
    number = str(index)
    return (parent[: -len(number)], f".{leaf}") if parent.endswith(f".{number}") else (alias, None)


class _Builder:
    """Collects weights tensor by tensor, then ties them together by the activations they read."""

    def __init__(
        self, family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike], parts: list[Part]
    ) -> None:
        self.family = family
        self.config = config
        self.headers = headers
        self.parts = parts
        self.part_of = {tensor: part for part in parts for tensor in part.tensors}
        self.weights: dict[str, Weight] = {}
        self.sites: dict[str, Site] = {}
        self.attention: list[AttentionModule] = []
        self.tensor_roles: dict[str, str] = {}
        self.matrices: list[str] = []
        self.readers = {leaf: group for group in family.sites for leaf in group}
        shared = family.sites if family.scale_groups is None else family.scale_groups
        self.sharers = {leaf: group for group in shared for leaf in group}
        # Protected roles are asked first; towers only outside embedding, blocks and tail, other roles only inside.
        roles = sorted(family.roles.items(), key=lambda item: item[0] not in PROTECTED)
        modules = (tensor.removesuffix(".weight").removesuffix(".bias") for tensor in headers)
        patterns = matchers(roles, modules)
        self.inside = [(role, match) for role, match in patterns if role not in TOWERS]
        self.outside = [(role, match) for role, match in patterns if role in TOWERS or role == "projector"]
        experts = family.experts
        blocks = [part.name for part in parts if part.block is not None]
        self.fused = decide(experts, blocks, headers, hidden_size(config)) if experts else {}
        named = ((experts.gate, "gate"), (experts.up, "up"), (experts.down, "down")) if experts else ()
        self.expert_roles = {leaf: f"expert_{role}" for leaf, role in named if leaf is not None}
        # Where the experts of a block are: one text for all of them, because there are many.
        inside = {part.index: f"{part.name}.{experts.path}" for part in parts if experts and part.block is not None}
        self.experts_in = {index: (f"{prefix}.", prefix) for index, prefix in inside.items()}
        self.expert_aliases: dict[tuple[str, str], list[tuple[str, str | None]]] = {}
        marker = f".{family.image_blocks}.weight"
        self.image_parts = {
            part.index
            for part in parts
            if family.image_blocks and part.block is not None and part.name + marker in part.tensors
        }

    def role(self, module: str, part: Part) -> str | None:
        """Returns the role of a module. In a part of kind `rest` only towers and their connectors have a role."""
        if part.index in self.image_parts:
            return "vision"
        if part.kind == "rest" and module.startswith(self.family.blocks + "."):
            return "mtp"
        for role, match in self.outside if part.kind == "rest" else self.inside:
            if match(module):
                return role
        return "other" if part.kind == "rest" else None

    def add(self, tensor: str) -> None:
        part = self.part_of[tensor]
        if self._add_expert(tensor, part):
            return
        header = self.headers[tensor]
        module = tensor.removesuffix(".weight")
        role = self.role(module.removesuffix(".bias"), part)
        self.tensor_roles[tensor] = role or "parameter"
        matrix = tensor.endswith(".weight") and len(header.shape) == 2
        if matrix and role in {"norm", "conv", "other"}:
            self.matrices.append(module)
        elif matrix:
            self._add_weight(module, WeightView(tensor), header, role or "linear", part, None)

    def blocks_weights(self) -> Iterator[tuple[str, str | None]]:
        """Yields (module name, name of its bias) of the linears in blocks that are file tensors of their own."""
        blocks = {part.index for part in self.parts if part.block is not None}
        for name, weight in self.weights.items():
            if weight.expert is None and weight.part in blocks:
                yield name, weight.bias

    def protected(self) -> dict[str, str]:
        """Returns a mapping from module to the role that keeps it as it is."""
        found = {}
        excluded = self.family.exclude
        names = (name for weight in self.weights.values() for name in (weight.name, *weight.aliases))
        patterns = matchers(excluded.items(), names)
        folds = all(ignores_numbers(pattern) for own in excluded.values() for pattern in own)
        known: dict[object, str | None] = {}
        for name, weight in self.weights.items():
            role: str | None = weight.role
            if role not in PROTECTED:
                # The experts of a layer differ in their number alone, which cannot matter where patterns fold.
                key = (weight.expert[0], role) if folds and weight.expert else name
                if key not in known:
                    spellings = (name, *weight.aliases)
                    known[key] = next((r for r, match in patterns if any(map(match, spellings))), None)
                role = known[key]
            if role is not None:
                found[name] = role
        return found

    def _add_weight(
        self, name: str, view: WeightView, header: HeaderLike, role: str, part: Part, expert: tuple[str, int] | None
    ) -> None:
        shape = view_shape(view, header.shape)
        bias = f"{name}.bias" if f"{name}.bias" in self.headers else None
        kind = "nn.Embedding" if role == "embedding" else "nn.Linear"
        self.tensor_roles[view.tensor] = role
        site, group = self._expert_ties(name, role, expert) if expert else (None, name)
        aliases = self._expert_aliases(name, role, expert) if expert else self._aliases(name)
        self.weights[name] = Weight(
            name, view, shape, header.dtype, role, part.index, site, group, expert, bias, aliases, kind
        )

    def _add_expert(self, tensor: str, part: Part) -> bool:
        experts = self.family.experts
        if experts is None or part.block is None or part.index in self.image_parts:
            return False
        start, prefix = self.experts_in[part.index]
        header, roles = self.headers[tensor], self.expert_roles
        if tensor.startswith(start) and tensor.endswith(".weight"):
            number, _, leaf = tensor[len(start) : -len(".weight")].partition(".")
            if number.isdecimal() and leaf in roles and len(header.shape) == 2:
                index = int(number)
                name = f"{start}{index}.{leaf}"
                self._add_weight(name, WeightView(tensor), header, roles[leaf], part, (prefix, index))
                return True
        rule = self.fused.get(tensor)
        if rule is None or len(header.shape) != (2 if rule.stacked else 3):
            return False
        count = self._stack(experts) if rule.stacked else header.shape[0]
        for index in range(count):
            for target, view in fused_views(rule, tensor, header.shape, index, count):
                self._add_weight(f"{prefix}.{index}.{target}", view, header, roles[target], part, (prefix, index))
        return True

    def _stack(self, experts: ExpertsModel) -> int:
        """Returns the number of experts by config.json."""
        value: Any = text_config(self.config)
        for key in (experts.count or "").split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"the number of experts is not in config.json ({experts.count})",
                hint="correct experts.count in the family file, which names the key",
                kind="E-MODEL-FAMILY",
            )
        return value

    def _aliases(self, name: str) -> tuple[str, ...]:
        """Returns other spellings a pattern may use.

        These are the module path in memory, and an expert's name without its index.
        """
        spellings = {name}
        if self.family.aliases:
            spellings.add(".".join(self.family.aliases.get(step, step) for step in name.split(".")))
        if ".experts." in name:
            spellings |= {_EXPERT_NUMBER.sub("", spelling) for spelling in spellings}
        return tuple(sorted(spellings - {name}))

    def _expert_aliases(self, name: str, role: str, expert: tuple[str, int]) -> tuple[str, ...]:
        """As `_aliases`, after those of the layer's first expert."""
        prefix, index = expert
        found = self.expert_aliases.get((prefix, role))
        if found is None:
            found = self.expert_aliases[prefix, role] = [_around(alias, index) for alias in self._aliases(name)]
        return tuple([before if after is None else f"{before}{index}{after}" for before, after in found])

    def connect(self, head_dim: int | None) -> None:
        """Fills in sites, scale groups and attention modules."""
        for weight in [weight for weight in self.weights.values() if weight.expert is None]:
            site, group = self._linear_ties(weight)
            self.weights[weight.name] = replace(weight, site=site, group=group)
        for name, (part, kind, members) in self._sites().items():
            self.sites[name] = Site(name, part, kind, tuple(members))
        self._find_attention(head_dim)

    def _sites(self) -> dict[str, tuple[int, str, list[str]]]:
        found: dict[str, tuple[int, str, list[str]]] = {}
        for weight in self.weights.values():
            if weight.site is None:
                continue
            kind = "linear"
            if weight.expert:
                kind = "experts_down" if weight.role == "expert_down" else "experts_in"
            found.setdefault(weight.site, (weight.part, kind, []))[2].append(weight.name)
        return found

    def _expert_ties(self, name: str, role: str, expert: tuple[str, int]) -> tuple[str, str]:
        assert self.family.experts is not None
        prefix, index = expert
        if role == "expert_down":
            return f"{prefix}.{self.family.experts.down}.input", name
        return f"{prefix}.input", f"{prefix}.{index}.gate+up"

    def _linear_ties(self, weight: Weight) -> tuple[str | None, str]:
        part = self._part(weight)
        if part.kind in {"rest", "embed"} or weight.role in {"embedding", "projector", *TOWERS}:
            return None, weight.name
        if part.block is None:
            return f"{weight.name}.input", weight.name
        leaf = weight.name.removeprefix(part.name + ".")
        return self._tie(part, leaf, self.readers, ".input"), self._tie(part, leaf, self.sharers, "")

    def _tie(self, part: Part, leaf: str, table: Mapping[str, list[str]], suffix: str) -> str:
        present = [other for other in table.get(leaf, [leaf]) if f"{part.name}.{other}" in self.weights]
        parent = leaf.rpartition(".")[0]
        joined = "+".join(other.rpartition(".")[2] for other in present)
        return f"{part.name}.{parent}.{joined}{suffix}" if parent else f"{part.name}.{joined}{suffix}"

    def _part(self, weight: Weight) -> Part:
        return self.part_of[weight.view.tensor]

    def _find_attention(self, head_dim: int | None) -> None:
        spec = self.family.attention
        if spec is None:
            return
        shared = text_config(self.config).get(self.family.shared_cache or "")
        own = sum(part.block is not None for part in self.parts) - (shared if isinstance(shared, int) else 0)
        for part in self.parts:
            if part.block is not None and part.block >= own:
                continue  # its k and v, where files have some, fill no cache
            module = f"{part.name}.{spec.module}"
            k, v = f"{module}.{spec.k}", f"{module}.{spec.v}"
            if part.block is not None and k in self.weights:
                v = v if v in self.weights else k
                self.attention.append(AttentionModule(module, part.index, k, v, spec.latent, head_dim))
