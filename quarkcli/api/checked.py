"""Refuses arguments of another type than the signature of a Python function says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from inspect import signature
from reprlib import repr as shortened
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

from quarkcli.errors import UsageError

Given = ParamSpec("Given")
Made = TypeVar("Made")


def checked(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Makes a function raise UsageError for an argument whose type is another than its annotation.

    Without it, a list in the place of a name fails somewhere inside, with a message about our code.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        given = signature(function, follow_wrapped=False).bind(*args, **kwargs).arguments
        for name, value in {**given, **given.pop("options", {})}.items():
            kind, fits = _types(function).get(name, ("", None))
            if fits is not None and not fits(value):
                raise UsageError(f"{name} must be {kind}, not {shortened(value)}", kind="E-PYTHON-CALL")
        return function(*args, **kwargs)

    return call


@cache
def _types(function: Callable[..., Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Returns the annotation of each argument as text, and what says whether a value fits it."""
    from pydantic import InstanceOf

    from quarkcli.job import options
    from quarkcli.plan.fused import Servers
    from quarkcli.plan.model import Plan
    from quarkcli.recipe.entries import Entry
    from quarkcli.recipe.recipe import Recipe

    # Of our own classes only the class is checked, not what is in them.
    names: dict[str, Any] = {one.__name__: InstanceOf[one] for one in (Plan, Recipe, Entry)}  # type: ignore[misc, valid-type]
    names |= {"Servers": Servers, "Offload": options.Offload, "OnNonfinite": options.OnNonfinite}
    found: dict[str, tuple[str, Callable[[Any], bool]]] = {}
    all_of = partial(get_type_hints, localns=names, include_extras=True)
    for name, hint in all_of(function).items():
        if name == "return":
            continue
        held = get_args(hint)[0] if name == "options" else None  # Unpack[RunOptions]
        hints = all_of(held) if held else {name: hint}
        found |= {key: (_text(held or function, key), _test(one)) for key, one in hints.items()}
    return found


def _text(holder: Any, name: str) -> str:
    kind = holder.__annotations__[name]
    return str(getattr(kind, "__forward_arg__", kind))


def _test(hint: Any) -> Callable[[Any], bool]:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))

    def fits(value: Any) -> bool:
        try:
            adapter.validate_python(value)
        except ValidationError:
            return False
        return True

    return fits
