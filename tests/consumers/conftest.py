"""Checkpoints made by the job, for loaders that are not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs

KV = {"kv_cache": "fp8"}


class Lazy(dict):
    """Makes what is asked for, once."""

    def __init__(self, make: Callable[..., runs.Made]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: str | tuple[str, str]) -> runs.Made:
        self[key] = self.make(*([key] if isinstance(key, str) else key))
        return self[key]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, runs.Made]:
    """The embedded Llama by scheme; calibrated ones with a quantized cache."""
    folder = tmp_path_factory.mktemp("demo")

    def make(scheme: str) -> runs.Made:
        data = KV | runs.data(text, 16, 128) if scheme in runs.CALIBRATED else {}
        return runs.run("demo", folder / scheme, scheme=scheme, dialect="compressed-tensors", **data)

    return Lazy(make)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[tuple[str, str], runs.Made]:
    """Mixtures of experts by family and scheme, in the dialect that quark chooses itself."""
    folder = tmp_path_factory.mktemp("experts")

    def make(family: str, scheme: str) -> runs.Made:
        source = folder / family
        if not source.exists():
            inner = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
            runs.build(family, source, hidden_size=256, **{inner: 384})
        data = runs.data(text) if scheme in runs.CALIBRATED else {}
        return runs.run(source, folder / f"{family}-{scheme}", scheme=scheme, **data)

    return Lazy(make)
