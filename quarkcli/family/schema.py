"""Defines the schema of a family file. Only `text`, which lists alternative prefixes, depends on the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, TypeVar

from pydantic import Field, field_validator

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.family.config import block_count, text_config
from quarkcli.recipe.schema import Strict


class HeaderLike(Protocol):
    """Describes one tensor of a safetensors header: dtype and shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class FusedModel(Strict):
    """A split rule: a file tensor that holds the same projections of all experts.

    targets    projections in the order of their rows, by the names of `experts`
    split      whole runs of rows, or row by row in turn
    transpose  the file stores [in, out]; `auto`: told from the hidden size, for files of both kinds
    stacked    2-D, one expert's rows above the next one's, instead of [experts, rows, columns]
    """

    targets: list[str] = Field(min_length=1)
    split: Literal["halves", "interleaved"] = "halves"
    transpose: bool | Literal["auto"] = False
    stacked: bool = False


class ExpertsModel(Strict):
    """Routed experts: module path below the block, leaf names, and the fused tensors a file may have instead.

    singles   published files have a tensor for every expert, although those of some tools have fused ones
    converted  transformers loads a quantized tensor for every expert as well, although published files have fused ones
    split     transformers makes a linear of every expert where it loads compressed-tensors, and so finds no fused ones
    fused     file tensor below `fused_in` (default: `path`), with `.weight` if it has one -> how it is split
    router_whole  no loader gives the router a scheme, whether a config lists it as left out or not
    count     key of config.json (dots go deeper) with the number of experts; only stacked tensors need it
    """

    path: str
    gate: str | None = None
    up: str
    down: str
    singles: bool = False
    converted: bool = False
    split: bool = False
    router_whole: bool = False
    fused: dict[str, FusedModel] = Field(default_factory=dict)
    fused_in: str | None = None
    count: str | None = None

    def fused_tensors(self, block: str) -> dict[str, FusedModel]:
        """Returns full names of the fused tensors of a block."""
        return {f"{block}.{self.fused_in or self.path}.{leaf}": rule for leaf, rule in self.fused.items()}


class AttentionModel(Strict):
    """Attention module below the block, and its projections below that; fused ones have one name.

    latent  the cache holds a compressed latent, not k and v (MLA)
    gated   q has as many rows again, for a gate on what attention returns
    hidden_cache  transformers finds no place for scales of this cache, or cannot run with them
    unscaled      the classes of servers have no place for scales of this cache
    by_head       rows of the one linear lie by heads of keys, each with its queries and its value; vLLM sorts them
    """

    module: str
    q: str
    k: str
    v: str
    latent: bool = False
    gated: bool = False
    hidden_cache: bool = False
    unscaled: bool = False
    by_head: bool = False


# Key of config.json -> values; null: it has no such key. Of a list in config.json one member has to be among them.
Only = dict[str, list[str | bool | int | float | None]]


class ScalingModel(Strict):
    """Channels that can be scaled without changing the function: divided at `source`, multiplied into `readers`.

    only  values of keys of config.json with which that holds
    """

    source: str
    readers: list[str] = Field(min_length=1)
    only: Only = Field(default_factory=dict)


class ResidualModel(Strict):
    """Says where the residual stream runs, the hidden states that blocks hand on.

    Names are below a block; those `outside` are full ones.

    reads           linears whose columns are its channels
    writes          linears whose rows are
    norms           other modules or tensors whose last axis is its channels, such as the norms before its readers
    inner           modules and tensors that have as many channels, which are others; in some members also those that
                    are readers or writers elsewhere, told by their widths
    outside         patterns on full names, for what stands neither in a block, nor is embedding, last norm or head
    no_permutation  why its channels cannot change places; it cannot be rotated either
    no_rotation     why it cannot be rotated, although its channels can change places
    only            values of keys of config.json with which it can be rotated
    """

    reads: list[str] = Field(default_factory=list)
    writes: list[str] = Field(default_factory=list)
    norms: list[str] = Field(default_factory=list)
    inner: list[str] = Field(default_factory=list)
    outside: dict[Literal["reads", "writes", "norms", "inner"], list[str]] = Field(default_factory=dict)
    no_permutation: str | None = None
    no_rotation: str | None = None
    only: Only = Field(default_factory=dict)


class ChannelsModel(Strict):
    """Channels inside a block that can change places: rows of `writers`, columns of `readers`.

    What lies between treats them alike. A writer with several times as many rows holds as many runs of them, one after
    the other.
    """

    writers: list[str] = Field(min_length=1)
    readers: list[str] = Field(min_length=1)


class HeadsModel(Strict):
    """The values of attention: rows of `writer` (the last ones, where q, k and v are fused), columns of `reader`.

    no_rotation  why they cannot be rotated inside their heads, although they can change places there
    only         values of keys of config.json with which they can be rotated
    """

    writer: str
    reader: str
    no_rotation: str | None = None
    only: Only = Field(default_factory=dict)


