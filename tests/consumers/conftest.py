"""Checkpoints made by the job, for loaders that are not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import runs
from tests.runs import one_thread  # noqa: F401

KV = {"kv_cache": "fp8"}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, runs.Made]:
    """The embedded Llama in every scheme; calibrated ones with a quantized cache."""
    folder = tmp_path_factory.mktemp("demo")
    return {
        scheme: runs.run(
            "demo", folder / scheme, scheme=scheme, dialect="compressed-tensors",
            **(KV | runs.data(text, 16, 128) if scheme in runs.CALIBRATED else {}),
        )
        for scheme in runs.SCHEMES
    }  # fmt: skip


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[tuple[str, str], runs.Made]:
    """Mixtures of experts in every scheme, with the dialect that quark chooses itself."""
    folder = tmp_path_factory.mktemp("experts")
    made = {}
    for family in ("qwen3_moe", "mixtral", "gpt_oss"):
        inner = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
        source = runs.build(family, folder / family, hidden_size=256, **{inner: 384})
        for scheme in runs.SCHEMES:
            data = runs.data(text) if scheme in runs.CALIBRATED else {}
            made[family, scheme] = runs.run(source, folder / f"{family}-{scheme}", scheme=scheme, **data)
    return made
