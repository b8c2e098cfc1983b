"""Joins the mistakes of a file into one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from quarkcli.errors import ConfigError, QuarkError

_PLACE = re.compile(r":(\d+):(\d+)$")


class Mistakes(ConfigError):
    """Several mistakes. `each`: one error for each of them."""

    def __init__(self, each: Sequence[QuarkError], *, where: str = "", hint: str = "") -> None:
        lines = "\n".join(f"  {error}{f' ({error.hint})' if error.hint else ''}" for error in each)
        super().__init__(f"{len(each)} problems\n{lines}", where=where, hint=hint, kind="E-RECIPE-MISTAKES")
        self.each = list(each)


def apart(error: QuarkError) -> list[QuarkError]:
    """Returns the mistakes that an error is about, each as an error of its own."""
    return list(error.each) if isinstance(error, Mistakes) else [error]


def together(errors: Iterable[QuarkError], *, where: str = "", hint: str = "") -> QuarkError:
    """Returns one error for all of them; a single one stays as it is. The first about a place speaks for it.

    What is said of an entry as a whole is left out where something is said of its line.

    where   the file, for a message about several mistakes
    """
    single = [one for error in errors for one in apart(error)]
    places = {one.where or one.what: one for one in reversed(single)}
    lines = {_position(one)[0] for one in places.values() if one.kind != "E-ENTRY"} - {0}
    each = [one for one in places.values() if one.kind != "E-ENTRY" or _position(one)[0] not in lines]
    each.sort(key=_position)
    return each[0] if len(each) == 1 else Mistakes(each, where=where, hint=hint)


def _position(error: QuarkError) -> tuple[int, int]:
    found = _PLACE.search(error.where)
    return (int(found[1]), int(found[2])) if found else (0, 0)
