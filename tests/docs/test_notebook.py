"""docs/quark.ipynb runs from top to bottom, and shows what its cells answer."""

from __future__ import annotations

import json

from tests.docs import notebook
from tests.docs.readme import masked

PAGE = json.loads(notebook.PAGE.read_text(encoding="utf-8"))


def test_the_notebook_runs_and_shows_its_answers() -> None:
    """Numbers differ by machine."""
    shown, found = ([cell.get("outputs", []) for cell in one["cells"]] for one in (PAGE, notebook.executed(PAGE)))
    assert masked(json.dumps(found)) == masked(json.dumps(shown))
    assert sum(map(bool, shown)) >= 8


def test_it_is_a_notebook_of_version_4() -> None:
    assert (PAGE["nbformat"], PAGE["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in PAGE["cells"]}) == len(PAGE["cells"])
    assert all(set(cell) >= {"execution_count", "outputs"} for cell in PAGE["cells"] if cell["cell_type"] == "code")
