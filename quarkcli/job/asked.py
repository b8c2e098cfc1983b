"""Finds the algorithms that a run asks for: `--algorithm`, `--set NAME.PARAMETER=VALUE`, and what `auto` stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quarkcli import algorithms, dialects
from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.plan import advice
from quarkcli.plan.advice import Advice
from quarkcli.plan.model import Plan, Step
from quarkcli.recipe import load
from quarkcli.recipe.advice import AUTO
from quarkcli.recipe.catalog import same
from quarkcli.recipe.entries import SETTING
from quarkcli.recipe.load import Document
from quarkcli.recipe.recipe import Recipe
from quarkcli.recipe.tried import noted

Listed = list[tuple[str, dict[str, Any]]]


def of_recipe_and_steps(settings: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the values of `--set` that change the recipe's file, and those that are parameters of an algorithm."""
    known = set(map(same, algorithms.names()))
    both: tuple[list[str], list[str]] = [], []
    for text in settings:
        both[same(text.partition("=")[0].partition(".")[0]) in known].append(text)
    return both


def with_steps(recipe: Recipe, names: str | None, settings: Sequence[str]) -> Recipe:
    """Returns the recipe with the algorithms of `--algorithm`, if given, and their parameters of `--set`.

    A name keeps the parameters that the recipe has for it. Raises UsageError for a parameter without a step.
    """
    listed = [(name, dict(given)) for name, given in recipe.algorithms]
    places = list(recipe.algorithm_places or [recipe.file] * len(listed))
    if names is not None:
        listed = _named(names, listed)
        places = [algorithms.FLAG] * len(listed)
    for text in settings:
        name, key, value = _parameter(text)
        mine = [index for index, (one, _) in enumerate(listed) if same(one) in (same(name), AUTO)]
        if not mine:
            others = ", ".join(one for one, _ in listed) or "none is listed"
            what = f"'{name}' is not an algorithm of this run ({others})"
            raise UsageError(what, where=f"{SETTING}{text}", hint=f"add {algorithms.FLAG} {name}", kind="E-SET")
        for index in mine:
            one, given = listed[index]
            listed[index] = (
                one,
                ({**given, name: {**given.get(name, {}), key: value}} if one == AUTO else {**given, key: value}),
            )
            before = f"{places[index]} " if places[index].startswith(SETTING) else ""
            places[index] = f"{before}{SETTING}{text}"  # any of them may hold the value that is refused
    return replace(recipe, algorithms=listed, algorithm_places=places)


def _named(names: str, given: Listed) -> Listed:
    """Returns the steps of a comma list; a name has the steps, with their parameters, that the recipe has of it."""
    found: Listed = []
    for name in (part.strip() for part in names.split(",")):
        if not name:
            raise UsageError(
                f"'{names}' contains an empty name",
                where=algorithms.FLAG,
                hint="write --algorithm smoothquant,gptq",
                kind="E-SET",
            )
        found += [step for step in given if same(step[0]) == same(name)] or [(name, {})]
    return found


def _parameter(text: str) -> tuple[str, str, Any]:
    """Returns `gptq.damp=0.05` as its parts, the value typed as YAML."""
    left, equals, written = text.partition("=")
    name, _, key = left.partition(".")
    if not equals or not key:
        raise UsageError(
            f"'{text}' is not ALGORITHM.PARAMETER=VALUE",
            where="--set",
            hint=f"write --set {name}.damp=0.05",
            kind="E-SET",
        )
    return name, key, load.parse(written, f"--set {left}").data


def check(recipe: Recipe) -> None:
    """Raises ConfigError for algorithms and parameters that do not exist, whatever the model."""
    for name, given in recipe.algorithms:
        for one, parameters in given.items() if name == AUTO else ():
            algorithms.create(one, dict(_mapping(one, parameters, recipe.file)), recipe.file)
    named = [step for step in recipe.algorithms if step[0] != AUTO]
    algorithms.created(named, recipe.file)


