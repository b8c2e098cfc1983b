"""What `--dialect auto` chooses, and why, for every scheme on every model of the golden table.

python -m tests.dialects.auto       rewrite `auto.json`; say in the commit which rows changed and why
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quarkcli.job import run as job
from quarkcli.plan.compose import Overrides
from quarkcli.recipe import catalog
from tests.golden import sources

FILE = Path(__file__).with_name("auto.json")
MODELS = ("demo", *sources.SOURCES)


def build(folder: Path) -> dict[str, str]:
    return {"demo": "demo"} | {name: str(sources.build(name, folder / name)) for name in sources.SOURCES}


# Schemes of the experts alone of a model that stores them fused.
EXPERTS_OF, EXPERTS = "fused", ("mxfp4", "mxfp4_weight_only", "nvfp4_weight_only")


def row(source: str, scheme: str, exclude: list[str] | None = None) -> list[str]:
    """[dialect, reason]"""
    left = Overrides(exclude=exclude or [])
    prepared = job.prepare(job.Options(model=source, scheme=scheme, device="cpu", calib_data="builtin", overrides=left))
    return [prepared.dialect.name, prepared.dialect_reason]


def rows(models: Mapping[str, str]) -> dict[str, list[str]]:
    schemes = sorted(catalog.files("schemes"))
    found = {f"{name} {scheme}": row(source, scheme) for name, source in models.items() for scheme in schemes}
    alone = {scheme: row(models[EXPERTS_OF], scheme, ["*self_attn*"]) for scheme in EXPERTS}
    return found | {f"{EXPERTS_OF} {scheme}, experts alone": made for scheme, made in alone.items()}


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
