"""Matches regular expressions from files on names of modules, and limits their time.

RE2 takes linear time, and answers as `re` does for names and patterns of printable ASCII characters. What it does not
take (lookaround, references, very large patterns) is tried by `re` in a child process that may use `LIMIT` seconds of
processor time for all patterns of a file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal

from quarkcli.errors import ConfigError

LIMIT = 2.0
# Instructions of a compiled pattern up to which RE2 keeps its speed and its memory.
_LARGEST = 1000
# What both engines accept and read differently: `{,3}`, classes such as [:alpha:], and `\B` in an empty text.
_READ_OTHERWISE = re.compile(r"\{,|\[:|\\B")
_WALL_SECONDS = 60.0

# Reads jobs from stdin and writes one line per finished job; the alarm's own action ends the process.
_CHILD = """
import json, re, signal, sys
work = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, work["seconds"])
for text, count in work["jobs"]:
    match = getattr(re.compile(text), work["method"])
    print(json.dumps([at for at in range(count) if match(work["names"][at])]), flush=True)
print(json.dumps(signal.getitimer(signal.ITIMER_PROF)[0]))
"""


def is_plain(name: str) -> bool:
    """True for a text in which both engines find the same."""
    return name.isascii() and name.isprintable()


# How a module's expression stands in that of its slot (`match.slot_pattern`).
_OF_SLOT = re.compile(r"((?:\(\?[aiLmsux]+\))*)\(\?:(.*)\)\\\.[a-z]+_quantizer", re.DOTALL)


def as_typed(text: str) -> str:
    """Returns the module's expression in that of its slot, as the user typed it; any other expression as it is."""
    found = _OF_SLOT.fullmatch(text)
    return found[1] + found[2] if found is not None else text


class Expressions:
    """The regular expressions of one file. Raises ConfigError with the place of a pattern that does not do.

    method  whether a pattern must match a name as a whole, or its beginning
    """

    def __init__(self, method: Literal["fullmatch", "match"] = "fullmatch") -> None:
        self._method = method
        self._places: dict[str, str] = {}
        self._known: dict[str, dict[str, bool]] = {}
        self._left = LIMIT

    def matcher(self, text: str, where: str = "") -> Callable[[str], bool]:
        """Returns a function that tells whether the pattern matches a name. `where` is the place of the pattern."""
        _check(text, where)
        self._places.setdefault(text, where)
        known = self._known.setdefault(text, {})

        def asked(name: str) -> bool:
            if name not in known:
                self.learn([text], [name])
            return known[name]

        linear = _linear(text, self._method)
        if linear is None:
            return asked
        # Methods of texts, because this is called for every name.
        return lambda name: bool(linear(name)) if name.isascii() and name.isprintable() else asked(name)

    def learn(self, texts: Iterable[str], names: Iterable[str]) -> None:
        """Asks the child now what only it can answer of these patterns and names: once, instead of name by name."""
        patterns = list(dict.fromkeys(texts))
        if not patterns:
            return
        asked = list(dict.fromkeys(names))
        odd = [name for name in asked if not is_plain(name)]
        slow = [text for text in patterns if _linear(text, self._method) is None]
        jobs = [(text, len(asked)) for text in slow]
        jobs += [(text, len(odd)) for text in patterns if odd and text not in slow]
        if jobs:
            self._ask(jobs, [*odd, *filter(is_plain, asked)])

    def _ask(self, jobs: list[tuple[str, int]], names: list[str]) -> None:
        """Each job is a pattern and how many of the first names it is tried on."""
        lines = self._run(jobs, names)
        if len(lines) <= len(jobs):
            text = jobs[len(lines)][0]
            raise ConfigError(
                f"matching 're:{as_typed(text):.200}' takes too long: all patterns of a file have {LIMIT:g} s together",
                where=self._places[text],
                hint="use fewer * and + in a row; without lookaround and back references an expression is fast",
                kind="E-PATTERN-REGEX",
            )
        for (text, count), line in zip(jobs, lines, strict=False):
            self._known[text].update(dict.fromkeys(names[:count], False))
            self._known[text].update((names[at], True) for at in json.loads(line))
        self._left = json.loads(lines[-1])

    def _run(self, jobs: list[tuple[str, int]], names: list[str]) -> list[bytes]:
        """Returns the lines that the child wrote: one per job, and the seconds left; fewer when it ran out of time."""
        import subprocess

        work = {"seconds": max(self._left, 1e-3), "method": self._method, "jobs": jobs, "names": names}
        command = [sys.executable, "-I", "-S", "-c", _CHILD]
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null) as child:
            try:
                written, _ = child.communicate(json.dumps(work).encode(), timeout=_WALL_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                written, _ = child.communicate()
        return written.splitlines()


@lru_cache(maxsize=4096)
def _check(text: str, where: str) -> None:
    fault = _fault(text)
    if fault is None:
        return
    typed = as_typed(text)
    fault = _fault(typed) or fault  # its positions count from where the user's text begins
    raise ConfigError(
        f"'re:{typed:.200}' is not a regular expression: {fault}",
        where=where,
        hint="correct it, or write a pattern without 're:', in which * stands for any text",
        kind="E-PATTERN-REGEX",
    ) from fault


def _fault(text: str) -> Exception | None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        return error
    return None


@lru_cache(maxsize=4096)
def _linear(text: str, method: str) -> Callable[[str], Any] | None:
    """Returns RE2's matcher of a pattern; None where it has none that answers as `re`, or not quickly."""
    if not is_plain(text) or _READ_OTHERWISE.search(text):
        return None
    import re2  # lists and help match nothing

    options = re2.Options()
    options.never_capture = True
    options.log_errors = False
    try:
        if re2.compile(text, options).programsize > _LARGEST:
            return None
    except re2.error:
        return None
    # A set of one: half the time of a match that is also given as an object.
    one = re2.Set.FullMatchSet(options) if method == "fullmatch" else re2.Set.MatchSet(options)
    one.Add(text)
    one.Compile()
    return one.Match