def mistakes(document: Document) -> Iterator[QuarkError]:
    """Yields the mistakes in the algorithms and dialects of a native recipe file."""
    quantize, export = (document.data.get(key) for key in ("quantize", "export"))
    rows = quantize.get("algorithm") if isinstance(quantize, Mapping) else None
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        step = {"method": row} if isinstance(row, str) else row
        if isinstance(step, Mapping) and isinstance(step.get("method"), str) and step["method"] != AUTO:
            given = {key: value for key, value in step.items() if key not in ("method", "slots")}
            where = str(document.origin("quantize", "algorithm", *([index] if isinstance(rows, list) else [])))
            yield from noted(algorithms.create, step["method"], given, where)
    dialect = export.get("dialect") if isinstance(export, Mapping) else None
    names = dialect if isinstance(dialect, list) else [dialect]
    words = [name for name in names if isinstance(name, str)]
    for error in noted(dialects.asked_for, ",".join(words)) if words else ():
        where = str(document.origin("export", "dialect"))
        yield ConfigError(error.what, where=where, hint=error.hint, kind=error.kind)


# --- auto -------------------------------------------------------------------------------------------------------------


def places(recipe: Recipe, plan: Plan) -> Sequence[str]:
    """Returns the place that each step of a plan comes from, for messages."""
    listed = recipe.algorithm_places
    return listed if len(listed) == len(plan.algorithms) else [*listed[:1]] * len(plan.algorithms)


def advise(plan: Plan, places: Sequence[str] = ()) -> list[Advice]:
    """Puts the steps that `auto` stands for into the plan, and returns the reasons; nothing for other plans.

    places   of the steps that the plan has

    A step that cannot work on this plan is left out, which is a warning of the plan. Raises ConfigError for `auto`
    beside other steps, and for parameters of a step that it does not choose.
    """
    names = [step.name for step in plan.algorithms]
    if AUTO not in names:
        return []
    where = places[names.index(AUTO)] if places else AUTO
    if len(names) > 1:
        rest = ", ".join(name for name in names if name != AUTO)
        raise ConfigError(
            f"'{AUTO}' chooses all algorithms and cannot be combined with {rest}",
            where=where,
            hint="leave one of the two out",
            kind="E-ALGORITHM-COMBINE",
        )
    (step,) = plan.algorithms
    if step.weights is not None:
        raise ConfigError(
            f"'{AUTO}' works only for all weights together",
            where=where,
            hint="name the algorithms if you want to give them 'slots'",
            kind="E-ALGORITHM-COMBINE",
        )
    choices = _adjusted(advice.advise(plan), step.parameters, where)
    refused = _refused(advice.steps(choices, plan), plan, where)
    plan.warnings += [f"{AUTO} leaves out {name}: {why}" for name, why in refused.items()]
    left = [replace(one, steps=tuple(s for s in one.steps if s.name not in refused)) for one in choices]
    plan.algorithms = advice.steps(left, plan)
    return left


def _adjusted(choices: list[Advice], given: Mapping[str, Any], where: str) -> list[Advice]:
    """Returns the choices with the parameters that the user gives some of their steps: `{gptq: {damp: 0.05}}`."""
    names = {same(name): name for choice in choices for name in choice.names}
    own: dict[str, dict[str, Any]] = {}
    for name, parameters in given.items():
        if same(name) not in names:
            hint = f"name one of those that it chooses here: {', '.join(sorted(names.values())) or 'none'}"
            raise ConfigError(
                f"'{AUTO}' does not choose the algorithm '{name}' for this plan",
                where=where,
                hint=hint,
                kind="E-ALGORITHM-COMBINE",
            )
        own[same(name)] = dict(_mapping(name, parameters, where))

    def adjusted(step: Step) -> Step:
        return step._replace(parameters={**step.parameters, **own.get(same(step.name), {})})

    return [replace(choice, steps=tuple(map(adjusted, choice.steps))) for choice in choices]


def _mapping(name: str, parameters: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(parameters, Mapping):
        raise ConfigError(
            f"'{name}' must be a mapping of parameters",
            where=where,
            hint=f"write {name}: {{KEY: VALUE}}",
            kind="E-ALGORITHM-PARAMETER",
        )
    return parameters


def _refused(steps: Iterable[Step], plan: Plan, where: str) -> dict[str, str]:
    """Returns the steps that cannot work on a plan, with the reason. Raises ConfigError for a bad parameter."""
    advised, found = replace(plan, algorithms=list(steps)), {}  # some steps go by those behind them
    for step, assignment in zip(advised.algorithms, algorithms.pipeline(advised, where), strict=False):
        try:
            assignment.check(advised)
            assignment.changes(advised)
        except ConfigError as error:
            found[step.name] = error.what
    return found
