"""Writes for GitHub Actions: workflow commands in the log, and the Markdown summary of a step."""

from __future__ import annotations

import os
from pathlib import Path

SUMMARY = "GITHUB_STEP_SUMMARY"


def command(name: str, text: str = "", **properties: str) -> str:
    """Returns a workflow command: `::warning::text`. Line ends of the text are written as GitHub asks."""
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items() if value)
    return f"::{name}{' ' + given if given else ''}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Returns labelled rows as lines of a Markdown table; an empty label repeats the one above."""
    lines, label = ["| | |", "|---|---|"], ""
    for own, text in rows:
        label = own or label
        lines.append(f"| {_cell(label)} | {_cell(text)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def section(title: str, lines: list[str]) -> str:
    """Returns Markdown with a heading."""
    return "\n".join([f"### {title}", "", *lines])


def summarize(markdown: str) -> str:
    """Appends to the summary of the step where there is one. Returns why that failed, or ""."""
    place = os.environ.get(SUMMARY, "")
    if not place:
        return ""
    try:
        with Path(place).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"{markdown}\n\n")
    except OSError as error:
        return f"the summary cannot be written to {place} ({SUMMARY}): {error.strerror or error}"
    return ""
