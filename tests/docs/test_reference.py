"""Documents are checked against the tree."""

from __future__ import annotations

import re
from pathlib import Path

from quarkcli.recipe import catalog
from tests.docs import errors, models, recipe_reference
from tests.docs.reference import PAGE, page
from tests.families.models import RECIPES
from tests.test_design import ROOMS

DESIGN = (PAGE.parent / "architecture.md").read_text(encoding="utf-8")


def test_the_command_line_reference_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run 'make docs'"


def test_the_recipe_reference_is_fresh() -> None:
    assert recipe_reference.PAGE.read_text(encoding="utf-8") == recipe_reference.page(), "run 'make docs'"


def test_the_index_of_errors_is_fresh() -> None:
    assert errors.PAGE.read_text(encoding="utf-8") == errors.page(), "run 'make docs'"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGE.parent.glob("*.md") if f"(docs/{page.name})" not in readme]


def test_every_scheme_is_on_its_page() -> None:
    page = (PAGE.parent / "choosing.md").read_text(encoding="utf-8")
    assert not [name for name in catalog.files("schemes") if f"`{name}`" not in page]


def test_every_link_leads_somewhere() -> None:
    """Links to files and to headings of pages, from README.md and docs/."""
    wrong = []
    for source in [PAGE.parents[1] / "README.md", *PAGE.parent.rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", source.read_text(encoding="utf-8")):
            file, _, heading = target.partition("#")
            there = source.parent / file if file else source
            if not there.exists() or (heading and heading not in _headings(there)):
                wrong.append(f"{source.name}: {target}")
    assert not wrong


def _headings(page: Path) -> set[str]:
    """The names that a forge gives the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_models_page_names_every_family_and_every_model_that_is_run() -> None:
    text = models.PAGE.read_text(encoding="utf-8")
    table = text.partition(models.START)[2].partition(models.END)[0]
    assert table.startswith(f"\n{models.HEAD}\n")
    shown = {line.split("(")[1].split(")")[0] for line in table.splitlines()[3:] if line}
    assert shown == set(RECIPES)
    assert "| no: " not in table
    assert all(name in text or name.replace("_", "-") in text for name in catalog.files("models"))


def test_every_helper_is_described() -> None:
    tests = Path(__file__).parents[1]
    text = (tests / "README.md").read_text(encoding="utf-8")
    rooms = {"bench", "docs", "data", "remote"}  # measurements, generators of pages, and files that are read
    helpers = [path for path in tests.rglob("*.py") if not path.name.startswith(("test_", "__", "conftest"))]
    described = [path for path in helpers if not rooms & set(path.relative_to(tests).parts)]
    assert described
    assert not [path.name for path in described if path.name not in text]


def test_every_file_that_the_page_on_tests_names_is_there() -> None:
    tests = Path(__file__).parents[1]
    names = set(re.findall(r"`((?:[\w]+/)*\w+\.(?:py|json))`", (tests / "README.md").read_text(encoding="utf-8")))
    assert len(names) > 20
    found = [path.relative_to(tests).as_posix() for path in tests.rglob("*") if path.suffix in {".py", ".json"}]
    assert not [name for name in names if not any(f"/{path}".endswith(f"/{name}") for path in found)]


def test_the_page_on_the_design_names_files_that_are_there() -> None:
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|json|yaml))`", DESIGN))
    names = {name for name in names if not name.endswith(("/NAME.py", "/NAME.yaml"))}  # those to be written
    assert len(names) > 40
    folders = [PAGE.parents[1] / folder for folder in ("quarkcli", "recipes", "tests")]
    found = [path.as_posix() for folder in folders for path in folder.rglob("*.*")]
    names |= set(re.findall(r"`((?:\w+/)+)NAME\.(?:py|yaml)`", DESIGN))
    found += [f"{path.as_posix()}/" for folder in folders for path in folder.rglob("*") if path.is_dir()]
    assert not [name for name in names if not any(path.endswith(f"/{name}") for path in found)]


def test_the_page_on_the_design_has_the_rooms_in_their_order() -> None:
    rows = re.findall(r"^\| (.*?) \|", DESIGN.partition("## Rooms")[2].partition("## ")[0], re.MULTILINE)
    assert re.findall(r"\w+", " ".join(row for row in rows if "`" in row).replace("then", "")) == [
        room for room in ROOMS.split() if room != "__main__"
    ]
