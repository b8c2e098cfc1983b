"""Writes the flags that the command after this one needs, so that the line under `next` does what it says."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarkcli.job.options import Options

# How a model is opened, and what a run accepts: neither a recipe nor a checkpoint says it.
CODE_AND_PICKLES = ("trust_remote_code", "allow_pickle")
OPENED = ("revision", *CODE_AND_PICKLES)
UNSAID_BY_RECIPES = (
    *OPENED, "target", "tp", "on_indivisible", "chat_template", "allow_short", "strict", "on_nonfinite",
)  # fmt: skip


def flags(options: Options, names: Collection[str]) -> str:
    """Returns those of the flags with these names that were given, each behind a space."""
    plain = type(options)(options.model)
    given = {**vars(options.overrides), **vars(options)}
    usual = {**vars(plain.overrides), **vars(plain)}
    return "".join(_flag(name, given[name]) for name in names if given[name] != usual[name])


def _flag(name: str, value: object) -> str:
    from quarkcli.job.idle import flag

    return f" {flag(name)}" if value is True else f" {flag(name)} {shlex.quote(str(value))}"
