"""Finds the entries that match each slot.

Names that differ only in their numbers are matched together where the numbers cannot matter, else one by one.

A model of 61 blocks and 256 experts has 46,000 weights and a few dozen kinds of names. A shell pattern without `?` and
`[` whose digits stand beside letters (`w1`) cannot tell the numbered steps of a path apart: only `*` can stand for
them. It is tried once for every name with its numbers folded. Full names are looked up. Any other pattern is tried on
the names that hold its longest plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from quarkcli.family import Weight
from quarkcli.plan.model import TARGET_KINDS
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.match import Patterns, fold, ignores_numbers

ATTENTION_CLASS = "nn.Module"  # the class that entries have for attention slots
Hits = tuple[int, ...]  # indices of entries, ascending

_SUFFIXES = tuple(f".{kind}_quantizer" for kind in TARGET_KINDS)
_STAGE = re.compile(r"(?P<glob>(?!re:).+)\.(?P<first>[0-9]+)|(?P<regex>re:.+)\\\.(?P<second>[0-9]+)")
_SPECIAL = re.compile(r"[*?\[\]]")
# A group in which nothing reaches beyond it: neither branches and groups of its own, nor anchors.
_PLAIN_GROUP = re.compile(r"re:\(\?:(?:[^()|$\\]|\\[^a-zA-Z0-9]|\\[dDsSwW])*\)")


def stage_of(pattern: str) -> tuple[str, int | None]:
    """Returns (pattern of the slot, stage of its chain) of `*weight_quantizer.1`.

    The stage is None when the whole slot is meant.
    """
    found = _STAGE.fullmatch(pattern)
    if found is None:
        return pattern, None
    return found["glob"] or found["regex"], int(found["first"] or found["second"])


class _Pattern(NamedTuple):
    """An entry's pattern on whole slots.

    kinds    positions in TARGET_KINDS of the slots that it can match at all
    module   the pattern of the module alone, where the text is that and one kind's suffix
    """

    entry: int
    text: str
    match: Callable[[str], object]
    kinds: tuple[int, ...]
    module: str | None


class Names:
    """The patterns of an ordered list. Raises ConfigError with the entry's origin for one that is not valid."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.exact: dict[str, list[int]] = {}
        self.file = Patterns()
        self.patterns: list[_Pattern] = []
        for index, entry in enumerate(entries):
            text, _ = stage_of(entry.quantizer_path)
            if _SPECIAL.search(text) or text.startswith("re:"):
                match = self.file.matcher(text, str(entry.origin))  # the first, for its error shows what was typed
                module, kind = _module_of(text)
                if module is not None:
                    self.file.matcher(module, str(entry.origin))
                kinds = _kinds(text) if kind is None else (kind,)
                self.patterns.append(_Pattern(index, text, match, kinds, module))
            else:
                self.exact.setdefault(text, []).append(index)
        self.exact_modules = {name.rpartition(".")[0] for name in self.exact}
        self.folding = [pattern for pattern in self.patterns if ignores_numbers(pattern.text)]
        self.single = [pattern for pattern in self.patterns if not ignores_numbers(pattern.text)]

    def learn(self, slots: Iterable[str]) -> None:
        """Says which slots `of_slot` will be asked for, where there are many."""
        self.file.learn((pattern.text for pattern in self.patterns), slots)

    def of_slot(self, names: Collection[str]) -> Hits:
        """Returns the entries that match a slot, by any of its names."""
        hits = {index for name in names for index in self.exact.get(name, ())}
        hits.update(p.entry for p in self.patterns if any(p.match(name) for name in names))
        return tuple(sorted(hits))

    def of_weights(self, weights: Collection[Weight]) -> Iterator[tuple[Weight, tuple[Hits, ...]]]:
        """Yields every weight with the entries that match its slots, one tuple per kind in TARGET_KINDS."""
        own = self._singly(weights)
        classes: dict[object, tuple[Hits, ...]] = {}
        for weight in weights:
            spellings = (weight.name, *weight.aliases)
            # The experts of a layer differ in their number alone.
            key = (weight.expert[0], weight.role) if weight.expert else fold("\n".join(spellings))
            hits = classes.get(key)
            if hits is None:
                hits = classes[key] = _matched(self.folding, fold("\n".join(spellings)).split("\n"))
            single = own.get(weight.name)
            if single is not None:
                hits = tuple(_merged(*pair) for pair in zip(hits, single, strict=True))
            if not self.exact_modules.isdisjoint(spellings):
                hits = tuple(_merged(*pair) for pair in zip(hits, self._exactly(spellings), strict=True))
            yield weight, hits

    def _exactly(self, spellings: Collection[str]) -> tuple[Hits, ...]:
        return tuple(
            tuple(index for name in spellings for index in self.exact.get(name + suffix, ())) for suffix in _SUFFIXES
        )

    def _singly(self, weights: Collection[Weight]) -> dict[str, tuple[Hits, ...]]:
        """Returns a mapping from weight to entries by kind, for the patterns that are tried name by name."""
        if not self.single:
            return {}
        spellings = [(name, weight.name) for weight in weights for name in (weight.name, *weight.aliases)]
        names = [name for name, _ in spellings]
        self.file.learn([p.module for p in self.single if p.module is not None], names)
        self.file.learn([p.text for p in self.single if p.module is None], (n + s for s in _SUFFIXES for n in names))
        found: dict[str, list[list[int]]] = {}
        known: dict[str, set[str]] = {}
        for pattern in self.single:
            for kind in pattern.kinds:
                for name in self._owners(pattern, _SUFFIXES[kind], spellings, known):
                    found.setdefault(name, [[] for _ in TARGET_KINDS])[kind].append(pattern.entry)
        return {name: tuple(tuple(hits) for hits in kinds) for name, kinds in found.items()}

    def _owners(
        self, pattern: _Pattern, suffix: str, spellings: list[tuple[str, str]], known: dict[str, set[str]]
    ) -> Collection[str]:
        """Returns weights whose slot with this suffix the pattern matches.

        `known` keeps the answers of module patterns.
        """
        if pattern.module is None:
            piece, match = _plain_piece(pattern.text), pattern.match
            return {owner for name, owner in spellings if piece in (slot := name + suffix) and match(slot)}
        if pattern.module not in known:
            piece, match = _plain_piece(pattern.module), self.file.matcher(pattern.module)
            known[pattern.module] = {owner for name, owner in spellings if piece in name and match(name)}
        return known[pattern.module]


