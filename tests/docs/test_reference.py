"""Documents are checked against the tree."""

from __future__ import annotations

from quarkcli.recipe import catalog
from tests.docs.reference import PAGE, page


def test_the_command_line_reference_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run 'make docs'"


def test_every_scheme_is_in_the_readme() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert not [name for name in catalog.files("schemes") if f"`{name}`" not in readme]
