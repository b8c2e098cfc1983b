"""Permutation and rotation on every family that transformers builds: the function stays, or a reason why not.

The reasons are those of `data/refusals.json`, which `test_algorithms.py` holds the product to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.errors import ConfigError
from tests.algorithms import turning
from tests.families import models

NAMES = tuple(models.RECIPES)
# No residual stream that could take them: what can be turned inside the blocks is.
INSIDE = {"deepseek_v4", "gemma3n_text"}


def accepted(source: Path, steps: turning.Steps) -> bool:
    """Whether a list of transforms is taken; else the reason is a sentence with a hint."""
    try:
        turning.checked(turning.planned(source), steps)
    except ConfigError as error:
        assert error.hint and len(error.what) > 40, error
        return False
    return True


def cases() -> list[Any]:
    """Every name, slow but for the first of each family file."""
    first = {recipe["file"]: name for name, recipe in reversed(models.RECIPES.items())}
    return [pytest.param(name, marks=() if name in first.values() else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", cases())
def test_the_function_stays(name: str, built: dict[str, Path]) -> None:
    """Channels in another order, then the residual stream rotated and values in their heads, as far as they can be."""
    source = built[name]
    before = turning.source_tensors(source)
    steps: turning.Steps = [("permutation", {"residual": name not in INSIDE})]
    rotation = next((given for given in ({}, {"r1": False}) if accepted(source, [("rotation", given)])), None)
    steps += [("rotation", rotation)] if rotation is not None else []
    after, plan = turning.turned(source, steps, before)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and changed <= set(plan.changed)
    one, other = turning.logits(source, before), turning.logits(source, after)
    assert float((one - other).abs().max()) < 1e-4 * float(one.std()), (steps, sorted(changed))


def test_which_families_can_be_rotated(built: dict[str, Path]) -> None:
    """RMS norms in front of all readers: no mean to subtract, no weights behind."""
    cannot = {name for name in NAMES if not models.can_rotate(name)}
    assert cannot == {
        "phi", "phi_qkln", "olmo", "opt", "gptj", "cohere", "cohere2", "gemma2", "gemma3", "gemma3_text",
        "gemma3n_text", "gemma4", "gemma4_text", "gemma4_moe_text", "dbrx", "olmo3", "exaone4", "mllama",
        "mllama_text", "nemotron_h", "nemotron_h_latent", "deepseek_v4",
    }  # fmt: skip
