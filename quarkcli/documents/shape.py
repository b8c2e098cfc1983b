"""Checks the kinds of the values that are read from a document (pydantic v2). Other keys are not checked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quarkcli.errors import ModelError

# What pydantic calls a value of the wrong kind -> the kind that was expected.
KINDS = {
    "string_type": "a text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
}


class Shape(BaseModel):
    """One object of a document. Nothing is converted, and nothing is taken from here: it only checks."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, defer_build=True)


def check(model: type[Shape], data: Any, where: str) -> None:
    """Raises ModelError with the path of the first value of `data` that does not fit, and how many there are."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    else:
        return
    at: dict[tuple[int | str, ...], list[Any]] = {}
    for detail in details:
        path = detail["loc"] if detail["type"] == "missing" else written(data, detail["loc"])
        at.setdefault(path, []).append(detail)
    path, alike = next(iter(at.items()))
    more = f" (and {len(at) - 1} more)" if len(at) > 1 else ""
    raise ModelError(_sentence(".".join(map(str, path)) or "it", alike) + more, where=where, kind="E-JSON-SHAPE")


def _sentence(name: str, details: list[Any]) -> str:
    """Returns the problem with one value. A value that has none of several allowed kinds is one problem."""
    if details[0]["type"] == "missing":
        return f"'{name}' is missing"
    kinds = list(dict.fromkeys(KINDS[detail["type"]] for detail in details if detail["type"] in KINDS))
    if kinds:
        return f"{name} must be {' or '.join(kinds)}, not {details[0]['input']!r:.60}"
    return f"{name}: {details[0]['msg']}"


def written(data: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Returns the steps of `loc` that lead to something in the data; the others name one of several kinds of value."""
    path: list[int | str] = []
    for step in loc:
        try:
            data = data[step]
        except (KeyError, TypeError, IndexError):
            continue
        path.append(step)
    return tuple(path)
