"""Joins warnings that differ only in names and numbers into one, with a count."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A dotted name, with what stands behind it: `model.layers.3.mlp, expert 5`; a path is one as well.
_NAME = re.compile(r"[\w/~*{}-]*\w\.[\w./*{}-]*\w(, expert \d+)?")
_NUMBERS = re.compile(r"[-+]?\d+([.,]\d+)*(e[-+]?\d+)?")
_LIST = re.compile(r"#(?:, #)*( \.\.\.)?|@(?:, @)*( \.\.\.)?")


def kind(text: str) -> str:
    """Returns a warning with dots for each name, number and list of them."""
    return _LIST.sub("..", _NUMBERS.sub("#", _NAME.sub("@", text)))


def folded(texts: Iterable[str]) -> list[str]:
    """Returns the first warning of each kind, with the number of others where there are some."""
    alike = Alike()
    for text in dict.fromkeys(texts):
        alike.is_new(text)
    return [alike.text(one) for one in alike.first]


class Alike:
    """Counts warnings by kind.

    first   kind -> the first warning
    """

    def __init__(self) -> None:
        self.first: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def is_new(self, text: str) -> bool:
        """Counts a warning. True for the first of its kind."""
        one = kind(text)
        self._counts[one] = self._counts.get(one, 0) + 1
        return self.first.setdefault(one, text) is text and self._counts[one] == 1

    def text(self, one: str) -> str:
        """Returns the warning of a kind, with how many others there were."""
        more = self._counts[one] - 1
        return self.first[one] + (f" (and {more} more like this)" if more else "")

    def counted(self) -> list[str]:
        """Returns the kinds that came more than once."""
        return [self.text(one) for one, count in self._counts.items() if count > 1]
