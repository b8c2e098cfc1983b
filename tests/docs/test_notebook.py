"""docs/quark.ipynb runs from top to bottom, and shows what its cells answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

import quarkcli
from tests.docs import notebook
from tests.docs.readme import masked

PAGE = json.loads(notebook.PAGE.read_text(encoding="utf-8"))


def test_the_notebook_runs_and_shows_its_answers() -> None:
    """Numbers differ by machine."""
    shown, found = ([cell.get("outputs", []) for cell in one["cells"]] for one in (PAGE, notebook.executed(PAGE)))
    assert masked(json.dumps(found)) == masked(json.dumps(shown))
    assert sum(map(bool, shown)) >= 8


@pytest.mark.slow
def test_it_runs_in_a_kernel_of_jupyter(tmp_path, monkeypatch) -> None:
    """One display that changes, no line from a library, the views that the page shows, errors with their hint."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    page = nbformat.reads(json.dumps(PAGE), as_version=4)
    page.cells.append(nbformat.v4.new_code_cell('quarkcli.quantize("demo", "nvfp5", output="x")'))
    client = nbclient.NotebookClient(
        page, timeout=300, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    with client.setup_kernel():
        for number, cell in enumerate(page.cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, number)
        names = completed(client, "quarkcli.")
    *answers, failed = (list(cell.outputs) for cell in page.cells if cell.cell_type == "code")
    kinds = [output.output_type for outputs in answers for output in outputs]
    assert kinds.count("display_data") == 1 and set(kinds) == {"display_data", "execute_result"}
    (progress,) = (one for outputs in answers for one in outputs if one.output_type == "display_data")
    assert "value='6' max='6'" in progress.data["text/html"]
    shown = [out["data"] for cell in PAGE["cells"] for out in cell.get("outputs", []) if "text/html" in out["data"]]
    views = [one.data["text/html"] for outputs in answers for one in outputs if one.output_type == "execute_result"
             and "text/html" in one.data]  # fmt: skip
    assert masked(json.dumps(views)) == masked(json.dumps(["".join(data["text/html"]) for data in shown]))
    assert [line.startswith("hint: did you mean nvfp4") for line in failed[0].traceback[-1].splitlines()][-1]
    assert set(names) == {f"{name}" for name in quarkcli.__all__ if not name.startswith("__")}


def completed(client: Any, text: str) -> list[str]:
    """What Tab offers, without the magic of IPython."""
    from nbclient.util import run_sync

    client.kc.complete(text, len(text))
    while True:
        reply = run_sync(client.kc.get_shell_msg)(timeout=60)
        if reply["msg_type"] == "complete_reply":
            return [name for name in reply["content"]["matches"] if not name.startswith("%")]


def test_it_is_a_notebook_of_version_4() -> None:
    assert (PAGE["nbformat"], PAGE["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in PAGE["cells"]}) == len(PAGE["cells"])
    assert all(set(cell) >= {"execution_count", "outputs"} for cell in PAGE["cells"] if cell["cell_type"] == "code")
