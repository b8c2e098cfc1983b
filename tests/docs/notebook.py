"""docs/quark.ipynb: its cells are run, and their answers written back: `make docs`.

A cell's answer is its last expression, as a notebook shows it: the HTML view where the object has one, else its repr.
"""

from __future__ import annotations

import ast
import json
import os
import tempfile
from contextlib import chdir
from typing import Any
from unittest import mock

from tests.docs.commands import ROOT

PAGE = ROOT / "docs" / "quark.ipynb"


def run(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a cell and returns its outputs in the notebook's format."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None
    if value is None:
        return []
    data = {"text/plain": [repr(value)]}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = [value._repr_html_()]
    return [{"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data}]


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells, run from top to bottom in an empty folder, offline."""
    names: dict[str, Any] = {}
    found = json.loads(json.dumps(notebook))
    with tempfile.TemporaryDirectory() as folder, chdir(folder), mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):
        for cell in found["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = run("".join(cell["source"]), names)
    return found


def text(notebook: dict[str, Any]) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(executed(json.loads(PAGE.read_text(encoding="utf-8")))), encoding="utf-8")
