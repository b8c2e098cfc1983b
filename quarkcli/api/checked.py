"""Refuses arguments of another type than the signature of a Python function says, and numbers out of range."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial, wraps
from inspect import signature
from math import isfinite
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar, get_args, get_type_hints

from quarkcli.documents.native import native
from quarkcli.errors import UsageError, did_you_mean

Given = ParamSpec("Given")
Made = TypeVar("Made")
# The smallest and the largest number that an argument takes, as the flag of its name does.
LEAST = {
    "calib_samples": 1, "calib_seqlen": 2, "calib_batch": 1, "min_expert_tokens": 1, "threads": 1, "tp": 1,
    "window": 2, "tokens": 2, "max_kl": 0, "max_ppl_increase": 0, "time_budget": 0, "max_cpu_mem": 1, "max_gpu_mem": 1,
    "seed": 0,
}  # fmt: skip
MOST = {"seed": 2**63 - 1}
# What to give in the place of a value of another type.
_MODEL = "give a directory, a hub id or 'demo'; a model in memory must be saved first, with save_pretrained"
_HINTS = {
    "model": _MODEL, "baseline": _MODEL, "source": _MODEL, "a": _MODEL, "b": _MODEL,
    "directory": "give the directory of a checkpoint",
    "algorithm": "give one text, with commas between several: 'awq,gptq'",
    "calib_data": "give a name, or a file with rows: .jsonl, .parquet or .txt",
    "plan": "give what quarkcli.make_plan returns", "device": "give 'auto', 'cpu' or 'cuda'",
    "kv_cache": "give the name of a format, such as 'fp8'",
}  # fmt: skip
_DATA = {"scheme": "add it with register_scheme, or give a whole recipe as config", "recipe": "give it as config"}


def checked(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Makes a function raise UsageError for an argument whose type is another than its annotation, or out of range.

    Without it, a list in the place of a name fails somewhere inside, with a message about our code.
    """

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        try:
            bound = signature(function, follow_wrapped=False).bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own words say how many it takes
        known = _types(function)
        options = bound.arguments.get("options", {})
        if unknown := options.keys() - known.keys():
            _refuse_name(function.__name__, min(unknown), known)
        for held in (bound.arguments, options):
            for name in held.keys() & known.keys():
                held[name] = native(held[name], 1)
                kind, fits = known[name]
                if not fits(held[name]):
                    _refuse_value(name, kind, held[name])
                _check_range(name, held[name])
                held[name] = _at_home(held[name]) if "PathLike" in kind else held[name]
        return function(*bound.args, **bound.kwargs)

    return call


def _at_home(value: Any) -> Any:
    """Returns a path with the home directory in the place of `~`, and any other value as it is."""
    if not isinstance(value, str | os.PathLike) or not str(value).startswith("~"):
        return value
    found = os.path.expanduser(value)  # noqa: PTH111 - never raises
    return found if isinstance(value, str) else Path(found)


def _refuse_value(name: str, kind: str, value: Any) -> NoReturn:
    hint = _HINTS.get(name, "")
    if name in _DATA and isinstance(value, Mapping | list):
        hint = _DATA[name]
    if isinstance(value, str) and kind.startswith("Sequence[str]"):
        hint = f"give a list: [{value!r}]"
    raise UsageError(f"{name} must be {kind}, not {shortened(value)}", hint=hint, kind="E-PYTHON-CALL")


def _refuse_name(function: str, name: str, known: Collection[str]) -> NoReturn:
    """Raises TypeError for an option that a function does not have, as Python does for any other function."""
    near = did_you_mean(name, known)
    what = f"{function}() got an unexpected keyword argument '{name}'"
    raise TypeError(f"{what}; {near}" if near else what)


def _check_range(name: str, value: Any) -> None:
    """Raises UsageError for a number, or one of several, that no flag of the name would take."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if number > MOST.get(name, number):
            raise UsageError(f"{name} must be at most {MOST[name]}, not {number}", kind="E-PYTHON-CALL")
        if not isfinite(number):
            raise UsageError(f"{name} must be a finite number, not {number}", kind="E-PYTHON-CALL")
        if number < LEAST.get(name, number):
            raise UsageError(f"{name} must be at least {LEAST[name]}, not {number}", kind="E-PYTHON-CALL")


@cache
def _types(function: Callable[..., Any]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """Returns the annotation of each argument as text, and what says whether a value fits it."""
    from quarkcli.job import options
    from quarkcli.plan.fused import Servers
    from quarkcli.plan.model import Plan
    from quarkcli.recipe.entries import Entry
    from quarkcli.recipe.recipe import Recipe

    names: dict[str, Any] = {one.__name__: _instance(one) for one in (Plan, Recipe, Entry)}
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


def _instance(kind: type) -> Any:
    """Returns a type of which only the class is checked.

    `pydantic.InstanceOf` looks inside as well, and pydantic 2.11 stops at names that only a type checker imports.
    """
    from pydantic import AfterValidator

    def same(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(kind.__name__)
        return value

    return Annotated[Any, AfterValidator(same)]


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
