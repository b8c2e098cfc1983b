"""Says what is wrong with a command line: flags of other tools, arguments without a flag, values of another kind."""

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


def refuse_bare(command: Any, given: dict[str, Any], rest: list[str]) -> None:
    """Raises UsageError for a model without its flag, and for patterns of which only the first has one."""
    if not rest or "--model" not in _flags(command):
        return
    hint = "remove it, or write the flag that it belongs to"
    if given.get("model") is None:
        hint = f"use --model {rest[0]}, if it is the model"
    elif repeated := [one for one in command.params if getattr(one, "multiple", False) and given.get(one.name)]:
        flag = max(repeated[0].opts, key=len)
        hint = f"write {flag} again for each value, and quotes around patterns: {flag} '*a' {flag} '*b'"
    what = "the command takes no argument without a flag"
    raise UsageError(what, where=rest[0], hint=hint, kind="E-COMMAND-LINE")


def plainly(error: Any) -> str:
    """Returns what an error of the command line says, in our words where the library that checks values wrote it."""
    cause = error.__cause__
    if not hasattr(cause, "errors"):
        return str(error.format_message())
    first = cause.errors()[0]
    limits, value = first.get("ctx", {}), first["input"]
    said = {
        "int_parsing": f"'{value}' is not a whole number", "float_parsing": f"'{value}' is not a number",
        "greater_than_equal": f"'{value}' is less than {limits.get('ge')}",
        "less_than_equal": f"'{value}' is more than {limits.get('le')}",
    }  # fmt: skip
    error.message = said.get(first["type"], first["msg"].removeprefix("Value error, "))
    return str(error.format_message())


def _flags(command: Any) -> set[str]:
    return {flag for one in command.params if one.param_type_name == "option" for flag in one.opts}
