"""Defines the flags about messages on stderr, for each command that works for a while."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    Option(
        "--log-level",
        help="Show no message below this level. debug: also show every step and the messages of libraries.",
    ),
]
LogFormat = Annotated[
    Literal["text", "json", "github"] | None,
    Option(
        "--log-format",
        help="Form of the messages on stderr. json: one object a line. github: annotations and groups of GitHub "
        "Actions. [default: json with --json, else QUARK_LOG_FORMAT, else text]",
        show_default=False,
    ),
]
