"""The forecasts of docs/big_models.md are those of the code. A model that is planned in an instant stands for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import published
from tests.docs import big_models


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    lines = list(big_models.table(tmp_path, ["Llama-3.3-70B"]))
    page = big_models.PAGE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(big_models.JOBS) * len(big_models.DEVICES)
    assert [line for line in lines if line not in page] == []


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    text = big_models.PAGE.read_text(encoding="utf-8")
    assert big_models.page(text, list(big_models.table(tmp_path))) == text


def test_shapes_are_the_published_ones() -> None:
    """Parameters in billions, as the models' cards have them; codes of gpt-oss lie two in a byte."""
    for name, billions in {"Llama-3.3-70B": 70.6, "DeepSeek-V3 671B": 671, "Kimi-K2 1T": 1026}.items():
        _, tensors = published.MODELS[name]()
        count = sum(_numel(shape) for tensor, _, shape in tensors if not tensor.endswith("_scale_inv"))
        assert round(count / 1e9, 1 if billions < 100 else 0) == billions, name
    _, tensors = published.MODELS["gpt-oss-120b"]()
    count = sum(_numel(shape) * (2 if name.endswith("_blocks") else 1) for name, _, shape in tensors
                if not name.endswith("_scales"))  # fmt: skip
    assert round(count / 1e9, 1) == 116.8


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
