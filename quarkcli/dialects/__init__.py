"""Dialects: how packed tensors are named and described on disk. One member per file; the file name is the name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from quarkcli.dialects.base import Dialect
from quarkcli.errors import ConfigError, UsageError, near_misses
from quarkcli.plan.model import Plan

_NOT_MEMBERS = {"base"}


def names() -> list[str]:
    """Registered dialect names in their dash form."""
    found: Iterable[pkgutil.ModuleInfo] = pkgutil.iter_modules(__path__)
    members = (module.name for module in found if module.name not in _NOT_MEMBERS and not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in members)


def get(name: str) -> Dialect:
    """The dialect called `name`; `_` and `-` are the same. Raises UsageError for an unknown one."""
    dashed = name.replace("_", "-")
    if dashed not in names():
        close = near_misses(dashed, names()) or names()
        raise UsageError(f"unknown dialect '{name}'", where="--dialect", hint=f"use one of: {', '.join(close)}, auto")
    module = importlib.import_module(f"{__name__}.{dashed.replace('-', '_')}")
    dialect: Dialect = module.DIALECT
    return dialect


def members() -> list[Dialect]:
    return [get(name) for name in names()]


def choose(asked: str, plan: Plan) -> tuple[Dialect, str]:
    """The dialect for a plan, and why in words.

    `auto` takes the first that both vLLM and transformers load for this plan, else one that vLLM loads, else any
    that can hold it. Raises ConfigError with every reason when none can, or when the one asked for cannot.
    """
    if asked != "auto":
        dialect = get(asked)
        refusals = dialect.refusals(plan)
        if refusals:
            raise ConfigError(
                f"dialect {dialect.name} cannot hold this plan: {refusals[0]}"
                + (f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""),
                where="--dialect",
                hint="--dialect auto picks one that can",
            )
        return dialect, f"asked for; {_loads(dialect, plan)}"
    refused = {dialect.name: dialect.refusals(plan) for dialect in members()}
    able = [dialect for dialect in members() if not refused[dialect.name]]
    if not able:
        reasons = "; ".join(f"{name}: {found[0]}" for name, found in refused.items())
        raise ConfigError(f"no dialect can hold this plan: {reasons}", hint="change the scheme of the modules named")
    loaders = [(dialect, dialect.loaders(plan)) for dialect in able]
    for wanted in ({"vllm", "transformers"}, {"vllm"}, set[str]()):
        for dialect, found in loaders:
            if wanted <= found:
                only = " only" if wanted == {"vllm"} else ""
                return dialect, f"auto: {_loads(dialect, plan, only)}"
    raise AssertionError("the empty set is part of every set")


def warnings(dialect: Dialect, plan: Plan) -> list[str]:
    """What a user should know before the plan is written in `dialect`: that no server loads it, if so."""
    loaders = dialect.loaders(plan)
    if "vllm" in loaders:
        return []
    what = f"no server loads this plan in dialect {dialect.name}"
    if loaders:
        return [f"{what}, only {' and '.join(sorted(loaders))} does"]
    return [f"{what}; the weights are written packed, but only quark reads them back (simulation only)"]


def _loads(dialect: Dialect, plan: Plan, only: str = "") -> str:
    names = [{"vllm": "vLLM"}.get(name, name) for name in sorted(dialect.loaders(plan), reverse=True)]
    if not names:
        return "no server loads it; simulation only"
    caveat = dialect.caveat(plan)
    return f"loads in {' and '.join(names)}{only}" + (f"; {caveat}" if caveat else "")
