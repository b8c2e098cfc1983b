"""Checks widths and counts against config.json, where it tells them, and within a module. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from quarkcli.family.config import expert_count, hidden_size, text_config
from quarkcli.family.facts import entries
from quarkcli.family.layout import Layout, Weight
from quarkcli.family.schema import FamilyModel, HeaderLike

_MATRICES = {"q", "k", "v", "o", "gate", "up", "down", "head", "embedding"}
_HEADED = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# Tables that are looked up by token, by their last step.
_TOKENS = {"embed_tokens", "wte", "word_embeddings", "embeddings", "embed", "tok_embeddings", "embed_in"}
_GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_NORMS = {f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")}
_ROUTERS = {"gate", "router", "wg"}
_VOCABULARY = re.compile(r"(^|_)(n_)?vocab(_size)?$")
_OTHER_WIDTH = re.compile(r"embed\w*_(dim|size)$|embedding_size$")


def misfits(
    family: FamilyModel, layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> Iterator[str]:
    """Yields one text per tensor that has not the shape which its role, its module or config.json asks for."""
    yield from _not_matrices(family, layout, headers)
    yield from _outside(family, layout, config, headers)
    yield from _head(family, config, headers)
    if not layout.inferred:
        yield from _ends(family, layout, config, headers)
    yield from _routed(layout, config, headers)
    # Experts of a layer are alike, which is checked elsewhere: the first stands for all.
    inside = {part.index for part in layout.parts if part.kind != "rest"}
    weights = [w for w in layout.weights.values() if w.part in inside and (w.expert is None or w.expert[1] == 0)]
    yield from _gated(weights)
    yield from _biases(weights, headers)
    if not layout.inferred:
        yield from _stream(family, layout, config, weights)
        yield from _norms(layout, config, headers)


def _not_matrices(family: FamilyModel, layout: Layout, headers: Mapping[str, HeaderLike]) -> Iterator[str]:
    spec = family.attention
    listed = {f"{leaf}.weight" for group in family.sites for leaf in group}
    listed |= {f"{spec.module}.{leaf}.weight" for leaf in (spec.q, spec.k, spec.v)} if spec else set()
    for part in layout.parts:
        for tensor in part.tensors if part.kind != "rest" else ():
            shape = headers[tensor].shape
            if len(shape) != 2 and tensor.endswith(".weight"):
                known = layout.tensor_roles.get(tensor) in _MATRICES or tensor[len(part.name) + 1 :] in listed
                if known and layout.tensor_roles.get(tensor) != "conv":
                    yield f"{tensor} is {list(shape)}, not a matrix"


def _outside(
    family: FamilyModel, layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> Iterator[str]:
    """Checks the rows (vocabulary) and columns (residual stream) of embedding, head and last norm."""
    text = text_config(config)
    vocabularies = _vocabularies(text, config)
    hidden = hidden_size(config) if not any(_OTHER_WIDTH.search(key) for key in text) else None
    for part in layout.parts:
        for tensor in part.tensors if part.kind in ("embed", "tail") else ():
            role, shape = layout.tensor_roles.get(tensor), headers[tensor].shape
            module = tensor.removesuffix(".weight")
            tokens = role == "embedding" and module.rpartition(".")[2] in _TOKENS
            head = role == "head" and module in family.tail  # a linear below one has other rows (ModernBERT)
            if (tokens or head) and len(shape) == 2:
                spare = family.spare_rows if tokens else 0
                yield from _vocabulary(tensor, shape, vocabularies, spare, layout.inferred)
                if hidden is not None and shape[1] != hidden:
                    yield f"{tensor} is {list(shape)}, but config.json has width {hidden}"
            known = role == "norm" and not layout.inferred and part.kind == "tail"
            if known and len(shape) == 1 and hidden is not None and shape[0] != hidden:
                yield f"{tensor} is {list(shape)}, but config.json has width {hidden}"


def _vocabulary(
    tensor: str, shape: tuple[int, ...], vocabularies: set[int], spare: int, inferred: bool
) -> Iterator[str]:
    rows = shape[0] - spare
    short = inferred and bool(vocabularies) and rows >= min(vocabularies)  # its own code may pad
    if vocabularies and rows not in vocabularies and not short:
        said = " or ".join(map(str, sorted(vocabularies)))
        yield f"{tensor} is {list(shape)}, but config.json has a vocabulary of {said}"


def _vocabularies(text: Mapping[str, Any], config: Mapping[str, Any]) -> set[int]:
    """Returns every number of rows that config.json allows for a table of tokens."""
    if not any(_VOCABULARY.search(key) for key in text):
        return set()
    every = [(key, value) for of in (text, config) for key, value in of.items() if _is_number(value)]
    sizes = {value for key, value in every if _VOCABULARY.search(key)}
    rounds = {value for key, value in every if "vocab" in key and ("multiple" in key or "divisible" in key)}
    return sizes | {-(-size // to) * to for size in sizes for to in rounds if to > 0}


def _ends(
    family: FamilyModel, layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> Iterator[str]:
    """Checks that the embedding (or a tied head) is there, and a last norm where blocks have norms with weights."""
    heads = [module for module in family.tail if module in family.roles.get("head", [])]
    stand_in = config.get("tie_word_embeddings") is not False and any(f"{head}.weight" in headers for head in heads)
    if f"{family.embed[0]}.weight" not in headers and not stand_in:
        yield f"{family.embed[0]}.weight is missing"
    blocks = [part for part in layout.parts if part.kind == "block"]
    normed = any(layout.tensor_roles.get(tensor) == "norm" for part in blocks for tensor in part.tensors)
    norms = [module for module in family.tail if "norm" in module.rpartition(".")[2] or module.endswith("ln_f")]
    if norms and normed and family.ends_in_norm(config) and not any(f"{norm}.weight" in headers for norm in norms):
        yield f"{norms[0]}.weight is missing"


def _head(family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> Iterator[str]:
    """Reports a missing head when config.json says that it is not the embedding."""
    heads = [module for module in family.tail if module in family.roles.get("head", [])]
    said = {of.get("tie_word_embeddings") for of in (text_config(config), config)}
    names = config.get("architectures")
    headed = isinstance(names, list) and bool(names) and str(names[0]).endswith(_HEADED)
    if (
        heads
        and headed
        and False in said
        and True not in said
        and not any(f"{head}.weight" in headers for head in heads)
    ):
        yield f"{heads[0]}.weight is missing, but config.json has tie_word_embeddings: false"


def _routed(layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> Iterator[str]:
    """Checks that fused experts have one matrix per expert, and routers a row for each."""
    count = expert_count(config)
    if count is None:
        return
    seen: set[str] = set()
    for weight in layout.weights.values():
        tensor = weight.view.tensor
        if weight.view.expert is not None and weight.view.stack is None and tensor not in seen:
            seen.add(tensor)
            shape = headers[tensor].shape
            if shape[0] != count:
                yield f"{tensor} is {list(shape)}, but config.json has {count} experts"


def _gated(weights: Sequence[Weight]) -> Iterator[str]:
    """Checks that gate and up of one module have one shape, and down its mirror image; attention gates its output."""
    modules: dict[str, dict[str, Weight]] = {}
    attention = {weight.name.rpartition(".")[0] for weight in weights if weight.role in ("q", "k", "v")}
    for weight in weights:
        if weight.name.rpartition(".")[0] in attention:
            continue
        role = _GATED.get(weight.name.rpartition(".")[2], weight.role.removeprefix("expert_"))
        if role in ("gate", "up", "down"):
            modules.setdefault(weight.name.rpartition(".")[0], {})[role] = weight
    for module, own in modules.items():
        up, down, gate = own.get("up"), own.get("down"), own.get("gate")
        for leaf, role in _GATED.items():  # without a gate it may be a plain MLP
            if gate and gate.name.endswith(".gate_proj") and role not in own:
                yield f"{module}.{leaf}.weight is missing beside its gate"
        if up and gate and up.shape != gate.shape:
            yield f"{up.name}.weight is {list(up.shape)}, but its gate is {list(gate.shape)}"
        elif up and down and up.shape != down.shape[::-1]:
            yield f"{down.name}.weight is {list(down.shape)}, but the weights before it are {list(up.shape)}"


def _biases(weights: Iterable[Weight], headers: Mapping[str, HeaderLike]) -> Iterator[str]:
    for weight in weights:
        shape = headers[weight.bias].shape if weight.bias is not None else (weight.shape[0],)
        if len(shape) != 1 or shape[0] not in weight.shape:
            yield f"{weight.bias} is {list(shape)}, but its weight is {list(weight.shape)}"


def _stream(family: FamilyModel, layout: Layout, config: Mapping[str, Any], weights: Sequence[Weight]) -> Iterator[str]:
    """Checks that attention and MLP read and write the residual stream, with the heads that config.json gives."""
    text, hidden = text_config(config), hidden_size(config)
    spec = family.attention
    if hidden is None or spec is None:
        return
    one_name = spec.latent or len({spec.q, spec.k, spec.v}) < 3
    parents = {module.name for module in layout.attention} if not one_name else set()
    kinds = len({weight.shape for weight in weights if weight.role == "k"})
    queries, keys = _head_rows(text, hidden, nested=text is not config, kinds=kinds)
    queries |= {2 * rows for rows in queries} if spec.gated else set()
    for weight in weights:
        parent, _, leaf = weight.name.rpartition(".")
        here = parent in parents
        allowed = {spec.q: queries, spec.k: keys, spec.v: keys}.get(leaf, set()) if here else set()
        gated = weight.role in ("gate", "up") or (weight.expert is None and _GATED.get(leaf) in ("gate", "up"))
        reads = gated or (here and leaf in (spec.q, spec.k, spec.v))
        reads |= weight.role == "router" and leaf in _ROUTERS
        if (reads and weight.shape[1] != hidden) or (here and weight.role == "o" and weight.shape[0] != hidden):
            yield f"{weight.name}.weight is {list(weight.shape)}, but config.json has width {hidden}"
        elif allowed and weight.shape[0] not in allowed:
            said = " or ".join(map(str, sorted(allowed)))
            yield f"{weight.name}.weight is {list(weight.shape)}, but the heads in config.json have {said} rows"


def _norms(layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> Iterator[str]:
    """Checks that norms in front of attention and MLP, and behind them, are as wide as the residual stream."""
    hidden = hidden_size(config)
    for part in layout.parts if hidden is not None else ():
        for tensor in part.tensors if part.kind == "block" else ():
            leaf, shape = tensor[len(part.name) + 1 :], tuple(headers[tensor].shape)
            if leaf in _NORMS and shape != (hidden,):
                yield f"{tensor} is {list(shape)}, but config.json has width {hidden}"


def _head_rows(text: Mapping[str, Any], hidden: int, *, nested: bool, kinds: int) -> tuple[set[int], set[int]]:
    """Returns rows that q may have, and k and v; empty where config.json does not tell.

    A config within another leaves out what is its class's default. Nothing is concluded there from what it does not
    say, and nothing at all where blocks differ: the heads of one kind may be those that are left out.

    kinds   different shapes that k has
    """
    listed = ((key, value if isinstance(value, list) else [value]) for key, value in entries(text))
    numbers = [(key, one) for key, values in listed for one in values if _is_number(one)]
    grouped = re.compile(r"kv_heads|key_value_heads|query_group")
    keys = {one for key, one in numbers if grouped.search(key)}
    heads = {one for key, one in numbers if re.search(r"heads?$", key) and not grouped.search(key)}
    widths = {one for key, one in numbers if re.search(r"head_dim$|kv_channels$|head_size$", key)}
    if nested and (kinds > 1 or not keys):
        return set(), set()
    if not widths and not nested:
        widths = {hidden // one for one in heads if one and hidden % one == 0}
    if not widths or not heads:
        return set(), set()
    return _products(heads, widths), _products(keys or heads, widths)


def _products(counts: set[int], widths: set[int]) -> set[int]:
    return {count * width for count in counts for width in widths}


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
