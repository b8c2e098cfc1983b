"""Suggests patterns in place of one that matched nothing.

Each suggestion is tried on the names first, so that it matches where the other did not.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from itertools import islice, product

from quarkcli.errors import ConfigError, near_misses, some
from quarkcli.recipe.match import NUMBER, Patterns, ignores_numbers, starred, with_flags

_EDGES = re.compile(r"([*.]*)(.*?)([*.]*)", re.DOTALL)
_PIECE = re.compile(r"[^.*?\[\]!]+")
_PIECE_OF_EXPRESSION = re.compile(r"(?<![\\\w])[A-Za-z_]\w*")
_TAIL = re.compile(r"\.(?:weight|bias|\w+_quantizer)")
_HEADS = "<what names begin with>"
# What to try at an end of a pattern, by what it has there.
_FRONTS: dict[str, tuple[str, ...]] = {"": ("", _HEADS, "*."), "*": ("*.", "*"), "*.": ("*.", "")}
_ENDS: dict[str, tuple[str, ...]] = {"": ("", ".*"), "*": ("*", ".*"), ".*": (".*", "")}
_MARK = "0number0"  # stands for a number that is sought
_COMBINATIONS = 9
_ABOUT = 0.1
_MOST = 4_000_000  # names that are tried, all suggestions together: a second
_EXPRESSION = 4  # as many counts a name that an expression is tried on
_OTHERWISE = "run 'quark plan --modules' to see the names"


def hint(pattern: str, names: Iterable[str], otherwise: str = _OTHERWISE) -> str:
    """Returns what to do about a pattern that matches none of the names: patterns near it, else `otherwise`."""
    found, note = _near(pattern, _Names(pattern, names))
    listed = ", ".join(f"'{one}'" for one in found[:3])
    return f"did you mean {listed}?{note}" if found else otherwise


def suggestions(pattern: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Returns patterns near one that matches none of the names; each of them matches some.

    `*dwn_proj` among `model.layers.0.mlp.down_proj` ... gives `*down_proj`, and `layers.0.*` gives `model.layers.0.*`.
    """
    return _near(pattern, _Names(pattern, names))[0][:limit]