_Rule = TypeVar("_Rule", ResidualModel, HeadsModel)


class FamilyModel(Strict):
    """A family file, `recipes/models/<name>.yaml`. Names are below the block unless they are said to be full.

    extends       another family: its mappings are taken over key by key, everything else unless given here;
                  architectures, model types, texts, summary and own_code never are
    texts         model types of the text models that these wrap, with any other it is not this family; empty: any
    text          prefixes of the text model, for `{text}` in full names; the first that the file has
    blocks        full path of the numbered decoder blocks
    embed, tail   full names of the modules before and behind the blocks
    roles         role -> patterns on full module names; protected roles are asked first
    exclude       role -> patterns on full module names that are left alone unless --unprotect names the role
    sites         linears that read one activation; a linear that is not listed has its own
    scale_groups  linears that servers fuse and give one per-tensor scale; default: the sites
    aliases       step of a module path -> its name in memory, accepted by patterns as well
    renamed       regular expression -> replacement: how transformers renames tensors while it loads, in this order
    in_vllm       regular expression -> replacement: names that vLLM has for modules, applied in this order to those
                  of the files; `<N>` stands for the number N behind the last block's; never: it loads none
    below_model   vLLM has towers and projectors below `model`, as files that transformers saves have them
    parts_in_vllm last step of a linear -> the parts that vLLM knows it by, although the files have it whole
    unread        server -> patterns on full names of tensors for which its class has no place, so that it stops
    served        values of keys of config.json that the classes of servers know; with others transformers alone has one
    served_by     the same of one server: server -> values of keys beside the text model's that its class takes
    own_linears   transformers has a class of its own for their linears, which reads the weight itself
    whole_in_vllm patterns on full names of modules to which vLLM gives no scheme
    own_code      published models bring their own code, and transformers has no class for their type
    scaling       pairs for smoothing and AWQ; `*` stands for every expert
    residual      where the residual stream runs; without it, it can be neither rotated nor put in another order
    channels      channels of a block that can change places
    heads         the values of attention, which can change places inside a head
    image_blocks  blocks that have this module run only with images
    shared_cache  key of config.json: how many blocks at the end read the keys and values of earlier ones
    spare_rows    rows that the embedding has beyond the vocabulary
    norm_offset   norms multiply by their weight plus this
    tied          head and embedding are one tensor when config.json does not say
    joined        last steps of modules that transformers makes one module of while it loads, row upon row
    last_norm     values of keys of config.json with which there is a norm behind the blocks
    stated_width  values of keys of config.json with which its width of the MLP is that of the weights
    """

    extends: str | None = None
    summary: str = ""
    architectures: list[str] = Field(default_factory=list)
    model_types: list[str] = Field(default_factory=list)
    texts: list[str] = Field(default_factory=list)
    text: list[str] = Field(default_factory=list)
    blocks: str
    embed: list[str]
    tail: list[str]
    roles: dict[str, list[str]]
    exclude: dict[str, list[str]] = Field(default_factory=dict)
    attention: AttentionModel | None = None
    sites: list[list[str]] = Field(default_factory=list)
    scale_groups: list[list[str]] | None = None
    experts: ExpertsModel | None = None
    aliases: dict[str, str] = Field(default_factory=dict)
    renamed: dict[str, str] = Field(default_factory=dict)
    in_vllm: Literal["never"] | dict[str, str] | None = None
    below_model: bool = False
    parts_in_vllm: dict[str, list[str]] = Field(default_factory=dict)
    unread: dict[str, list[str]] = Field(default_factory=dict)
    served: Only = Field(default_factory=dict)
    served_by: dict[str, Only] = Field(default_factory=dict)
    own_linears: bool = False
    whole_in_vllm: list[str] = Field(default_factory=list)
    own_code: bool = False
    scaling: list[ScalingModel] = Field(default_factory=list)
    residual: ResidualModel | None = None
    channels: list[ChannelsModel] = Field(default_factory=list)
    heads: HeadsModel | None = None
    image_blocks: str | None = None
    shared_cache: str | None = None
    spare_rows: int = 0
    norm_offset: float = 0.0
    tied: bool = False
    joined: list[str] = Field(default_factory=list)
    last_norm: Only = Field(default_factory=dict)
    stated_width: Only = Field(default_factory=dict)

    @field_validator("renamed", "in_vllm")
    @classmethod
    def _check_renamed(cls, rules: dict[str, str] | str | None) -> dict[str, str] | str | None:
        for pattern, replacement in rules.items() if isinstance(rules, dict) else ():
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                raise ValueError(
                    f"'{pattern}: {replacement}' is no regular expression with its replacement: {error}"
                ) from error
        return rules

    def suited(self, config: Mapping[str, object]) -> FamilyModel:
        """Returns the family without the rewrites that would change what a model with this config computes."""
        text = text_config(config)
        scaling = [rule for rule in self.scaling if _unmet(rule.only, text) is None]
        turned = {"heads": _turned(self.heads, text), "residual": _turned(self.residual, text)}
        return self.model_copy(update={"scaling": scaling, **turned})

    def unserved(self, config: Mapping[str, object]) -> str:
        """Returns the key and value of config.json that the classes of servers do not know; empty: there is none."""
        text = text_config(config)
        return _said(_unmet(self.served, text), text)

    def unserved_by(self, config: Mapping[str, object]) -> dict[str, str]:
        """Returns the key and value of config.json at which the class of a server stops, by server."""
        said = {server: _said(_unmet(only, config), config) for server, only in self.served_by.items()}
        return {server: what for server, what in said.items() if what}

    def ends_in_norm(self, config: Mapping[str, object]) -> bool:
        """True where a model with this config has a norm behind its blocks, if its family's models have one."""
        return _unmet(self.last_norm, text_config(config)) is None

    def says_width(self, config: Mapping[str, object]) -> bool:
        """True where the MLP of a model with this config is as wide as that says."""
        return _unmet(self.stated_width, text_config(config)) is None

    def in_memory(self, module: str) -> str:
        """Returns the name that a module of the files has in transformers' memory."""
        return self._renamed(f"{module}.weight").removesuffix(".weight")

    def finds_codes(self, module: str) -> bool:
        """True where transformers renames all tensors of a module as it renames the weight."""
        return self._renamed(f"{module}.weight_scale") == f"{self.in_memory(module)}.weight_scale"

    def _renamed(self, tensor: str) -> str:
        return _replaced(tensor, self.renamed)

    def name_in_vllm(self, module: str, blocks: int) -> str:
        """Returns the name that vLLM has for a module of the files, of a model with so many blocks."""
        name = _replaced(module, self.in_vllm) if isinstance(self.in_vllm, dict) else module
        return re.sub(r"<(\d+)>", lambda found: str(int(found[1]) + blocks), name)

    def runs(self, module: str, config: Mapping[str, object]) -> bool:
        """True for a module inside the decoder blocks that the model's own forward runs."""
        found = re.match(re.escape(self.blocks) + r"\.(\d+)\.", module)
        count = block_count(config)
        return found is not None and (count is None or int(found[1]) < count)


