"""Writes what the list commands show of all that is built in into the package, and what was measured: `make docs`.

python -m tests.docs.listings [--check]    with --check: fails where the file is not what the commands compute
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from quarkcli.cli import algorithms, listings, models, recipes, schemes
from quarkcli.recipe import catalog
from tests.bench import schemes as schemes_measured


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


MEASURED = Path(__file__).resolve().parents[2] / "docs" / "losses.json"
# Models of docs/benchmarks.md -> how people know them.
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "llama-8m": "a small llama of 8M parameters",
    "moe-4x8": "a small MoE of 8 experts",
}
BENCH_ONLY = ("inputs alone", " of ")  # rows that no command line makes


def losses() -> str:
    """Returns what each scheme has cost: for each model, rounded to nearest and with the steps that lost least.

    The embedded model, on which every scheme was measured, comes last.
    """
    found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for row in json.loads(MEASURED.read_text(encoding="utf-8")).values():
        if row["model"] in MODELS and "losses" in row and not any(word in row["steps"] for word in BENCH_ONLY):
            by_steps = found.setdefault(row["scheme"], {}).setdefault(row["model"], {})
            by_steps.setdefault(row["steps"], []).append(row["losses"]["in domain"])
    every = json.loads(schemes_measured.RESULTS.read_text(encoding="utf-8"))
    schemes = {
        name: [*_lines(found.get(name, {})), {"model": every["model"], "steps": "rtn", **row}]
        for name, row in every["rows"].items()
    }
    return json.dumps({"schemes": schemes}, indent=1) + "\n"


def _lines(models: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    lines = []
    for model, shown in MODELS.items():
        means = {
            steps: {key: round(mean(one[key] for one in seeds), 5) for key in seeds[0]}
            for steps, seeds in models.get(model, {}).items()
        }
        best = min(means, key=lambda steps: means[steps]["kl"], default=None)
        chosen = [steps for steps in means if steps in ("rtn", best)]
        lines += [
            {"model": shown, "steps": steps, **means[steps]} for steps in sorted(chosen, key=("rtn",).count)[::-1]
        ]
    return lines


def main() -> None:
    files = {listings.FILE: text, listings.LOSSES: losses}
    for file, made in files.items():
        if "--check" not in sys.argv[1:]:
            file.write_text(made(), encoding="utf-8")
        elif file.read_text(encoding="utf-8") != made():
            sys.exit(f"{file} is not what the commands compute: make docs")


if __name__ == "__main__":
    main()
