"""Sources of every family, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs
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
