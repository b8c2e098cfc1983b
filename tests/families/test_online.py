"""Inputs that are turned while the model runs: on every family that has a linear for it the function stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import runs
from tests.algorithms.test_hadamard import logits
from tests.families import models, refusals

# Weights that the class holds fused or elsewhere than the file, linear attention, latents, streams of hidden states.
OFTEN = {"phi3", "qwen3_5", "gemma3n_text", "deepseek_v3", "qwen3_next"}
NAMES = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
    for name in models.RECIPES
    if refusals.known("hadamard", refusals.SCHEMES[0], name) is None
]


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays(name: str, built: dict[str, Path]) -> None:
    prepared = runs.prepare(built[name], scheme="int8_dynamic", algorithm="hadamard")
    tokens = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    plain, turned = (logits(prepared, tokens, turn=turn) for turn in (False, True))
    assert prepared.plan.online and float(plain.abs().max()) > 0.1
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-4)
