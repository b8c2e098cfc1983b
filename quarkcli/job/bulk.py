"""Says what of a plan's output is large because it is kept, and what to type to make it smaller.

A small model whose embedding is most of its bytes hardly shrinks in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quarkcli import servers
from quarkcli.errors import QuarkError
from quarkcli.forward.defaults import BUILTIN
from quarkcli.job.groups import PlanRow, groups
from quarkcli.job.options import Options, Prepared
from quarkcli.job.run import prepare

MOST, SOME = 0.5, 0.1  # share of the output: of all that is kept, and of a part that is named
_LIGHT = "ptpc_fp8"  # loses next to nothing, and needs no data


def remarks(prepared: Prepared, found: Sequence[PlanRow] | None = None) -> list[str]:
    """Returns sentences; none where what is quantized is most of the output, or nothing is quantized."""
    found = groups(prepared) if found is None else found
    total = sum(group.after for group in found)
    kept = [group for group in found if not group.quantized]
    if not any(group.quantized for group in found) or sum(group.after for group in kept) <= MOST * total:
        return []
    parameters = sum(group.parameters for group in found)
    large = [group for group in kept if group.after >= SOME * total]
    shares = ", ".join(
        f"{group.name} {group.after / total:.0%} ({group.parameters / max(1, parameters):.0%} of the parameters)"
        for group in large
    )
    whole = sum(group.after for group in kept) / total
    head = f"{whole:.0%} of the output is not quantized" + (f": {shares}" if shares else "")
    return [head, *(line for group in large if group.is_protected for line in _ways(prepared, group))]


def _ways(prepared: Prepared, group: PlanRow) -> Iterator[str]:
    """Yields what quantizes a protected part as well, what that makes of it, and who loads it."""
    role, options = group.role, prepared.options
    typed = f"--unprotect {role}"
    overrides = replace(options.overrides, unprotect=[*options.overrides.unprotect, role])
    loaded = _loaders(prepared)
    line, kept = _tried(typed, replace(options, overrides=overrides), prepared, loaded)
    if line:
        yield line
    if kept or not line:
        return
    names = [target.name for target in prepared.plan.targets.values() if target.role == role]
    layers = [*options.overrides.layers, *(f"{name}={_LIGHT}" for name in names[:1])]
    typed += "".join(f" --layer {layer}" for layer in layers[-1:])
    line, kept = _tried(typed, replace(options, overrides=replace(overrides, layers=layers)), prepared, loaded)
    if kept:
        yield line


def _tried(typed: str, options: Options, before: Prepared, loaded: set[str]) -> tuple[str, bool]:
    """Returns what flags make of the output, empty where it is no smaller; and whether a server loads both."""
    data = before.calibration.source if before.calibration is not None else BUILTIN
    try:
        prepared = prepare(replace(options, calib_data=data))
    except QuarkError:
        return "", False
    size, other = before.forecast, prepared.forecast
    if other.output_bytes >= size.output_bytes:  # the recipe has nothing for these weights
        return "", False
    titles = _loaders(prepared)
    who = f"loaded by {', '.join(sorted(titles))}" if titles else "no known server loads that"
    was, now = (round(100 * one.output_bytes / max(1, one.source_bytes)) for one in (size, other))
    return f"{typed}: {now}% of the original size instead of {was}%; {who}", bool(titles & loaded)


def _loaders(prepared: Prepared) -> set[str]:
    written = servers.planned(prepared.plan, prepared.dialect)
    return {member.title for member in servers.servers() if not member.refusals(written)}
