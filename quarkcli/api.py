"""The Python API: what the command line does, without a screen.

    import quarkcli
    report = quarkcli.quantize("demo", "mxfp4", output="out")

Errors are `quarkcli.errors.QuarkError` and its subclasses; nothing is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from quarkcli import job
from quarkcli.errors import QuarkError
from quarkcli.events import Listener, silent
from quarkcli.options import Options
from quarkcli.plan.compose import Overrides
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog, load
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.recipe import Recipe

__all__ = ["Options", "load_recipe", "make_plan", "quantize", "register_scheme", "unregister_scheme"]


def quantize(
    model: str | PathLike[str],
    scheme: str | None = None,
    *,
    recipe: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    listener: Listener = silent,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a model and return the report (`quark/report/1`).

    model     directory, hub id, or "demo" for the embedded model
    scheme    a scheme's name, or None when `recipe` is given
    listener  called with every event of the run
    options   fields of `Options` and of `plan.compose.Overrides` (`exclude=["*.q_proj"]`)

    Raises QuarkError for everything a user can cause, TypeError for an unknown option.
    """
    return job.run(_options(model, scheme, recipe, output, options), listener)


def make_plan(
    model: str | PathLike[str],
    scheme: str | None = None,
    *,
    recipe: str | PathLike[str] | None = None,
    **options: Any,
) -> Plan:
    """What `quantize` would do with the same arguments; reads config and headers only."""
    return job.prepare(_options(model, scheme, recipe, None, options)).plan


def load_recipe(name_or_path: str | PathLike[str]) -> Recipe:
    """A recipe by registered name or file. Raises ConfigError with file, line and column."""
    return recipes.from_file(catalog.find_recipe(str(name_or_path)))


def register_scheme(name: str, scheme: Mapping[str, Any]) -> None:
    """Make a scheme known to everything that takes a scheme's name, until the process ends.

    name    letters, digits, `_`, `-` and `.`; `_` and `-` are the same
    scheme  what a scheme's file says: `{"weight": cfg, "input": cfg}`, and if you like `output`, `bias`, `summary`,
            `hardware`, `aliases`

    Raises UsageError for a name that exists, ConfigError for a scheme that is wrong.
    """
    catalog.register(name, load.Document(deepcopy(dict(scheme)), f"register_scheme('{name}')", {}))
    try:
        recipes.from_scheme(name)
    except QuarkError:
        catalog.unregister(name)
        raise


def unregister_scheme(name: str) -> None:
    """Forget a scheme that `register_scheme` made known. Raises UsageError for any other; built-in ones stay."""
    catalog.unregister(name)


def _options(
    model: str | PathLike[str],
    scheme: str | None,
    recipe: str | PathLike[str] | None,
    output: str | PathLike[str] | None,
    options: dict[str, Any],
) -> Options:
    known = {field.name for field in fields(Overrides)}
    overrides = {name: options.pop(name) for name in list(options) if name in known}
    if overrides:
        options["overrides"] = Overrides(**overrides)
    return Options(
        model=str(model),
        scheme=scheme,
        recipe=str(recipe) if recipe is not None else None,
        output=Path(output) if output is not None else None,
        **options,
    )
