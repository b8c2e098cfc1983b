"""Defines the errors that a user can cause, and their exit codes.

Every user error is one plain message: what happened, where, and what to do next. Anything that is not a
`QuarkError` is a defect of ours and ends with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum
from itertools import islice
from typing import Any


class ExitCode(IntEnum):
    """Process exit codes; part of the public interface."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    MODEL = 4
    ACCESS = 5
    RESOURCES = 6
    DATA = 7
    CHECK = 8
    STOPPED = 75
    INTERRUPTED = 130
    TERMINATED = 143


class QuarkError(Exception):
    """A user error.

    what    the fault, one sentence
    where   file, flag, tensor or module concerned, or "" when `what` already names it
    hint    the fix, or ""
    kind    its name in the index of errors (`quark explain`), such as E-PATTERN-NOMATCH
    result  of a check that says no: what was found all the same, as `--json` shows it; else None
    """

    code = ExitCode.INTERNAL
    result: dict[str, Any] | None = None

    def __init__(self, what: str, *, where: str = "", hint: str = "", kind: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.where = where
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # a line of its own in a traceback and a notebook

    def __str__(self) -> str:
        where = self.where.replace("\n", "\\n").replace("\r", "\\r")  # a name of a file may have them
        return f"{where}: {self.what}" if where else self.what


class UsageError(QuarkError):
    """The command line is wrong: unknown scheme, output that exists, flags that exclude each other."""

    code = ExitCode.USAGE


class ConfigError(QuarkError):
    """A recipe, entry, pattern or resume fingerprint is wrong."""

    code = ExitCode.CONFIG


class ModelError(QuarkError):
    """The source model cannot be worked on: format, shape, family, foreign code."""

    code = ExitCode.MODEL


class AccessError(QuarkError):
    """The source or a data set cannot be reached: not found, forbidden, offline."""

    code = ExitCode.ACCESS


class ResourceError(QuarkError):
    """Too little disk or memory, or no such device."""

    code = ExitCode.RESOURCES


class HubError(AccessError):
    """The hub refused something, or did not answer."""


class DataError(QuarkError):
    """Calibration data or numerics: too few rows, no text, NaN or inf."""

    code = ExitCode.DATA


class CheckError(QuarkError):
    """A check of a written checkpoint said no."""

    code = ExitCode.CHECK


def all_of(problems: Sequence[QuarkError]) -> QuarkError:
    """Returns one error that says all of them: the first as it is, the others on lines of their own."""
    first, *others = problems
    if not others:
        return first
    what = "\n".join((first.what, *(f"also: {problem}" for problem in others)))
    hint = next((problem.hint for problem in problems if problem.hint), "")
    return CheckError(what, where=first.where, hint=hint, kind="E-CHECK-SEVERAL")


class Stopped(QuarkError):
    """The run stopped on purpose (time budget); the same command continues it."""

    code = ExitCode.STOPPED


def near_misses(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Returns the names in `known` closest to `word`, best first; `_` and `-` are the same."""
    names = {name.replace("_", "-").lower(): name for name in known}
    found = difflib.get_close_matches(word.replace("_", "-").lower(), list(names), n=limit, cutoff=0.5)
    return [names[name] for name in found]


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns the hint for an unknown word: the nearest name in `known`, or `otherwise` where none is near."""
    close = near_misses(word, known, 1)
    return f"did you mean '{close[0]}'?" if close else otherwise


def in_brackets(hint: str) -> str:
    """Returns a hint as the end of a sentence; nothing where there is none."""
    return f" ({hint})" if hint else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of what another package says; its kind of error where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def some(names: Iterable[object], limit: int = 5) -> str:
    """Returns the first of many names with commas between, and dots if there are more."""
    shown = list(islice(names, limit + 1))
    return ", ".join(map(str, shown[:limit])) + (" ..." if len(shown) > limit else "")


def none_of(names: Collection[object], what: str) -> None:
    """Raises CheckError for names that there should not be: how many, `what`, and the first of them."""
    if names:
        raise CheckError(f"{len(names)} {what}: {some(names)}", kind="E-CHECK-TENSORS")
