"""What `--dialect auto` chooses, and why, for every scheme on every model of the golden table.

python -m tests.dialects.auto       rewrite `auto.json`; say in the commit which rows changed and why
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quarkcli.job import run as job
from quarkcli.recipe import catalog
from tests.golden import sources

FILE = Path(__file__).with_name("auto.json")
MODELS = ("demo", *sources.SOURCES)


def build(folder: Path) -> dict[str, str]:
    return {"demo": "demo"} | {name: str(sources.build(name, folder / name)) for name in sources.SOURCES}


def row(source: str, scheme: str) -> list[str]:
    """[dialect, reason]"""
    prepared = job.prepare(job.Options(model=source, scheme=scheme, device="cpu", calib_data="builtin"))
    return [prepared.dialect.name, prepared.dialect_reason]


def rows(models: Mapping[str, str]) -> dict[str, list[str]]:
    schemes = sorted(catalog.files("schemes"))
    return {f"{name} {scheme}": row(source, scheme) for name, source in models.items() for scheme in schemes}


def read() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(FILE.read_text())
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = rows(build(Path(folder)))
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
