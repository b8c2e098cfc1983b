"""Plans and runs from Python. The functions do what the commands do, and print nothing.

    import quarkcli
    report = quarkcli.quantize("demo", "mxfp4", output="out")

    plan = quarkcli.make_plan("demo", "nvfp4")
    quarkcli.disable_quantizer(plan, "*down_proj*")
    report = quarkcli.quantize(plan, output="out")

Errors are `quarkcli.errors.QuarkError` and its subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Unpack

from quarkcli.api.apart import apart
from quarkcli.api.checked import checked
from quarkcli.api.options import RunOptions, with_options
from quarkcli.api.results import Report
from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.evaluation import judge
from quarkcli.events import Listener, Phase, silent
from quarkcli.job import run as job
from quarkcli.job.options import Options
from quarkcli.plan.compose import Basis, Overrides
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog, load
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.recipe import Recipe

Config = Mapping[str, Any] | Sequence[Any]

_OVERRIDES = frozenset(field.name for field in fields(Overrides))
_SAID_BY_PLAN = _OVERRIDES | {"overrides", "algorithm", "settings"}


@with_options
@checked
def quantize(
    model: str | PathLike[str] | Plan,
    scheme: str | None = None,
    *,
    recipe: str | PathLike[str] | Recipe | None = None,
    config: Config | None = None,
    output: str | PathLike[str] | None = None,
    listener: Listener = silent,
    **options: Unpack[RunOptions],
) -> Report:
    """Quantizes a model and returns the report (`quark/report/2`). Under torchrun only the first rank returns it.

    model     directory, hub id, or "demo" for the embedded model; or a plan of `make_plan`, which keeps its options;
              `options` given here win
    scheme    name of a scheme
    recipe    name or file of a recipe, or the result of `load_recipe`
    config    content of a recipe file, as Python data: a native recipe, a config of NVIDIA ModelOpt or AMD Quark, a
              list of entries, or the result of `LLMTemplate.get_config`
    listener  called with each event of the run, also by the thread that writes
    options   see `RunOptions` (`exclude=["*.q_proj"]`). `dialect` may be a list (`["compressed-tensors", "quark"]`);
              `output` then has a directory for each, and `report["dialects"]` their reports by name

    Give one of scheme, recipe and config for a model, and none for a plan. Raises QuarkError for errors that a user can
    cause, TypeError for an unknown option.
    """
    if isinstance(model, Plan):
        if scheme is not None or recipe is not None or config is not None:
            raise UsageError(
                "a plan says already what to quantize; give scheme, recipe or config only with a model",
                kind="E-PYTHON-CALL",
            )
        asked = _of_plan(model, output, dict(options))
    else:
        asked = _options(model, scheme, recipe, config, output, dict(options))
    with apart():
        report = Report(job.run(asked, listener, judge=judge))
    listener(Phase("done"))
    return report


@with_options
@checked
def make_plan(
    model: str | PathLike[str],
    scheme: str | None = None,
    *,
    recipe: str | PathLike[str] | Recipe | None = None,
    config: Config | None = None,
    output: str | PathLike[str] | None = None,
    listener: Listener = silent,
    **options: Unpack[RunOptions],
) -> Plan:
    """Returns the plan that `quantize` follows with the same arguments. It reads only config and headers.

    Functions with ModelOpt's names (`set_quantizer_by_cfg`, `disable_quantizer` ...) change the plan, and `quantize`
    takes it.
    """
    asked = _options(model, scheme, recipe, config, output, dict(options))
    prepared = job.prepare(asked, listener)
    prepared.plan.basis = Basis(prepared.recipe, asked.overrides, prepared.layout, asked)
    return prepared.plan


@checked
def load_recipe(name_or_path: str | PathLike[str]) -> Recipe:
    """Returns the recipe of a name or file. Raises ConfigError with file, line and column."""
    return recipes.from_file(catalog.find_recipe(str(name_or_path)))


def register_scheme(name: str, scheme: Mapping[str, Any]) -> None:
    """Adds a scheme under a name, until the process ends.

    name    letters, digits, `_`, `-` and `.`; `_` and `-` are the same
    scheme  content of a scheme's file: `{"weight": cfg, "input": cfg}`, also `output`, `bias`, `summary`, `hardware`,
            `aliases`

    Raises UsageError if the name exists, ConfigError if the scheme is wrong.
    """
    if not isinstance(scheme, Mapping):
        raise ConfigError(
            f"a scheme must be a mapping, not {type(scheme).__name__}",
            where=f"register_scheme({name!r})",
            hint="give {'weight': cfg, 'input': cfg}",
            kind="E-PYTHON-VALUE",
        )
    catalog.register(name, load.of_data(deepcopy(dict(scheme)), f"register_scheme('{name}')"))
    try:
        recipes.from_scheme(name)
    except QuarkError:
        catalog.unregister(name)
        raise


@checked
def unregister_scheme(name: str) -> None:
    """Removes a scheme that `register_scheme` added. Raises UsageError for any other, also a built-in one."""
    catalog.unregister(name)


def _options(
    model: str | PathLike[str],
    scheme: str | None,
    recipe: str | PathLike[str] | Recipe | None,
    config: Config | None,
    output: str | PathLike[str] | None,
    options: dict[str, Any],
) -> Options:
    if config is not None:
        if recipe is not None:
            raise UsageError("recipe and config exclude each other", kind="E-PYTHON-CALL")
        if isinstance(config, str):
            raise UsageError(
                f"config must be Python data, not the text {shortened(config)}",
                hint="give the name of a scheme as scheme, the name or file of a recipe as recipe",
                kind="E-PYTHON-CALL",
            )
        recipe = recipes.from_config(config)
    options = _plain(options)
    overrides = {name: options.pop(name) for name in list(options) if name in _OVERRIDES}
    if overrides:
        options["overrides"] = Overrides(**overrides)
    return Options(
        model=str(model),
        scheme=scheme,
        recipe=recipe if isinstance(recipe, Recipe | None) else str(recipe),
        output=Path(output) if output is not None else None,
        **options,
    )


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options as `Options` holds them: dialects in one text, data as a text, the template as a path."""
    found = dict(options)
    if isinstance(found.get("dialect"), Sequence) and not isinstance(found["dialect"], str):
        found["dialect"] = ",".join(found["dialect"])
    if found.get("calib_data") is not None:
        found["calib_data"] = str(found["calib_data"])
    if found.get("chat_template") is not None:
        found["chat_template"] = Path(found["chat_template"])
    return found


def _of_plan(plan: Plan, output: str | PathLike[str] | None, options: dict[str, Any]) -> Options:
    """Returns the options the plan was made from, with the entries that edits have added."""
    basis = plan.basis
    if basis is None or not isinstance(basis.asked, Options):
        raise UsageError(
            "this plan was not made by quarkcli.make_plan", hint="give the model instead", kind="E-PYTHON-CALL"
        )
    second = sorted(_SAID_BY_PLAN.intersection(options))
    if second:
        raise UsageError(
            f"{', '.join(second)} cannot be given together with a plan",
            hint="give it to make_plan, or edit the plan",
            kind="E-PYTHON-CALL",
        )
    if output is not None:
        options["output"] = Path(output)
    # The recipe as it was read, with its algorithms and settings; it is not looked up again.
    options = _plain(options)
    what = {"scheme": None, "recipe": basis.recipe, "settings": (), "algorithm": None, "overrides": basis.overrides}
    return replace(basis.asked, **{**what, **options})