def examples(pattern: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Returns names that match a pattern, or one near it: of those that differ in their numbers only, the first."""
    every = list(names)
    found: dict[str, str] = {}
    for one in (pattern, *suggestions(pattern, every, limit)):
        for name in filter(Patterns().matcher(one), every):
            found.setdefault(starred(name), name)
    return list(found.values())[:limit]


class _Names:
    """The names that a suggestion for `pattern` may match.

    words   all their steps but numbers
    heads   what they begin with, up to a number
    """

    def __init__(self, pattern: str, names: Iterable[str]) -> None:
        self._asked, self.every = pattern, list(names)
        self._few = _folded(pattern, self.every)
        self._patterns = Patterns()
        self._left = _MOST
        steps = [name.split(".") for name in self._few]
        self.words = sorted({step for own in steps for step in own if not step.isdigit()})
        self.heads = sorted({head for own in steps for head in _heads(own)}, key=len)

    def fit(self, pattern: str) -> bool:
        """True when the pattern matches one of the names. False also when too many names were tried already."""
        return pattern != self._asked and any(self._answers(pattern))

    def all_fit(self, pattern: str) -> bool:
        return all(self._answers(pattern))

    def _answers(self, pattern: str) -> Iterator[object]:
        self._left -= len(self._few) * (_EXPRESSION if pattern.startswith("re:") else 1)
        if self._left < 0:
            return
        try:
            match = self._patterns.matcher(pattern)
            self._patterns.learn([pattern], self._few)
        except ConfigError:  # an expression that is none, or takes too long
            return
        yield from map(match, self._few)

    def numbers(self, marked: str) -> list[int]:
        """Returns the numbers that names have in the place of the mark."""
        shape = fnmatch.translate(marked).replace(_MARK, "(?P<number>[0-9]{1,9})")
        found = map(re.compile(shape).fullmatch, self.every)
        return sorted({int(match["number"]) for match in found if match})


def _folded(pattern: str, names: list[str]) -> list[str]:
    """Returns one name of all that differ only in numbers which the pattern does not name."""
    if not ignores_numbers(NUMBER.sub("", pattern)):
        return names
    named = set(NUMBER.findall(pattern))
    kept = {NUMBER.sub(lambda found: found[0] if found[0] in named else "*", name): name for name in reversed(names)}
    return list(reversed(kept.values()))


def _heads(steps: list[str]) -> Iterator[str]:
    """Yields what a name begins with, up to its first number: `model` and `model.layers`."""
    for count, step in enumerate(steps):
        if count:
            yield ".".join(steps[:count])
        if step.isdigit():
            return


def _near(pattern: str, names: _Names) -> tuple[list[str], str]:
    """Returns patterns that match, nearest first, and a note on numbers."""
    core, end = pattern, ""
    if not pattern.startswith("re:") and _TAIL.fullmatch(pattern, max(pattern.rfind("."), 0)):
        core, _, end = pattern.rpartition(".")
        end = f".{end}"
    bases = [core, *_respelled(core, names)]
    stages = (
        (one for one in _first(core, end, names)),
        (one for base in bases[1:] for one in _first(base, end, names)),
        (one for base in bases for one in _first(base, end, names, loose=True)),
    )
    for stage in stages:
        found = list(dict.fromkeys(stage))
        if found:
            return [one for one in found if not names.all_fit(one)] or found, ""
    if core.startswith("re:"):
        return [], ""
    renumbered = next((found for base in bases for found in _renumbered(base, end, names)), None)
    return renumbered or next(((found, "") for base in bases if (found := _by_last_word(base, end, names))), ([], ""))


def _first(base: str, tail: str, names: _Names, *, loose: bool = False) -> list[str]:
    """Returns the first forms of a pattern that match."""
    for forms in _forms(base, tail, names.heads, loose=loose):
        found = list(filter(names.fit, forms))
        if found:
            return found
    return []


def _forms(base: str, tail: str, heads: list[str], *, loose: bool = False) -> Iterator[list[str]]:
    """Yields a pattern as it is and with other ends, nearest first. Those of one list are equally near.

    tail    the end that says which slot or tensor is meant, which may be one too much
    loose   also with a star where a step is not complete: `*.up*`
    """
    yield [base + tail]
    if base.startswith("re:"):
        yield from _forms_of_expression(base[3:])
        return
    edges = _EDGES.fullmatch(base)
    front, stem, end = edges.groups() if edges is not None else ("", "", "")
    if not stem:
        return
    fronts: tuple[str, ...] = _FRONTS.get(front, (front,))
    ends: tuple[str, ...] = _ENDS.get(end, (end,))
    if loose:
        fronts += () if stem[0].isdigit() else ("*",)
        ends += () if stem[-1].isdigit() else ("*",)
    tails = dict.fromkeys((tail, f"{tail}_quantizer", "") if tail else ("",))
    for last, before, behind in product(tails, fronts, ends):
        yield [f"{head}{stem}{behind}{last}" for head in ([f"{h}." for h in heads] if before is _HEADS else [before])]


def _forms_of_expression(text: str) -> Iterator[list[str]]:
    start, rest = with_flags(text)
    if "|" in rest:  # no branch may be left out
        yield [f"re:{start}.*(?:{rest}).*"]
        return
    yield [f"re:{start}.*{rest}"]
    yield [f"re:{start}{rest}.*"]
    yield [f"re:{start}.*{rest}.*"]


def _respelled(pattern: str, names: _Names) -> Iterator[str]:
    """Yields the pattern with words of the names in place of those that no name has."""
    piece = _PIECE_OF_EXPRESSION if pattern.startswith("re:") else _PIECE
    unknown = [found for found in piece.finditer(pattern) if _is_unknown(found, names.words)]
    choices = [_close(found[0], names.words) for found in unknown]
    for words in islice(product(*choices), _COMBINATIONS) if unknown else ():
        text = pattern
        for found, word in reversed(list(zip(unknown, words, strict=True))):
            text = text[: found.start()] + word + text[found.end() :]
        yield text


def _close(word: str, words: list[str]) -> list[str]:
    """Returns the nearest word and those that are about as near."""
    near = near_misses(word, words)
    alike = [SequenceMatcher(None, word.lower(), one.lower()).ratio() for one in near]
    return [one for one, ratio in zip(near, alike, strict=True) if ratio > alike[0] - _ABOUT]


def _is_unknown(found: re.Match[str], words: list[str]) -> bool:
    """True for a word that no step is; beside a star it may be a part of one."""
    text, word = found.string, found[0]
    if text.startswith("re:"):
        flags, _ = with_flags(text[3:])
        return found.start() >= 3 + len(flags) and not any(word in step for step in words)
    opened, closed = text[: found.start()][-1:] not in ("", "."), text[found.end() :][:1] not in ("", ".")
    if word.isdigit():
        return False
    return not any(
        word in step and (opened or step.startswith(word)) and (closed or step.endswith(word)) for step in words
    )


def _renumbered(base: str, tail: str, names: _Names) -> Iterator[tuple[list[str], str]]:
    """Yields the pattern with a number that exists in place of one that does not, and a note on those that do."""
    for found in NUMBER.finditer(base):
        marked = f"{base[: found.start()]}{_MARK}{base[found.end() :]}"
        for form in (form for forms in _forms(marked, tail, names.heads) for form in forms):
            numbers = names.numbers(form) if names.fit(form.replace(_MARK, "*")) else []
            if numbers:
                asked = int(found[0][:9])
                nearest = min(numbers, key=lambda number: abs(number - asked))
                note = f" In place of {found[0]} the model has {_listed(numbers)}"
                yield [form.replace(_MARK, str(nearest))], note


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return some(numbers)


def _by_last_word(core: str, tail: str, names: _Names) -> list[str]:
    """Returns a pattern with the last word alone, behind the last number: the words before it do not go with it."""
    words = [found[0] for found in _PIECE.finditer(core) if not found[0].isdigit()]
    if not words or words[-1] not in names.words:
        return []
    numbered = [core[: found.end()] + "." for found in NUMBER.finditer(core)]
    for before in (*numbered[-1:], ""):
        found = _first(f"{before}*.{words[-1]}", tail, names)
        if found and not all(map(names.all_fit, found)):
            return found
    return []
