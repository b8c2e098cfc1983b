"""Writes the table of default advice into docs/algorithms.md from `recipes/advice.yaml`: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quarkcli.recipe import advice

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"
START, END = "<!-- advice: make docs -->", "<!-- end of advice -->"
HEAD = "| weights in | inputs | algorithms | why |\n|---|---|---|---|"


def rows() -> Iterator[str]:
    for row in advice.rows():
        elements = "any other" if row.elements == ["*"] else ", ".join(f"`{pattern}`" for pattern in row.elements)
        steps = ", ".join(f"`{step.method}`{_with(step.model_extra or {})}" for step in row.steps)
        yield f"| {elements} | {' or '.join(row.inputs) if row.inputs else 'any'} | {steps} | {row.why} |"


def _with(parameters: dict[str, object]) -> str:
    return f" ({', '.join(f'`{key}: {value}`' for key, value in parameters.items())})" if parameters else ""


def page(old: str) -> str:
    """The page with its table replaced."""
    before, _, rest = old.partition(START)
    _, _, after = rest.partition(END)
    table = "\n".join([HEAD, *rows()])
    return f"{before}{START}\n{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
