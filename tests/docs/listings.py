"""Writes what the list commands show of all that is built in into the package: `make docs`.

python -m tests.docs.listings [--check]    with --check: fails where the file is not what the commands compute
"""

from __future__ import annotations

import sys

from quarkcli.cli import algorithms, listings, models, recipes, schemes
from quarkcli.recipe import catalog


def text() -> str:
    """Returns the file as it has to be, from what is built in alone."""

    def built_in(kind):
        found = catalog.files(kind).items()
        return [(name, path, key) for name, path in found if (key := listings.key(path))]

    return listings.written(
        {
            "recipes": {key: recipes.facts_of(name, path) for name, path, key in built_in("ptq")},
            "schemes": {
                key: schemes.facts_of(kind, name, path)
                for kind in catalog.SCHEMES
                for name, path, key in built_in(kind)
            },
            "models": {key: models.facts_of(name, path) for name, path, key in built_in("models")},
            "algorithms": {row["name"]: row for row in algorithms.facts()},
        }
    )


def main() -> None:
    if "--check" not in sys.argv[1:]:
        listings.FILE.write_text(text(), encoding="utf-8")
    elif listings.FILE.read_text(encoding="utf-8") != text():
        sys.exit(f"{listings.FILE} is not what the commands compute: make docs")


if __name__ == "__main__":
    main()