def _replaced(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _unmet(only: Only, text: Mapping[str, object]) -> str | None:
    """Returns the first key of config.json with another value than these; None where all have one of them."""
    return next((key for key, values in only.items() if not _is_among(text.get(key), values)), None)


def _said(key: str | None, config: Mapping[str, object]) -> str:
    """Returns a key with its value; empty for no key."""
    if key is None:
        return ""
    return f"{key}: {config[key]}" if config.get(key) is not None else f"no {key}"


def _is_among(value: object, values: list[str | bool | int | float | None]) -> bool:
    return any(one in values for one in (value if isinstance(value, list) else [value]))


def _turned(rule: _Rule | None, text: Mapping[str, object]) -> _Rule | None:
    """Returns a rule with why it cannot be rotated, where config.json has another value than it must."""
    unmet = _unmet(rule.only, text) if rule is not None and rule.no_rotation is None else None
    if rule is None or unmet is None:
        return rule
    return rule.model_copy(update={"no_rotation": f"config.json has {unmet}: {text.get(unmet)}"})


# Roles kept in source precision unless --unprotect names them, with the reason the plan shows.
PROTECTED = {
    "embedding": "a table that is looked up, not multiplied",
    "head": "has few of the bytes, and quantizing it costs much accuracy",
    "router": "chooses the experts that run",
    "norm": "one value per channel",
    "conv": "tiny",
    "vision": "calibration text does not reach it",
    "audio": "calibration text does not reach it",
    "projector": "joins towers or widths, and has few bytes",
    "mtp": "extra prediction layers, which the model itself does not run",
    "gates": "a few rows that scale whole channels or heads",
    "indexer": "chooses which tokens attention sees",
    "attention": "has few of the bytes, and the published checkpoints of this family keep it",
    "shared_expert": "runs for every token, and the published checkpoints of this family keep it",
    "dense_mlp": "has few of the bytes, and the published checkpoints of this family keep it",
    "mamba": "has few of the bytes, and vLLM takes it in 16 bits alone",
}
# Roles that are a class of modules: who names the class means them.
ROLE_CLASSES = {"embedding": "nn.Embedding"}
# Roles that only tensors outside text's way have.
TOWERS = frozenset({"vision", "audio", "mtp"})


def check_unprotect(roles: Iterable[str]) -> None:
    """Raises ConfigError for a role that is not protected."""
    for role in roles:
        if role not in PROTECTED:
            hint = did_you_mean(role, PROTECTED, f"use one of {', '.join(PROTECTED)}")
            raise ConfigError(
                f"unknown role (kind of tensor) '{role}'", where="--unprotect", hint=hint, kind="E-ROLE-UNKNOWN"
            )
