"""Writes the table of docs/models.md from real runs on tiny models: `make docs`. About a minute on one core."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quarkcli import family
from quarkcli.errors import QuarkError
from quarkcli.recipe import catalog
from tests import runs
from tests.families import models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
START, END = "<!-- table: make docs -->", "<!-- end of table -->"
HEAD = """| model | family | source tensors | mxfp4: quantized, left alone by default | nvfp4, calibrated |
|---|---|---:|---|---|"""


def rows(folder: Path) -> Iterator[str]:
    text = runs.text_file(folder / "calibration.txt")
    for name, recipe in models.RECIPES.items():
        source = models.build(name, folder / name)
        file = recipe["file"]
        excluded = list(family.load(catalog.files("models")[file]).exclude)
        free = _made(source, folder / f"{name}-mxfp4", scheme="mxfp4")
        options = {"unprotect": excluded, **runs.data(text, 8, 32)}
        data = _made(source, folder / f"{name}-nvfp4", scheme="nvfp4", **options)
        count = len(runs.read_all(source))
        calibrated = data if isinstance(data, str) else f"{_quantized(data)} weights"
        yield f"| {recipe['model']} ({name}) | {file} | {count} | {_shares(free)} | {calibrated} |"


def _made(source: Path, output: Path, **options: Any) -> runs.Made | str:
    try:
        return runs.run(source, output, **options)
    except QuarkError as error:
        return f"no: {error.what}"


def _quantized(made: runs.Made) -> int:
    return sum(1 for _ in made.prepared.plan.quantized())


def _shares(made: runs.Made | str) -> str:
    if isinstance(made, str):
        return made
    roles = sorted(set(made.prepared.layout.protected.values()))
    return f"{_quantized(made)} weights; {', '.join(roles)}"


def page(old: str, table: str) -> str:
    """The page with its table replaced."""
    before, _, rest = old.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table}\n{END}{after}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = "\n".join([HEAD, *rows(Path(folder))])
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
