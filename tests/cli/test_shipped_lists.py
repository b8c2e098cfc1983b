"""Lists of what is built in come from a shipped file: that of the code and of the recipe files, else it is not used."""

from __future__ import annotations

import json
import shutil

import pytest

from quarkcli.cli import listings
from quarkcli.recipe import catalog
from tests.docs import listings as page


@pytest.fixture
def computing(monkeypatch):
    """Counts what is computed: (kind of thing, name)."""
    from quarkcli.cli import models, recipes, schemes

    seen = []
    for module, group in ((recipes, "recipes"), (schemes, "schemes"), (models, "models")):

        def counted(*arguments, real=module.facts_of, group=group):
            seen.append((group, arguments[-2]))
            return real(*arguments)

        monkeypatch.setattr(module, "facts_of", counted)
    return seen


def test_the_shipped_file_is_what_the_commands_compute():
    assert listings.FILE.read_text(encoding="utf-8") == page.text(), "make docs"


@pytest.mark.parametrize("group", ["recipes", "schemes", "models", "algorithms"])
def test_lists_are_the_same_with_and_without_it(quark, monkeypatch, tmp_path, group, computing):
    shipped = quark(group, "list", "--json")
    assert not computing
    monkeypatch.setattr(listings, "FILE", tmp_path / "missing")
    listings._read.cache_clear()
    try:
        assert quark(group, "list", "--json") == shipped
    finally:
        listings._read.cache_clear()
    assert len(computing) == (len(json.loads(shipped.out)[group]) if group != "algorithms" else 0)


def test_a_changed_recipe_file_puts_it_out_of_use(quark, monkeypatch, tmp_path, computing):
    folder = tmp_path / "recipes"
    shutil.copytree(catalog.built_in_folder(), folder)
    file = folder / "schemes" / "mxfp4.yaml"
    file.write_text(file.read_text().replace("summary: ", "summary: changed, ", 1))
    monkeypatch.setattr(catalog, "built_in_folder", lambda: folder)
    catalog._built_in.cache_clear()
    try:
        rows = json.loads(quark("schemes", "list", "--json").out)["schemes"]
    finally:
        catalog._built_in.cache_clear()
    (row,) = [row for row in rows if row["name"] == "mxfp4"]
    assert row["summary"].startswith("changed, ")
    assert len(computing) == len(rows)


def test_files_of_the_user_are_read_each_time(quark, tmp_path, computing):
    folder = tmp_path / "home" / "schemes"
    folder.mkdir(parents=True)
    spec = "granularity: tensor, scale: {dtype: f32, rule: half_range}"
    for bits in (4, 8):
        (folder / "mine.yaml").write_text(f"summary: as {bits}\nweight: {{element: int{bits}, {spec}}}\n")
        (row,) = [r for r in json.loads(quark("schemes", "list", "--json").out)["schemes"] if r["name"] == "mine"]
        assert (row["error"], row["summary"]) == (None, f"as {bits}"), row
    assert computing == [("schemes", "mine")] * 2


def test_rows_of_an_installation_name_its_own_files(quark):
    for group in ("recipes", "models"):
        rows = json.loads(quark(group, "list", "--json").out)[group]
        assert {row["file"] for row in rows} <= {str(path) for path in catalog.built_in_folder().rglob("*.yaml")}
