"""Makes every Typer app of ours: plain text, no boxes, no pretty tracebacks, help when nothing is asked.

Typer hands each flag that is None to pydantic, which takes as long to import as all the rest of a short command; one
that is False it leaves alone. So flags that Typer itself adds are False here when they are not given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
import typer.core

from quarkcli.cli import panels, strangers, variables
from quarkcli.errors import UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def lighten(flag: Any) -> Any:
    """Makes a flag that is not given False instead of None. Returns it."""
    if flag is not None and flag.default is None and flag.type_descriptor.annotation is bool:
        flag.default = False
    return flag


class _Group(typer.core.TyperGroup):
    context_class = panels.Context

    def get_help(self, ctx: Any) -> str:
        return panels.fitted(super().get_help(ctx))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels.write_commands(self, ctx, formatter)

    def get_help_option(self, ctx: Any) -> Any:
        return lighten(super().get_help_option(ctx))


class _Plain:
    """Stands for the conversion of a value that is text already: Typer's own imports pydantic."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


class _Command(typer.core.TyperCommand):
    context_class = panels.Context

    def get_help(self, ctx: Any) -> str:
        return panels.fitted(super().get_help(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels.write_options(self, ctx, formatter)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for flag in self.params:
            if isinstance(flag, typer.core.TyperOption) and flag.default == "" and not flag.multiple:
                flag._runtime_param = _Plain()  # type: ignore[assignment]

    def get_help_option(self, ctx: Any) -> Any:
        return lighten(super().get_help_option(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Refuses an empty value, as a variable of a shell may be: it would count as no value, or as a directory."""
        try:
            given, left, _ = self.make_parser(ctx).parse_args(args=list(args))
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                vars(error)["ctx"] = ctx  # a flag without its value does not know its command
            raise
        if not ctx.resilient_parsing and not given.get("help"):
            variables.check(ctx.command_path.split())
            strangers.refuse_bare(self, given, left)
        rest = super().parse_args(ctx, args)
        for flag in self.params:
            value = given.get(flag.name)
            if value == "" or (isinstance(value, list) and "" in value):
                where = max(flag.opts, key=len) if flag.param_type_name == "option" else flag.metavar or flag.name
                hint = "write a value, or remove it"
                raise UsageError("its value is empty", where=where, hint=hint, kind="E-FLAG-VALUE")
        return rest


class _App(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        return super().command(name, cls=_Command, **settings)


def new(text: str, epilog: str, *, completion: bool = False) -> typer.Typer:
    """Returns a group of commands."""
    return _App(
        cls=_Group,
        help=text,
        epilog=epilog,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=completion,
        context_settings=CONTEXT,
    )


def examples(*lines: str) -> str:
    """Returns the end of a command's help. The first line keeps the rest from being wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
