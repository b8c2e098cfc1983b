"""Lists the rewrites of a block that do not change its function, as the family file gives them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from quarkcli.family.parts import Part
from quarkcli.family.schema import AttentionModel, ExpertsModel, FamilyModel, HeaderLike, HeadsModel, ScalingModel

if TYPE_CHECKING:
    from quarkcli.family.layout import Weight


@dataclass(frozen=True)
class Pair:
    """Channels that can be scaled: what `source` writes is multiplied, the columns of `readers` are divided.

    source    a linear, or a norm when `norm` is true
    readers   the weights that read those channels; all of them, or the function changes
    """

    source: str
    norm: bool
    readers: tuple[str, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Returns the weights that are changed."""
        return self.readers if self.norm else (self.source, *self.readers)


@dataclass(frozen=True)
class Residual:
    """Holds what of a part stands on the residual stream.

    columns  weights whose columns are its channels: readers in a block, embeddings, the head
    rows     weights whose rows and biases are: writers
    vectors  other tensors whose last axis is its channels: norms
    unknown  tensor that may stand there -> what the family file does not say
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Channels:
    """Channels of a block that can change places: rows of the writers, columns of the readers.

    width  their number; a writer with a multiple of it holds so many runs, one after the other
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class Values:
    """The values of attention: rows of the writer from `first` on, columns of the reader.

    head    channels of a head
    groups  heads of keys and values; the reader has some multiple of them, in runs that read the same
    """

    writer: str
    reader: str
    first: int
    head: int
    groups: int


