"""Makes every Typer app of ours: plain text, no boxes, no pretty tracebacks, help when nothing is asked."""

from __future__ import annotations

import typer

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def new(text: str, epilog: str, *, completion: bool = False) -> typer.Typer:
    """Returns a group of commands."""
    return typer.Typer(
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