def _plain_piece(text: str) -> str:
    """Returns plain text that every match of a pattern holds."""
    return "" if text.startswith("re:") else max(re.split(r"[*?]", text.split("[")[0]), key=len)


def _module_of(text: str) -> tuple[str | None, int | None]:
    """Returns (pattern of the module, position of the kind) where `text` is that pattern and one kind's suffix."""
    regex = text.startswith("re:")
    for kind, suffix in enumerate(_SUFFIXES):
        module = text.removesuffix(suffix.replace(".", "\\.") if regex else suffix)
        if module != text and (_PLAIN_GROUP.fullmatch(module) if regex else "[" not in module):
            return module, kind
    return None, None


def _matched(patterns: list[_Pattern], spellings: list[str]) -> tuple[Hits, ...]:
    return tuple(
        tuple(p.entry for p in patterns if kind in p.kinds and any(p.match(name + suffix) for name in spellings))
        for kind, suffix in enumerate(_SUFFIXES)
    )


def _merged(one: Hits, other: Hits) -> Hits:
    return tuple(sorted({*one, *other})) if other else one


def _kinds(text: str) -> tuple[int, ...]:
    """Returns the kinds whose suffix the text behind a shell pattern's last special character allows."""
    if text.startswith("re:"):
        return tuple(range(len(_SUFFIXES)))
    tail = _SPECIAL.split(text)[-1]
    return tuple(i for i, suffix in enumerate(_SUFFIXES) if suffix.endswith(tail) or tail.endswith(suffix))
