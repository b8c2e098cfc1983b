"""Turns the flags of `quantize` and `plan` into `options.Options` and `Overrides`; field names are theirs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from quarkcli.cli import output
from quarkcli.cli.flags_run import RunFlags

if TYPE_CHECKING:
    from quarkcli.job.options import Options


@dataclass
class JobFlags(RunFlags):
    """One field per flag; None and empty mean not given."""

    def options(self) -> Options:
        """Returns the options of the job."""
        from quarkcli.job.options import Options
        from quarkcli.plan.compose import Overrides

        return Options(
            **self._of(Options),
            overrides=Overrides(**self._of(Overrides)),
            command=("quark", *output.session.arguments),
        )

    def start(self) -> None:
        """Sets up the screen for this command."""
        output.start(
            json=self.json, debug=self.debug, quiet=self.quiet, log_format=self.log_format, log_level=self.log_level
        )

    def idle(self, *, plan: bool) -> list[str]:
        """Returns lines for the flags about the screen that have no effect."""
        from quarkcli.job import idle

        return idle.screen(
            progress=self.progress,
            log_level=self.log_level,
            log_format=output.session.format,
            quiet=self.quiet,
            plan=plan,
        )

    def _of(self, record: type[Any]) -> dict[str, Any]:
        """Returns the given flags that are fields of `record`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {field.name: given[field.name] for field in fields(record) if field.name in given}


def takes_job_flags(
    body: Callable[..., None],
    *,
    without: Collection[str] = (),
    reworded: Mapping[str, tuple[str, str]] | None = None,
    replaced: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """Returns a Typer command with the flags of `JobFlags`, before whatever keyword parameters `body` adds.

    without    fields that the command has no flag for
    reworded   field -> words of its help that do not hold for this command, and those that do
    replaced   field -> the flag that the command has in its place
    """

    def command(**values: Any) -> None:
        own = {name: values.pop(name) for name in added}
        body(JobFlags(**values), **own)

    flags = {name: flag for name, flag in _parameters(JobFlags, skip=0).items() if name not in without}
    flags |= {name: _reworded(flags[name], *words) for name, words in (reworded or {}).items()}
    flags |= {name: flags[name].replace(annotation=flag) for name, flag in (replaced or {}).items()}
    added = _parameters(body, skip=1)
    signature = inspect.Signature([*flags.values(), *added.values()])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__doc__ = body.__doc__
    return command


def _parameters(of: Callable[..., Any], skip: int) -> Mapping[str, inspect.Parameter]:
    hints = get_type_hints(of, include_extras=True)
    found = list(inspect.signature(of).parameters.values())[skip:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {p.name: p.replace(annotation=hints[p.name], kind=keyword) for p in found}


def _reworded(flag: inspect.Parameter, words: str, own: str) -> inspect.Parameter:
    """Returns a flag with other words in its help, or in the default that is shown."""
    kind, option = get_args(flag.annotation)
    changed = copy.copy(option)
    changed.help = option.help.replace(words, own)
    if isinstance(option.show_default, str):
        changed.show_default = option.show_default.replace(words, own)
    assert vars(changed) != vars(option), words
    return flag.replace(annotation=Annotated[kind, changed])
