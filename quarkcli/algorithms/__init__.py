"""Finds the algorithms, which choose better weights, scales or codes. One member per file; the file name is the name.

A member is a module with `ALGORITHM`, a class that follows `base.Algorithm`. The job reads what it declares and never
asks for a name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

from quarkcli.algorithms.base import Algorithm, Assignment, Refiner, Solver, Transform, Tuner
from quarkcli.errors import ConfigError, UsageError, did_you_mean, near_misses
from quarkcli.plan.model import Plan
from quarkcli.recipe.entries import SLOTS

DEFAULT_SOLVER = "rtn"
FLAG = "--algorithm"
_NOT_MEMBERS = {"base", "tensors"}


def names() -> list[str]:
    """Returns the registered names in their dash form."""
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in modules if name not in _NOT_MEMBERS)


def create(name: str, parameters: dict[str, Any], where: str = FLAG) -> Algorithm:
    """Returns an algorithm with its parameters.

    where   the flag, or the recipe file, in which an unknown name is a ConfigError too

    Raises UsageError for an unknown name, ConfigError for a bad parameter.
    """
    dashed = name.replace("_", "-").lower()
    if dashed not in names():
        close = near_misses(dashed, names()) or names()
        what, hint = f"unknown algorithm '{name}'", f"use one of: {', '.join(close)}"
        if where == FLAG:
            raise UsageError(what, where=where, hint=hint, kind="E-ALGORITHM-UNKNOWN")
        raise ConfigError(what, where=where, hint=hint, kind="E-ALGORITHM-UNKNOWN")
    member = importlib.import_module(f"{__name__}.{dashed.replace('-', '_')}").ALGORITHM
    assert issubclass(member, (Solver, Refiner, Transform, Tuner)), (
        f"{member.__module__}: a kind of algorithm is its base class"
    )
    known = member.parameters
    for key in parameters:
        if key not in known:
            otherwise = f"use one of the parameters: {', '.join(known) or 'it has none'}"
            hint = did_you_mean(key, known, otherwise)
            raise ConfigError(
                f"algorithm '{dashed}' has no parameter '{key}'", where=where, hint=hint, kind="E-ALGORITHM-PARAMETER"
            )
    try:
        algorithm: Algorithm = member(**{**known, **parameters})
    except ConfigError as error:
        raise ConfigError(error.what, where=where, hint=error.hint, kind="E-ALGORITHM-PARAMETER") from error
    return algorithm


def created(steps: Sequence[tuple[str, dict[str, Any]]], where: str = FLAG) -> list[Algorithm]:
    """Returns the steps of a recipe in order, whatever the model: `slots` are left aside.

    The default solver comes last when none is named for all weights. Raises as `create`, and ConfigError for two
    solvers that both take all weights.
    """
    made: list[Algorithm] = []
    everywhere: list[Algorithm] = []
    for name, given in steps:
        made.append(create(name, {key: value for key, value in given.items() if key != SLOTS}, where))
        if made[-1].kind == "solver" and SLOTS not in given:
            everywhere.append(made[-1])
    if len(everywhere) > 1:
        raise _two_solvers(everywhere, "the same weights", where)
    return made if everywhere else [*made, create(DEFAULT_SOLVER, {})]


def pipeline(plan: Plan, where: str | Sequence[str] = FLAG) -> list[Assignment]:
    """Returns the algorithms of a plan in order, each with its weights; the default solver takes those that are left.

    where   as in `create`, one for all or one for each
    Raises as `create`, and ConfigError for a weight with two solvers.
    """
    places = [where] * len(plan.algorithms) if isinstance(where, str) else where
    made = [(create(s.name, s.parameters, place), s.weights) for s, place in zip(plan.algorithms, places, strict=True)]
    solver_of: dict[str, Algorithm] = {}
    for algorithm, weights in made:
        for target in plan.quantized() if algorithm.kind == "solver" else ():
            if weights is None or target.name in weights:
                if target.name in solver_of:
                    raise _two_solvers([solver_of[target.name], algorithm], target.name, places[0])
                solver_of[target.name] = algorithm
    left = frozenset(target.name for target in plan.quantized()) - solver_of.keys()
    if left or not solver_of:
        made.append((create(DEFAULT_SOLVER, {}), left if solver_of else None))
    count: Counter[str] = Counter()
    steps = []
    for algorithm, weights in made:
        count[algorithm.name] += 1
        number = count[algorithm.name]
        steps.append(Assignment(algorithm, weights, algorithm.name if number == 1 else f"{algorithm.name} {number}"))
    return steps


def _two_solvers(solvers: Sequence[Algorithm], what: str, where: str) -> ConfigError:
    return ConfigError(
        f"{' and '.join(solver.name for solver in solvers)} both choose the codes of {what}",
        where=where,
        hint="keep one solver, or give each 'slots' of its own",
        kind="E-ALGORITHM-COMBINE",
    )
