"""Inputs that are turned while the model runs: on every family that has a linear for it the function stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import runs
from tests.algorithms.test_hadamard import logits
from tests.families import models, refusals

NAMES = [name for name in models.RECIPES if refusals.known("hadamard", refusals.SCHEMES[0], name) is None]


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays(name: str, built: dict[str, Path]) -> None:
    prepared = runs.prepare(built[name], scheme="int8_dynamic", algorithm="hadamard")
    tokens = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    plain, turned = (logits(prepared, tokens, turn=turn) for turn in (False, True))
    assert prepared.plan.online and float(plain.abs().max()) > 0.1
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-4)


def test_vllm_finds_the_inputs_of_linears_by_the_names_of_the_files(built: dict[str, Path]) -> None:
    """The short convolutions of LFM2 have other names there. Of q, k and v it looks for each."""
    for name in ("apertus", "lfm2", "phi3", "falcon", "qwen3_5_text"):
        prepared = runs.prepare(built[name], scheme="int4_wo_32", algorithm="hadamard", dialect="compressed-tensors")
        loads = {"vllm"} if name == "apertus" else set()
        assert prepared.plan.online and prepared.dialect.loaders(prepared.plan) == loads
