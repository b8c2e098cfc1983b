"""A family applied to one checkpoint's headers: every weight a recipe can reach, what it reads, and the parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.schema import FamilyModel, HeaderLike
from quarkcli.family.views import WeightView, fused_views, view_shape
from quarkcli.recipe.match import matches


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
class Part:
    """A unit of work: `embed`, `block`, `tail` or `rest`; `block` is the block's index. `tensors` in file order."""

    index: int
    name: str
    kind: str
    block: int | None
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class AttentionModule:
    """`name` is the parent of the k projection; `k_proj` and `v_proj` are module names.

    head_dim   features of one head, as the config says; None when it does not
    """

    name: str
    part: int
    k_proj: str
    v_proj: str
    head_dim: int | None = None


@dataclass
class Layout:
    """A family applied to one checkpoint's headers."""

    family: str
    inferred: bool
    parts: list[Part]
    weights: dict[str, Weight]
    sites: dict[str, Site]
    attention: list[AttentionModule]
    tensor_roles: dict[str, str]
    tied_head: str | None
    aliases: dict[str, str] = field(default_factory=dict)


def lay_out(
    name: str, family: FamilyModel, inferred: bool, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> Layout:
    """Apply a family to headers. Raises ModelError when the checkpoint has no decoder block where it should."""
    parts = _parts(family, config, headers)
    builder = _Builder(family, headers, parts)
    for tensor in headers:
        builder.add(tensor)
    builder.connect(_head_dim(_text_config(config)))
    head = next((m for m in family.tail if m in family.roles.get("head", [])), None)
    tied = head if head and bool(_text_config(config).get("tie_word_embeddings")) else None
    if tied and f"{tied}.weight" in headers:
        tied = None
    return Layout(
        name, inferred, parts, builder.weights, builder.sites, builder.attention, builder.tensor_roles, tied,
        family.aliases,
    )  # fmt: skip


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _head_dim(text: Mapping[str, Any]) -> int | None:
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if isinstance(text.get("head_dim"), int):
        return int(text["head_dim"])
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _parts(family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> list[Part]:
    block_of = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")
    present = {int(found[1]) for name in headers if (found := block_of.match(name))}
    declared = _text_config(config).get("num_hidden_layers")
    count = declared if isinstance(declared, int) else max(present, default=-1) + 1
    absent = sorted(set(range(count)) - present)
    if absent or not count:
        raise ModelError(
            f"decoder block {absent[0] if absent else 0} of {count} has no tensors",
            where=f"{family.blocks}.*",
            hint="the family file or config.json does not fit this checkpoint",
        )
    members: dict[str, list[str]] = {"embed": [], "tail": [], "rest": []}
    blocks: dict[int, list[str]] = {index: [] for index in range(count)}
    for name in headers:
        found = block_of.match(name)
        if found and int(found[1]) < count:
            blocks[int(found[1])].append(name)
        elif any(name == module or name.startswith(f"{module}.") for module in family.embed):
            members["embed"].append(name)
        elif any(name == module or name.startswith(f"{module}.") for module in family.tail):
            members["tail"].append(name)
        else:
            members["rest"].append(name)
    parts = [Part(0, "embed", "embed", None, tuple(members["embed"]))]
    parts += [Part(1 + i, f"{family.blocks}.{i}", "block", i, tuple(names)) for i, names in blocks.items()]
    parts.append(Part(len(parts), "tail", "tail", None, tuple(members["tail"])))
    if members["rest"]:
        parts.append(Part(len(parts), "rest", "rest", None, tuple(members["rest"])))
    return parts


class _Builder:
    """Collects weights tensor by tensor, then ties them together by the activations they read."""

    def __init__(self, family: FamilyModel, headers: Mapping[str, HeaderLike], parts: list[Part]) -> None:
        self.family = family
        self.headers = headers
        self.part_of = {tensor: part for part in parts for tensor in part.tensors}
        self.weights: dict[str, Weight] = {}
        self.sites: dict[str, Site] = {}
        self.attention: list[AttentionModule] = []
        self.tensor_roles: dict[str, str] = {}
        self.readers = {leaf: group for group in family.sites for leaf in group}
        self.sharers = {leaf: group for group in family.scale_groups for leaf in group}

    def role(self, module: str) -> str | None:
        for role, patterns in self.family.roles.items():
            if any(matches(pattern, (module,)) for pattern in patterns):
                return role
        return None

    def add(self, tensor: str) -> None:
        part = self.part_of[tensor]
        header = self.headers[tensor]
        module = tensor.removesuffix(".weight")
        role = self.role(module)
        if part.kind == "rest":
            role = "mtp" if tensor.startswith(self.family.blocks + ".") else role or "other"
        self.tensor_roles[tensor] = role or "other"
        if self._add_expert(tensor, part):
            return
        if tensor.endswith(".weight") and len(header.shape) == 2 and role not in {"norm", "conv", "other"}:
            self._add_weight(module, WeightView(tensor), header, role or "linear", part, None)

    def _add_weight(
        self, name: str, view: WeightView, header: HeaderLike, role: str, part: Part, expert: tuple[str, int] | None
    ) -> None:
        shape = view_shape(view, header.shape)
        bias = f"{name}.bias" if f"{name}.bias" in self.headers else None
        kind = "nn.Embedding" if role == "embedding" else "nn.Linear"
        self.tensor_roles[view.tensor] = role
        self.weights[name] = Weight(
            name, view, shape, header.dtype, role, part.index, None, name, expert, bias, self._aliases(name), kind
        )

    def _add_expert(self, tensor: str, part: Part) -> bool:
        experts = self.family.experts
        if experts is None or part.block is None:
            return False
        prefix = f"{part.name}.{experts.path}"
        leaf = tensor.removeprefix(prefix + ".")
        if leaf == tensor:
            return False
        header = self.headers[tensor]
        names = {experts.gate: "expert_gate", experts.up: "expert_up", experts.down: "expert_down"}
        single = re.fullmatch(r"(\d+)\.([^.]+)\.weight", leaf)
        if single and single[2] in names and len(header.shape) == 2:
            index = int(single[1])
            name = f"{prefix}.{index}.{single[2]}"
            self._add_weight(name, WeightView(tensor), header, names[single[2]], part, (prefix, index))
            return True
        fused = experts.fused.get(leaf.removesuffix(".weight"))
        if fused is None or len(header.shape) != 3:
            return False
        for index in range(header.shape[0]):
            for target, view in fused_views(fused, tensor, header.shape, index):
                self._add_weight(
                    f"{prefix}.{index}.{target}", view, header, names[target], part, (prefix, index)
                )  # fmt: skip
        return True

    def _aliases(self, name: str) -> tuple[str, ...]:
        """Other spellings a pattern may use: the module path in memory, and an expert's name without its index."""
        steps = name.split(".")
        renamed = ".".join(self.family.aliases.get(step, step) for step in steps)
        spellings = {renamed}
        for spelling in (name, renamed):
            spellings.add(re.sub(r"(\.experts)\.\d+\.", r"\1.", spelling))
        return tuple(sorted(spellings - {name}))

    def connect(self, head_dim: int | None) -> None:
        """Fill in sites, scale groups and attention modules."""
        for weight in list(self.weights.values()):
            site, group = self._expert_ties(weight) if weight.expert else self._linear_ties(weight)
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

    def _expert_ties(self, weight: Weight) -> tuple[str, str]:
        assert weight.expert is not None and self.family.experts is not None
        prefix, index = weight.expert
        if weight.role == "expert_down":
            return f"{prefix}.{self.family.experts.down}.input", weight.name
        return f"{prefix}.input", f"{prefix}.{index}.gate+up"

    def _linear_ties(self, weight: Weight) -> tuple[str | None, str]:
        part = self._part(weight)
        if part.kind == "rest" or weight.role in {"embedding", "vision", "audio", "projector", "mtp"}:
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
        for part in dict.fromkeys(self.part_of.values()):
            module = f"{part.name}.{spec.module}"
            k, v = f"{module}.{spec.k}", f"{module}.{spec.v}"
            if part.block is not None and k in self.weights:
                v = v if v in self.weights else k
                self.attention.append(AttentionModule(module, part.index, k, v, head_dim))
