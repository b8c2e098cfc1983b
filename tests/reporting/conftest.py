"""Runs whose reports are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quarkcli.evaluation import judge
from quarkcli.events import silent
from quarkcli.job import run as job
from tests import runs


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of experts in nvfp4, solved on data and scored."""
    folder = tmp_path_factory.mktemp("moe")
    source = runs.build("qwen3_moe", folder / "source")
    data = runs.data(runs.text_file(folder / "text.txt"), samples=24)
    options = job.Options(
        str(source), scheme="nvfp4", algorithm="gptq", output=folder / "out", evaluate=True, device="cpu",
        command=("quark", "quantize", "--model", "<b>&'\""), **data,
    )  # fmt: skip
    job.run(options, silent, judge=judge)
    return folder / "out"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in mxfp4, without data."""
    output = tmp_path_factory.mktemp("plain") / "out"
    job.run(job.Options("demo", scheme="mxfp4", output=output, device="cpu"), silent)
    return output


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "quark" / "report.json").read_text(encoding="utf-8"))
