"""Names from elsewhere: each is answered with something that works here, and hides no scheme."""

from __future__ import annotations

import shlex

import pytest
import yaml

from quarkcli.errors import UsageError
from quarkcli.recipe import catalog
from tests import runs

ROWS = yaml.safe_load((catalog.built_in_folder() / "words.yaml").read_text())["words"]
NAMES = [name for row in ROWS for name in row["names"]]


def test_names_are_written_once_and_are_no_schemes() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert not set(NAMES) & set(map(catalog.same, catalog.names("schemes")))
    assert all(name == catalog.same(name) for name in NAMES)


@pytest.mark.parametrize("name", ["w4a16", "W8A8", "q4-k-m", "int4"])
def test_a_name_is_answered(name: str) -> None:
    with pytest.raises(UsageError, match=f"no scheme is called '{name}' here") as caught:
        catalog.find("schemes", name)
    assert "--scheme " in caught.value.hint


@pytest.mark.parametrize("flags", sorted({flags for row in ROWS for flags in row["type"]}))
def test_what_is_to_be_typed_works(flags: str) -> None:
    words = shlex.split(flags)
    given = {words[at].removeprefix("--"): words[at + 1] for at in range(0, len(words), 2)}
    prepared = runs.prepare("demo", calib_data="builtin", **given)
    assert prepared.recipe.scheme == given["scheme"]
