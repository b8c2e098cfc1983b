"""Which algorithm refuses which family, and why: the table that `test_algorithms.py` holds the product to.

    python -m tests.families.refusals

writes `tests/data/refusals.json` anew from plans alone; look at what changed before it is committed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from quarkcli import algorithms
from quarkcli.errors import ConfigError
from tests import runs
from tests.families import models

FILE = Path(__file__).parent.parent / "data" / "refusals.json"
SCHEMES = ("int4_wo_32", "nvfp4")  # groups that the widths of all tiny models fit
# Algorithm -> scheme -> family -> reason.
TABLE: dict[str, dict[str, dict[str, str]]] = json.loads(FILE.read_text(encoding="utf-8"))


def known(algorithm: str, scheme: str, name: str) -> str | None:
    """The reason why an algorithm refuses a family's tiny model; None where it is to run."""
    return TABLE.get(algorithm, {}).get(scheme, {}).get(name)


def refused(source: Path, algorithm: str, scheme: str) -> str | None:
    try:
        runs.prepare(source, scheme=scheme, algorithm=algorithm, calib_data="builtin")
    except ConfigError as error:
        return error.what
    return None


def table(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in models.RECIPES:
        source = models.build(name, folder / name)
        for algorithm in algorithms.names():
            for scheme in SCHEMES:
                reason = refused(source, algorithm, scheme)
                if reason is not None:
                    found.setdefault(algorithm, {}).setdefault(scheme, {})[name] = reason
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        made = table(Path(scratch))
    FILE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
