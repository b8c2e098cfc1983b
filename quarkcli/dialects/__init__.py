"""Finds the dialects, which name and describe packed tensors on disk. One member per file; the file name is the name.

A member is a module with `WRITER`, `READER`, or both (see `base`). Nobody outside asks for a name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from quarkcli.dialects.base import Reader, Writer
from quarkcli.errors import ConfigError, ModelError, UsageError, near_misses
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Plan

AUTO = "auto"
_NOT_MEMBERS = {"base"}


def names() -> list[str]:
    """Returns the names of all members in their dash form."""
    found: Iterable[pkgutil.ModuleInfo] = pkgutil.iter_modules(__path__)
    members = (module.name for module in found if module.name not in _NOT_MEMBERS and not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in members)


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{name.replace('-', '_')}") for name in names()]


def writers() -> list[Writer]:
    """Returns the dialects that can be written, by name."""
    return [module.WRITER for module in _modules() if hasattr(module, "WRITER")]


def readers() -> list[Reader]:
    """Returns the dialects that can be read, by name."""
    return [module.READER for module in _modules() if hasattr(module, "READER")]


def files_beside() -> list[str]:
    """Returns the files beside config.json that may describe a quantized checkpoint in its place."""
    return list(dict.fromkeys(file for member in readers() for file in member.beside))


def writer(name: str, flag: str = "--dialect") -> Writer:
    """Returns the dialect called `name`; `_` and `-` are the same. Raises UsageError for one that is not written."""
    known = {member.name: member for member in writers()}
    dashed = name.replace("_", "-")
    if dashed not in known:
        what = (
            f"quark can read checkpoint format '{name}' but not write it"
            if dashed in names()
            else f"unknown checkpoint format '{name}'"
        )
        close = near_misses(dashed, known) or known
        auto = f", {AUTO}" if flag == "--dialect" else ""
        raise UsageError(what, where=flag, hint=f"use one of: {', '.join(close)}{auto}", kind="E-DIALECT-UNKNOWN")
    return known[dashed]


def reader(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> Reader | None:
    """Returns the reader of a checkpoint with this `quantization_config`; None for one that is not quantized.

    Raises ModelError unless exactly one reader takes it.
    """
    found = matching(config, headers)
    if len(found) == 1:
        return found[0]
    method = config.get("quant_method")
    if found:
        both = " and ".join(member.name for member in found)
        raise ModelError(
            f"is quantized with '{method}', a name that several checkpoint formats use: {both}", kind="E-SOURCE-METHOD"
        )
    if not config:
        return None
    known = ", ".join(member.name for member in readers())
    if method is None:
        what = "its quantization_config has no quant_method, so the meaning of its scales is unknown"
        raise ModelError(what, hint=f"use one of these methods: {known}", kind="E-SOURCE-METHOD")
    raise ModelError(
        f"is quantized with '{method}', which quark cannot read",
        hint=f"use one of these methods: {known}",
        kind="E-SOURCE-METHOD",
    )


def matching(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> list[Reader]:
    """Returns the readers that take a checkpoint for theirs."""
    return [member for member in readers() if member.matches(config, headers)]


def asked_for(text: str) -> list[Writer]:
    """Returns the dialects of a comma list, or none for `auto`. Raises UsageError for a list that is wrong."""
    words = [word.strip() for word in text.split(",")]
    if words == [AUTO]:
        return []
    if AUTO in words:
        hint = f"name all of them, or give {AUTO} alone"
        raise UsageError(
            f"{AUTO} stands for one checkpoint format and cannot be part of a list",
            where="--dialect",
            hint=hint,
            kind="E-FLAG-VALUE",
        )
    found = [writer(word) for word in words]
    twice = [dialect.name for number, dialect in enumerate(found) if dialect in found[:number]]
    if twice:
        raise UsageError(
            f"checkpoint format {twice[0]} is named twice",
            where="--dialect",
            hint="name each of them once",
            kind="E-FLAG-VALUE",
        )
    return found


def choose(asked: str, plan: Plan, favoured: Callable[[Writer], bool] = lambda dialect: False) -> list[Writer]:
    """Returns the dialects for a plan: the one that `auto` takes, or those named, in the order in which it takes them.

    `auto` goes by what loads the plan: both vLLM and transformers, else vLLM, else anything; among those alike by
    preference. Raises ConfigError with every reason when none can hold it, or when one that is named cannot.

    favoured   true for dialects that `auto` takes before all others, such as those that a server named loads
    """
    named = asked_for(asked)
    if named:
        for dialect in named:
            _check(dialect, plan)
        return sorted(sorted(named, key=_name), key=lambda dialect: _rank(dialect, plan), reverse=True)
    _check_latents(plan)
    refused = {dialect: _refusals(dialect, plan) for dialect in writers()}
    able = [dialect for dialect, reasons in refused.items() if not reasons]
    if not able:
        every = "; ".join(f"{dialect.name}: {found[0]}" for dialect, found in refused.items())
        raise ConfigError(
            f"no checkpoint format can hold this plan: {every}",
            hint="change the scheme of these modules",
            kind="E-DIALECT-CANNOT",
        )
    return [max(able, key=lambda dialect: (favoured(dialect), *_rank(dialect, plan)))]


def _check_latents(plan: Plan) -> None:
    """Raises ConfigError for scales of k and v where the cache holds a latent: no dialect is right for these."""
    for module in plan.attention.values():
        if module.latent and {"k", "v"} & set(module.specs):
            able = [f"--dialect {dialect.name}" for dialect in writers() if not _refusals(dialect, plan)]
            named = f"; {' or '.join(able)} names a scale all the same" if able else ""
            raise ConfigError(
                "its KV cache holds a compressed latent vector, not k and v, and no server reads scales for it",
                where=f"{module.name}.k_bmm_quantizer",
                hint=f"use --kv-cache none; servers take a scale of 1 if they are told to use an fp8 cache{named}",
                kind="E-DIALECT-CANNOT",
            )


def _name(dialect: Writer) -> str:
    return dialect.name


def _rank(dialect: Writer, plan: Plan) -> tuple[bool, int, int]:
    """Returns what `auto` goes by, the highest first."""
    preference = dialect.preference(plan)
    return preference > 0, _reach(dialect.loaders(plan)), preference


def _check(dialect: Writer, plan: Plan) -> None:
    """Raises ConfigError for a dialect that cannot hold a plan."""
    refusals = _refusals(dialect, plan)
    if refusals:
        _check_latents(plan)
        raise ConfigError(
            f"checkpoint format {dialect.name} cannot hold this plan: {refusals[0]}"
            + (f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""),
            where="--dialect",
            hint=_able(plan),
            kind="E-DIALECT-CANNOT",
        )


def reason(dialect: Writer, plan: Plan, *, auto: bool) -> str:
    """Returns why a dialect was taken, and what loads the plan in it, in words."""
    only = " only" if auto and _reach(dialect.loaders(plan)) == 1 else ""
    return f"{AUTO if auto else 'asked for'}{':' if auto else ';'} {_loads(dialect, plan, only)}"


def _able(plan: Plan) -> str:
    """Returns which dialects can hold a plan, in words."""
    able = [dialect.name for dialect in writers() if not _refusals(dialect, plan)]
    return (
        f"use --dialect auto, which picks one that can ({' or '.join(able)})"
        if able
        else "change the scheme: no checkpoint format can hold it"
    )


def _refusals(dialect: Writer, plan: Plan) -> list[str]:
    return [*dialect.refusals(plan), *dialect.online_refusals(plan)]


def is_served(dialect: Writer, plan: Plan) -> bool:
    """True when vLLM loads what the dialect would write for the plan."""
    return _reach(dialect.loaders(plan)) > 0


def _reach(loaders: set[str]) -> int:
    """Returns 2 when both vLLM and transformers load it, 1 when vLLM does, else 0."""
    if "vllm" not in loaders:
        return 0
    return 2 if "transformers" in loaders else 1


def warnings(dialect: Writer, plan: Plan) -> list[str]:
    """Returns warnings to give before the plan is written in `dialect`, such as that no server loads it."""
    loaders = dialect.loaders(plan)
    if "vllm" in loaders:
        return []
    what = f"no server loads this plan in checkpoint format {dialect.name}"
    if loaders:
        return [f"{what}, only {' and '.join(sorted(loaders))} can"]
    reads = "only quark reads them back" if dialect.reader is not None else "nothing reads them back"
    return [f"{what}; the weights are packed, but {reads} (for measurements only)"]


def _loads(dialect: Writer, plan: Plan, only: str = "") -> str:
    names = [{"vllm": "vLLM"}.get(name, name) for name in sorted(dialect.loaders(plan), reverse=True)]
    if not names:
        return "no server loads it; for measurements only"
    caveat = dialect.caveat(plan)
    known = " if they know the model" if plan.guessed else ""
    return f"loads in {' and '.join(names)}{only}{known}" + (f"; {caveat}" if caveat else "")
