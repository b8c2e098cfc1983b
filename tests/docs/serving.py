"""Writes the matrix of docs/serving.md: which dialect holds a scheme, and what loads it there: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quarkcli import dialects
from quarkcli.dialects.base import Writer
from quarkcli.job import run as job
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
START, END = "<!-- matrix: make docs -->", "<!-- end of matrix -->"
SHORT = {"vllm": "vLLM", "transformers": "tf"}


def cell(writer: Writer, plan: Plan, chosen: str) -> str:
    if writer.refusals(plan):
        return "-"
    words = " ".join(text for name, text in SHORT.items() if name in writer.loaders(plan)) or "held"
    return f"**{words}**" if writer.name == chosen else words


def rows() -> Iterator[str]:
    """The embedded model in every scheme; bold is what `--dialect auto` takes."""
    writers = dialects.writers()
    yield "| scheme | " + " | ".join(f"`{writer.name}`" for writer in writers) + " |"
    yield "|---" * (len(writers) + 1) + "|"
    for scheme in sorted(catalog.files("schemes")):
        prepared = job.prepare(job.Options(model="demo", scheme=scheme, device="cpu", calib_data="builtin"))
        cells = (cell(writer, prepared.plan, prepared.dialect.name) for writer in writers)
        yield f"| `{scheme}` | " + " | ".join(cells) + " |"


def page(old: str) -> str:
    """The page with its matrix replaced."""
    before, _, rest = old.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n" + "\n".join(rows()) + f"\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
