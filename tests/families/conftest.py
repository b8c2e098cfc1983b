"""Sources of every family, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs
from tests.families import models
from tests.runs import one_thread  # noqa: F401

NAMES = (*runs.SIZES, runs.FUSED)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.txt"
    path.write_text(runs.topics(0, 3)[:700], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: runs.build(name, folder / name) for name in NAMES}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of `models.RECIPES` by name, each built when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Sources(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = models.build(name, root / name)
            return self[name]

    return Sources()
