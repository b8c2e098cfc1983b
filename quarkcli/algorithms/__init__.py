"""Algorithms: what chooses better weights, scales or codes. One member per file; the file name is the name.

A member is a module with `ALGORITHM`, a class that follows `base.Algorithm`. The job reads what it declares and never
asks for a name.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from quarkcli.algorithms.base import Algorithm
from quarkcli.errors import ConfigError, UsageError, near_misses

DEFAULT_SOLVER = "rtn"
FLAG = "--algorithm"
_NOT_MEMBERS = {"base"}


def names() -> list[str]:
    """Registered names in their dash form."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_MEMBERS)


def create(name: str, parameters: dict[str, Any], where: str = FLAG) -> Algorithm:
    """An algorithm with its parameters. UsageError for an unknown name, ConfigError for a bad parameter.

    where   the flag, or the recipe file, in which an unknown name is a ConfigError too
    """
    dashed = name.replace("_", "-")
    if dashed not in names():
        close = near_misses(dashed, names()) or names()
        error = UsageError if where == FLAG else ConfigError
        raise error(f"unknown algorithm '{name}'", where=where, hint=f"use one of: {', '.join(close)}")
    member = importlib.import_module(f"{__name__}.{dashed.replace('-', '_')}").ALGORITHM
    known = member.parameters
    for key in parameters:
        if key not in known:
            close = near_misses(key, known)
            hint = f"did you mean '{close[0]}'?" if close else f"parameters: {', '.join(known) or 'none'}"
            raise ConfigError(f"algorithm '{dashed}' has no parameter '{key}'", where=where, hint=hint)
    algorithm: Algorithm = member(**{**known, **parameters})
    return algorithm


def pipeline(steps: list[tuple[str, dict[str, Any]]], where: str = FLAG) -> list[Algorithm]:
    """The steps of a recipe in order, with the default solver when none is named. Two solvers are an error."""
    chosen = [create(name, parameters, where) for name, parameters in steps]
    solvers = [algorithm for algorithm in chosen if algorithm.kind == "solver"]
    if len(solvers) > 1:
        raise ConfigError(
            f"{' and '.join(a.name for a in solvers)} both choose the codes of the same weights",
            where=where,
            hint="keep one solver",
        )
    return chosen if solvers else [*chosen, create(DEFAULT_SOLVER, {})]
