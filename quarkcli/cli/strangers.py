"""Says what to type for flags that people know from other tools, and for a model without its flag."""

from __future__ import annotations

from typing import Any

from quarkcli.errors import UsageError


def hint(context: Any, flag: str) -> str:
    """Returns what to type for a flag that the command of a context does not have; "" where nobody knows it.

    flag   as it was written, with its dashes
    """
    from quarkcli.recipe import catalog

    row = catalog.from_elsewhere("flags", flag.lstrip("-")) or {"type": [f"{flag} VALUE"]}
    why = f": {row['why']}" if "why" in row else ""
    flags = _flags(context.command)
    if fitting := [words for words in row["type"] if words.split()[0] in flags]:
        return f"use {' or '.join(fitting)}{why}"
    first = row["type"][0].split()[0]
    commands = getattr(context.command, "commands", {})
    if "quantize" in commands and first in _flags(commands["quantize"]):
        return f"write the command first: 'quark quantize {row['type'][0]} ...'"
    place = next((one for one in context.command.params if one.param_type_name == "argument"), None)
    if place is not None and first == "--model":
        return f"write it without a flag: '{context.command_path} {place.metavar or place.name.upper()}'"
    return ""


def refuse_bare_model(command: Any, given: dict[str, Any], rest: list[str]) -> None:
    """Raises UsageError for a model that was written without its flag."""
    if rest and "--model" in _flags(command) and given.get("model") is None:
        what = "the command takes no argument without a flag"
        raise UsageError(what, where=rest[0], hint=f"use --model {rest[0]}, if it is the model", kind="E-COMMAND-LINE")


def _flags(command: Any) -> set[str]:
    return {flag for one in command.params if one.param_type_name == "option" for flag in one.opts}
