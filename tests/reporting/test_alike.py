"""Warnings that differ in names and numbers alone are told once, with how many there were."""

from __future__ import annotations

import pytest

from quarkcli.reporting.alike import folded, kind


def few(layer: int, count: int) -> str:
    seen = ", ".join(str(number) for number in range(count))
    return f"model.layers.{layer}.mlp: {count} of 8 experts saw no calibration token ({seen}); the layer's stand in"


def test_one_for_all_layers():
    texts = [few(0, 1), few(1, 3), "careful", few(2, 7), few(2, 7)]
    assert folded(texts) == [f"{few(0, 1)} (and 2 more like this)", "careful"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.0.mlp: NaN or inf in activations", "a.0.mlp, expert 3: NaN or inf in activations"),
        (
            "gptq finds no solution with 12 tokens; its weights are rounded to nearest",
            "gptq finds no solution with 1 tokens; its weights are rounded to nearest",
        ),
        ("not enough GPU memory: 8 -> 4 sequences at a time", "not enough GPU memory: 4 -> 2 sequences at a time"),
        ("two more (a.b, c.d ...)", "two more (e.f)"),
    ],
)
def test_alike(one, other):
    assert kind(one) == kind(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.1.q: gptq finds no solution", "a.1.q: awq finds no solution"),
        ("--calib-data not used", "--calib-samples not used"),
        ("a.1.q: no calibration token", "a.1.q: rounded to nearest"),
    ],
)
def test_different(one, other):
    assert folded([one, other]) == [one, other]
