"""The golden table: sha256 of tensors and `quantization_config` for every data-free scheme, dialect and model.

    python -m tests.golden.table          rewrite the table; say in the commit which rows changed and why

Only what is elementwise is pinned, so that a row is the same on every machine and release: sums over rows, which a
search for the least error takes, are added up in another order elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from quarkcli import dialects
from quarkcli.errors import ConfigError
from quarkcli.job import run as job
from quarkcli.job.part import PartWorker
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from quarkcli.spec import MIN_MAX, SEARCH_RULES
from tests.golden import sources

FILE = Path(__file__).with_name("table.json")
MODELS = ("demo", *sources.SOURCES)
REFUSED = "refused"
Rows = dict[str, list[str] | str]


def schemes() -> list[str]:
    return sorted(catalog.files("schemes"))


def rows(model: str, source: str, scheme: str) -> Rows:
    """`<model> <scheme> <dialect>` -> hashes of tensors and config, or that the dialect cannot hold it.

    Nothing for a scheme that needs data or searches.
    """
    found: Rows = {}
    for dialect in (writer.name for writer in dialects.writers()):
        name = f"{model} {scheme} {dialect}"
        options = job.Options(model=source, scheme=scheme, dialect=dialect, device="cpu", calib_data="builtin")
        try:
            prepared = job.prepare(options)
        except ConfigError as error:
            if error.where != "--dialect":
                raise
            found[name] = REFUSED
            continue
        if prepared.needs or not elementwise(prepared.plan):
            return {}
        found[name] = [_tensors(prepared), digest(prepared.dialect.config(prepared.plan))]
    return found


def elementwise(plan: Plan) -> bool:
    specs = (stage for target in plan.quantized() if target.weight for stage in target.weight.stages)
    return all(s.observer == MIN_MAX and (s.scale is None or s.scale.rule not in SEARCH_RULES) for s in specs)


def _tensors(prepared: job.Prepared) -> str:
    """Hash of what every part hands to the writer."""
    worker = PartWorker(
        prepared.plan, prepared.dialect, prepared.steps, {}, prepared.source, None, lambda event: None,
        roles=prepared.layout.tensor_roles,
    )  # fmt: skip
    made: dict[str, torch.Tensor] = {}
    for part in prepared.plan.parts:
        made |= worker.work(part, prepared.source.read_many(part.tensors)).tensors
    return hash_tensors(made)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names, dtypes, shapes and bytes, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def digest(config: Any) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def read() -> Rows:
    found: Rows = json.loads(FILE.read_text())
    return found


def write(table: Rows) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def changes(old: Rows, new: Rows) -> Iterable[str]:
    """Rows that came, went, or differ, with what differs."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, list) and isinstance(after, list):
            kinds = zip(("tensors", "quantization_config"), before, after, strict=True)
            yield f"{name}: other {' and '.join(kind for kind, one, two in kinds if one != two)}"
        else:
            yield f"{name}: {before or 'new'} -> {after or 'gone'}"


def main() -> None:
    old, new = read() if FILE.is_file() else {}, Rows()
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            source = model if model == "demo" else str(sources.build(model, Path(folder) / model))
            for scheme in schemes():
                new |= rows(model, source, scheme)
    write(new)
    print("\n".join(changes(old, new)) or "nothing changed")


if __name__ == "__main__":
    main()
