"""Every registered algorithm on every family that transformers builds: a plan, a run and every tensor accounted for, or
a refusal for the reason that `data/refusals.json` pins. `python -m tests.families.refusals` writes that file anew.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from quarkcli import algorithms
from quarkcli.disk import verify
from quarkcli.errors import ConfigError
from tests import runs
from tests.families import models, refusals

NAMES, ALGORITHMS, SCHEMES = tuple(models.RECIPES), tuple(algorithms.names()), refusals.SCHEMES


def cases() -> list[Any]:
    """Every (name, algorithm, scheme), slow but for a share in which each name, algorithm and scheme occurs.

    `tests/algorithms/test_invariants.py` tries every algorithm on one model with experts.
    """
    turns = enumerate(NAMES)
    kept = {(name, ALGORITHMS[i % len(ALGORITHMS)], SCHEMES[i // len(ALGORITHMS) % len(SCHEMES)]) for i, name in turns}
    every = product(NAMES, ALGORITHMS, SCHEMES)
    return [pytest.param(*case, marks=() if case in kept else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("name", "algorithm", "scheme"), cases())
def test_an_algorithm_on_a_family(
    name: str, algorithm: str, scheme: str, built: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = {"scheme": scheme, "algorithm": algorithm, "settings": runs.quick(algorithm), **runs.data(text, 8, 32)}
    reason = refusals.known(algorithm, scheme, name)
    if reason is not None:
        with pytest.raises(ConfigError) as caught:
            runs.prepare(built[name], **options)
        assert caught.value.what == reason
        return
    made = runs.run(built[name], tmp_path / "out", **options)
    assert algorithm in made.report["algorithms"]
    check_fates(made)


def check_fates(made: runs.Made) -> None:
    """Every tensor of the source has the fate that the plan says, and nothing else is written."""
    source, written = runs.read_all(made.source), runs.read_all(made.folder)
    plan = made.prepared.plan
    fates = plan.fates()
    assert set(fates) == set(source)
    for name, fate in fates.items():
        assert fate.kind in {"kept", "changed", "quantized", "dropped"}
        if fate.kind in {"kept", "changed"}:
            assert (written[name].shape, written[name].dtype) == (source[name].shape, source[name].dtype), name
        if fate.kind == "kept":
            assert runs.same_bytes(written[name], source[name]), name
        if fate.kind == "dropped":
            assert name not in written
    assert all(f"{target.name}.weight_packed" in written for target in plan.quantized())
    assert {added.name for added in plan.added} <= set(written)
    assert any(f"all {len(source)} tensors of the original model are there" in line
               for line in verify.directory(str(made.folder), str(made.source)))  # fmt: skip


def test_refusals_are_of_what_there_is() -> None:
    """A row of the table that no test meets goes."""
    for algorithm, schemes in refusals.TABLE.items():
        assert algorithm in ALGORITHMS and set(schemes) <= set(SCHEMES)
        assert all(set(families) <= set(NAMES) for families in schemes.values())