@dataclass(frozen=True)
class Rewrites:
    """Holds the rewrites that one family file allows for its blocks.

    family   None: nothing is known
    width    channels of the residual stream; None: the config does not say
    headers  of the checkpoint
    head_dim features of a head of attention; None: the config does not say
    kv_heads heads of keys and values; None: the config does not say, or they are as many as those of queries
    unserved what config.json has that the classes of servers do not know
    unserved_by  the same of single servers
    """

    family: FamilyModel | None = field(default=None, repr=False)
    width: int | None = None
    headers: Mapping[str, HeaderLike] = field(default_factory=dict, repr=False)
    head_dim: int | None = None
    kv_heads: int | None = None
    unserved: str = ""
    unserved_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def attention(self) -> AttentionModel | None:
        """Returns what the family file says of attention; None: nothing."""
        return self.family.attention if self.family is not None else None

    @property
    def experts(self) -> ExpertsModel | None:
        """Returns what the family file says of routed experts; None: nothing."""
        return self.family.experts if self.family is not None else None

    @property
    def heads(self) -> HeadsModel | None:
        """Returns what the family file says of the values of attention; None: nothing."""
        return self.family.heads if self.family is not None else None

    @property
    def norm_offset(self) -> float:
        """Returns what norms multiply by beside their weight."""
        return self.family.norm_offset if self.family is not None else 0.0

    def unread(self, server: str) -> str:
        """Returns the first tensor for which the class of a server has no place; empty: there is none."""
        patterns = self.family.unread.get(server, []) if self.family is not None else []
        return next((name for name in self.headers if _is_named(patterns, name)), "") if patterns else ""

    def pairs(self, block: str, weights: Mapping[str, Weight], vectors: Collection[str]) -> list[Pair]:
        """Returns the scaling pairs of a block.

        weights   of this block, by name
        vectors   names of the block's one-dimensional tensors, among which are its norms
        """
        found = []
        for rule in self.family.scaling if self.family is not None else ():
            found += _pairs(rule, block, weights, vectors)
        return found

    def channels(self, block: str, weights: Mapping[str, Weight]) -> list[Channels]:
        """Returns the channels inside a block that can change places, of every expert apart."""
        found = []
        for rule in self.family.channels if self.family is not None else ():
            writers, readers = (_matching(names, block, weights) for names in (rule.writers, rule.readers))
            for expert in dict.fromkeys(weights[name].expert for name in readers):
                writing = tuple(name for name in writers if weights[name].expert == expert)
                reading = tuple(name for name in readers if weights[name].expert == expert)
                width = weights[reading[0]].shape[1]
                complete = len(writing) == len(rule.writers) and len(reading) == len(rule.readers)
                if complete and all(weights[name].shape[0] % width == 0 for name in writing):
                    found.append(Channels(writing, reading, width))
        return found

    def values(self, block: str, weights: Mapping[str, Weight]) -> Values | None:
        """Returns the values of a block's attention; None where the family names none, or the heads are not known."""
        if self.family is None or self.heads is None or self.head_dim is None:
            return None
        writer, reader = weights.get(f"{block}.{self.heads.writer}"), weights.get(f"{block}.{self.heads.reader}")
        if writer is None or reader is None:
            return None
        if self.family.shared_cache is not None:
            return None  # later blocks read these values as well
        fused = self.attention is not None and self.attention.q == self.attention.v
        rows = (writer.shape[0] - reader.shape[1]) // 2 if fused else writer.shape[0]
        if rows <= 0 or rows % self.head_dim or reader.shape[1] % rows:
            return None
        if self.kv_heads is not None and rows != self.kv_heads * self.head_dim:
            return None  # heads of another size than the config says
        return Values(writer.name, reader.name, writer.shape[0] - rows, self.head_dim, rows // self.head_dim)

    def residual(self, part: Part, weights: Mapping[str, Weight]) -> Residual:
        """Returns what of a part stands on the residual stream.

        weights   of this part, by name
        """
        if self.family is None or self.family.residual is None or self.width is None:
            return Residual(
                unknown=dict.fromkeys(part.tensors[:1], "the family file says nothing about the residual stream")
            )
        return self._placed(part, weights, _said(self.family, part, weights))

    def folds(self, part: Part, weights: Mapping[str, Weight]) -> dict[str, tuple[str, ...]]:
        """Returns the weights of norms on the residual stream, with the readers that can take them over.

        Norms of which the readers are not known are left out.
        """
        if part.block is None:
            heads = tuple(name for name, weight in weights.items() if weight.role == "head")
            own = self.residual(part, weights).vectors if part.kind == "tail" else ()
            return {name: heads for name in own if heads}
        residual = self.residual(part, weights)
        found: dict[str, tuple[str, ...]] = {}
        for pair in self.pairs(part.name, weights, residual.vectors):
            if pair.norm and set(residual.columns).issuperset(pair.readers):
                name = f"{pair.source}.weight"
                found[name] = (*found.get(name, ()), *pair.readers)
        return found

    def tied_embedding(self, weights: Mapping[str, Weight]) -> str:
        """Returns the embedding that is the head as well, where a model has one."""
        return next(n for n, w in weights.items() if w.role == "embedding" and w.shape[1] == self.width)

    def tied_shape(self, embedding: Weight) -> tuple[int, int]:
        """Returns the shape of a head that is cut from the embedding."""
        spare = self.family.spare_rows if self.family is not None else 0
        return embedding.shape[0] - spare, embedding.shape[1]

    def _placed(self, part: Part, weights: Mapping[str, Weight], said: Mapping[str, Collection[str]]) -> Residual:
        """Returns every weight and every other tensor of a part in its place."""
        assert self.width is not None
        placed: dict[str, list[str]] = {"reads": [], "writes": []}
        unknown = {}
        for place, axis, word in (("reads", 1, "columns"), ("writes", 0, "rows")):
            for name in _named(said[place], weights):
                size = weights[name].shape[axis]
                if size == self.width or (part.kind == "rest" and place == "reads" and size % self.width == 0):
                    placed[place].append(name)
                elif not _is_named(said["inner"], name):
                    unknown[name] = f"it has {size} {word}, not {self.width}"
        on_stream = {*placed["reads"], *placed["writes"], *unknown}
        for name, weight in weights.items():
            if name not in on_stream and self.width in weight.shape and not _is_named(said["inner"], name):
                unknown[name] = f"one of its sizes is {self.width}, as that of the residual stream"
        held = {weight.view.tensor for weight in weights.values()}
        held |= {bias for weight in weights.values() for bias in (weight.bias, expert_bias(weight)) if bias}
        vectors = []
        for tensor in part.tensors:
            shape = self.headers[tensor].shape
            if tensor in held or self.width not in shape:
                continue
            module = tensor.removesuffix(".weight").removesuffix(".bias")
            if shape[-1] == self.width and _is_named(said["norms"], tensor, module):
                vectors.append(tensor)
            elif not _is_named(said["inner"], tensor, module):
                unknown[tensor] = f"one of its sizes is {self.width}, as that of the residual stream"
        return Residual(tuple(placed["reads"]), tuple(placed["writes"]), tuple(vectors), unknown)


def _said(family: FamilyModel, part: Part, weights: Mapping[str, Weight]) -> dict[str, list[str]]:
    """Returns what a family file says of a part's residual stream: patterns on full names, by place."""
    rule = family.residual
    assert rule is not None
    leaves = {"reads": rule.reads, "writes": rule.writes, "norms": rule.norms, "inner": rule.inner}
    if part.block is not None:
        return {place: [f"{part.name}.{leaf}" for leaf in own] for place, own in leaves.items()}
    said: dict[str, list[str]] = {place: list(rule.outside.get(place, [])) for place in _PLACES}
    if part.kind == "rest":  # layers that predict more tokens are built as blocks
        block = re.compile(rf"((?:{re.escape(family.blocks)}|mtp\.layers)\.\d+)\.")
        roots = dict.fromkeys(found[1] for tensor in part.tensors if (found := block.match(tensor)))
        for place, own in leaves.items():
            said[place] += [f"{root}.{leaf}" for root in roots for leaf in own]
    else:
        ends = (name for name, weight in weights.items() if weight.role in {"embedding", "head"})
        said["reads"] += [name for name in ends if not _is_named(said["inner"], name)]
        said["norms"] += [f"{module}{end}" for module in (*family.embed, *family.tail) for end in ("", ".*")]
    return said


_PLACES: tuple[Literal["reads", "writes", "norms", "inner"], ...] = ("reads", "writes", "norms", "inner")


def _named(patterns: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Returns the names that match, each once, in the order of the patterns."""
    found = (name for pattern in patterns for name in _matches(pattern, names))
    return tuple(dict.fromkeys(found))


def _matches(pattern: str, names: Collection[str]) -> Iterable[str]:
    if not any(sign in pattern for sign in "*?["):
        return [pattern] if pattern in names else []
    return [name for name in names if fnmatchcase(name, pattern)]


def _is_named(patterns: Collection[str], *names: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _pairs(rule: ScalingModel, block: str, weights: Mapping[str, Weight], vectors: Collection[str]) -> list[Pair]:
    readers = _matching(rule.readers, block, weights)
    if f"{block}.{rule.source}.weight" in vectors:
        return [Pair(f"{block}.{rule.source}", True, readers)] if readers else []
    pairs = []
    for source in _matching([rule.source], block, weights):
        # An expert's rows are read by the same expert.
        own = tuple(reader for reader in readers if weights[reader].expert == weights[source].expert)
        pairs += [Pair(source, False, own)] if own else []
    return pairs


def _matching(patterns: Collection[str], block: str, weights: Mapping[str, Weight]) -> tuple[str, ...]:
    return _named([f"{block}.{pattern}" for pattern in patterns], weights)


def expert_bias(weight: Weight) -> str | None:
    """Returns the tensor that may hold the biases of all experts of a layer beside a fused weight, as in gpt-oss.

    None for anything but an expert's weight.
    """
    return f"{weight.view.tensor.removesuffix('.weight')}_bias" if weight.expert is not None else None
