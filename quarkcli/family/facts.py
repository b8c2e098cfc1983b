"""Reads from config.json the facts by which the blocks of one model may differ. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from quarkcli.family.config import QUANTIZATION

# Kinds of attention that read the same weights, as a rule.
_ONE_KIND = {"full_attention", "sliding_attention", "chunked_attention"}
# Keys under which those kinds do have weights of their own.
_APART = ("global_", "_k_eq_v", "swa_")
_NO_WEIGHTS = re.compile(r"rope|window|sparsity|multiplier|init|eps|limit|scal")
_FROM = re.compile(r"first_k|first_\w*layers|start_index|dense_layers|num_dense")
_LAST = re.compile(r"kv_shared|shared_kv")
_TO = re.compile(r"end_index")
_EVERY = re.compile(r"freq|step|period|interval|every|factor|stride")
_CHANCE = 2  # blocks of each kind: damage does not hit all of a kind, and no other (MiMo V2 says nothing else)
_SLACK = 4  # lists that speak of extra prediction layers as well are longer
_MLP = re.compile(r"dense|moe|mlp|expert|sparse|ffn|feed_forward|intermediate")
_ATTENTION = re.compile(r"attn|attention|layer_types|indexer|head|compress")


class Fact(NamedTuple):
    """A value per block.

    about    mlp or attention, where only that may differ by it; else empty
    by_kind  kinds of attention that read the same weights as a rule, one block of some: damage may look so as well
    """

    about: str
    values: tuple[object, ...]
    by_kind: bool = False


def facts(text: Mapping[str, Any], count: int) -> list[Fact]:
    """Returns the facts of config.json (the language model's part) that have a value per block.

    Lists with an entry per block, lists of block numbers, first and last blocks, and periods. A fact explains a
    difference when blocks on both sides have no value in common.
    """
    found = [
        Fact(_about(key, value), values, _is_by_kind(values, text))
        for key, value in entries(text)
        if not _NO_WEIGHTS.search(key)
        for values in _facts(key, value, count)
    ]
    return [fact for fact in dict.fromkeys(found) if len(set(fact.values)) > 1]


def explained(
    facts: list[Fact], name: str, one: Collection[int], other: Collection[int], *, alike: bool = False
) -> bool:
    """True when some fact that may concern `name` tells the blocks of one side from those of the other.

    alike   several tensors of the module differ, all in the same proportion, as damage does not leave them
    """
    unit = name.partition(".")[0]
    concerns = "mlp" if _MLP.search(unit) else "attention" if _ATTENTION.search(unit) else ""
    return any(
        not {fact.values[i] for i in one} & {fact.values[i] for i in other}
        for fact in facts
        if alike or not fact.by_kind
        if not fact.about or not concerns or fact.about == concerns
    )


def _about(key: str, value: object) -> str:
    """Returns the module that a key concerns: mlp, attention, or empty for both.

    The kinds of layers may be those of attention, or of both.
    """
    if _MLP.search(key):
        return "mlp"
    return "attention" if _ATTENTION.search(key) and not _MLP.search(str(value)) else ""


def entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every key with its value, those of objects inside as well, but for what says how it was quantized."""
    for key, value in config.items():
        if key in QUANTIZATION:
            continue
        if isinstance(value, Mapping):
            yield from entries(value)
        else:
            yield key, value


def _is_by_kind(values: tuple[object, ...], text: Mapping[str, Any]) -> bool:
    few = min(map(values.count, values), default=0) < _CHANCE
    return few and set(values) <= _ONE_KIND and not any(part in name for name in text for part in _APART)


def _facts(key: str, value: Any, count: int) -> Iterator[tuple[object, ...]]:
    blocks = range(count)
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        if _FROM.search(key):
            yield tuple(i < value for i in blocks)
        if _LAST.search(key):
            yield tuple(i >= count - value for i in blocks)
        if _TO.search(key):
            yield tuple(i <= value for i in blocks)
        if _EVERY.search(key) and value > 1:
            yield from (tuple((i + shift) % value == 0 for i in blocks) for shift in range(value))
        return
    if isinstance(value, str):
        if re.fullmatch(r"\d+(,\s*\d+)*", value):
            value = [int(number) for number in value.split(",")]
        elif "pattern" in key:
            value = list(value)
    if isinstance(value, list):
        yield from _listed(key, value, count)


def _listed(key: str, value: list[Any], count: int) -> Iterator[tuple[object, ...]]:
    if count <= len(value) <= count + _SLACK:
        yield tuple(entry if isinstance(entry, str) else repr(entry) for entry in value[:count])
    if "layer" in key and all(isinstance(entry, int) for entry in value):
        for shift in (0, 1):
            yield tuple(i + shift in value for i in range(count))
