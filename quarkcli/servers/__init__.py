"""Finds the servers, which say what they load. One member per file; the file name is the name.

A member is a module with `SERVER` (see `base`). Nobody outside asks for a name. Torch-free.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import replace

from quarkcli.dialects.base import Writer
from quarkcli.errors import CheckError, ModelError, QuarkError, UsageError, near_misses
from quarkcli.plan.model import Plan
from quarkcli.servers._kernels import MEANING, Way
from quarkcli.servers.base import Server, Written

AUTO, NONE = "auto", "none"
_NOT_MEMBERS = {"base"}

__all__ = [
    "AUTO", "MEANING", "NONE", "Server", "Way", "Written", "check_name", "check_plan", "favoured", "named", "names",
    "planned", "server", "servers", "verdicts",
]  # fmt: skip


def names() -> list[str]:
    """Returns the names of all members in their dash form."""
    found: Iterable[pkgutil.ModuleInfo] = pkgutil.iter_modules(__path__)
    members = (module.name for module in found if module.name not in _NOT_MEMBERS and not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in members)


def server(name: str) -> Server:
    """Returns the member with this name."""
    found: Server = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").SERVER
    return found


def servers() -> list[Server]:
    """Returns all members, by name."""
    return [server(name) for name in names()]


def check_name(target: str) -> None:
    """Raises UsageError for a target of which no rules are known."""
    known = [AUTO, NONE, *names()]
    if target not in known:
        hint = f"use one of: {', '.join(known)}"
        raise UsageError(
            f"quark does not know what '{target}' loads", where="--target", hint=hint, kind="E-SERVER-UNKNOWN"
        )


def named(name: str, where: str = "--server") -> Server:
    """Returns the member with a name that a user gave. Raises UsageError, with the nearest, for another."""
    if name.lower() in names():
        return server(name.lower())
    close = near_misses(name, names())
    hint = f"did you mean {' or '.join(close)}?" if close else f"use one of: {', '.join(names())}"
    raise UsageError(f"unknown server '{name}'", where=where, hint=hint, kind="E-SERVER-UNKNOWN")


def favoured(plan: Plan, target: str) -> Callable[[Writer], bool]:
    """Returns a function that is true for dialects in which the server that was named loads the plan."""
    named, known = target in names(), replace(plan, guessed=False)
    return lambda dialect: named and not server(target).refusals(planned(known, dialect))


def check_plan(plan: Plan, dialect: Writer, target: str) -> None:
    """Raises ModelError for a plan that the server which was named does not load in this dialect."""
    if target in names():
        verdicts(target, planned(plan, dialect))


def planned(plan: Plan, dialect: Writer) -> Written:
    """Returns the checkpoint that the dialect would write for a plan."""
    return Written(dialect.name, dialect.config(plan), plan)


def verdicts(target: str, written: Written, *, is_there: bool = False) -> list[str]:
    """Returns one line for each server: whether it loads the checkpoint.

    Raises ModelError, or CheckError for a checkpoint that `is_there`, when the target does not load it.

    target   `auto` asks all of them, and takes what they say
    """
    lines, loading = [], 0
    for member in [server(target)] if target != AUTO else servers():
        reasons, unknown = member.refusals(written), member.unknown(written)
        unsure = bool(unknown) and reasons == [unknown]
        if reasons and target != AUTO:
            raise _refused(member, written, reasons, unsure, is_there)
        answer = f"may load it: {unknown}" if unsure else f"does not load it: {reasons[0]}" if reasons else "loads it"
        lines.append(f"{member.title} {answer}{member.evidence}")
        loading += not reasons or (unsure and written.plan.guessed)
    if not loading:
        lines.append("no known server loads it; for measurements only")
    return lines


def _refused(member: Server, written: Written, reasons: list[str], unsure: bool, is_there: bool) -> QuarkError:
    """Returns the error for a server that was named; `unsure`: it may load the checkpoint all the same."""
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    what = f"{member.title} {'may not' if unsure else 'does not'} load it: {reasons[0]}{more}{member.evidence}"
    hint = "try another --dialect or scheme; --target auto shows which server loads it"
    if unsure and written.plan.guessed:
        hint = "use --target auto and try it, or describe the model in a family file: quark models infer MODEL"
    if is_there:
        return CheckError(what, where="--target", hint=hint, kind="E-CHECK-SERVER")
    return ModelError(what, where="--target", hint=hint, kind="E-SERVER-REFUSES")
