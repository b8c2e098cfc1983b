"""docs/serving.md has the matrix that writers and recorded runs give; the pages of consumers have the runs."""

from __future__ import annotations

from quarkcli import dialects, servers
from tests.consumers import record
from tests.consumers.pairs import DEMO
from tests.docs.serving import FOLDER, PAGE, SHORT, cells, page, pages


def test_the_tables_are_fresh() -> None:
    for path, lines in pages().items():
        text = path.read_text(encoding="utf-8")
        assert page(text, lines) == text, f"run 'make docs' ({path.name})"


def test_every_dialect_stands_in_it() -> None:
    head = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| scheme |"))
    assert head.count("`") == 2 * len(dialects.writers())


def test_every_run_stands_in_it() -> None:
    """So that what was loaded is what the writers say today."""
    found = cells()
    for run in record.read():
        if run.model == DEMO and not run.cache:
            assert f"{SHORT[run.consumer]}<sup>" in found[run.scheme, run.dialect]


def test_every_server_has_a_page() -> None:
    index = PAGE.read_text(encoding="utf-8")
    assert {path.stem for path in FOLDER.glob("*.md")} == {*servers.names(), "tensorrt-llm"}
    for path in FOLDER.glob("*.md"):
        assert f"(serving/{path.name})" in index
