"""docs/serving.md has the matrix that the writers give, and names every dialect."""

from __future__ import annotations

from quarkcli import dialects
from tests.docs.serving import PAGE, page

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_matrix_is_fresh() -> None:
    assert page(TEXT) == TEXT, "run 'make docs'"


def test_every_dialect_stands_in_it() -> None:
    head = next(line for line in TEXT.splitlines() if line.startswith("| scheme |"))
    assert head.count("`") == 2 * len(dialects.writers())
