"""A recipe made for a model with fewer blocks says which blocks it does not reach."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli.recipe.recipe import from_config
from tests.plan import layouts
from tests.plan.layouts import lay_out, plan

LAYOUT = lay_out(layouts.llama(layers=5), "llama", hidden_size=128, num_hidden_layers=5)
DENY = {"quantizer_path": "*", "enable": False}
INT4 = {"num_bits": 4, "block_sizes": {-1: 32}}


def entry(module: str, **more: Any) -> dict[str, Any]:
    return {"quantizer_path": f"{module}.weight_quantizer", **(more or {"cfg": INT4})}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry("model.layers.[012].mlp.up_proj")], "blocks 3 to 4 are not quantized"),
        ([entry(f"*layers.{block}.*") for block in range(4)], "block 4 is not quantized"),
        ([entry("*layers.*.mlp.*")], ""),
        ([entry("*layers.[1-4].mlp.up_proj")], ""),
        ([entry("*mlp.up_proj"), entry("*layers.4.*", enable=False)], ""),
        ([entry("*layers.0.mlp.up_proj"), entry("*layers.4.mlp.down_proj")], ""),
    ],
)
def test_blocks_behind_those_that_a_recipe_names(entries: list[dict[str, Any]], said: str) -> None:
    """As `quark search` writes it: every block by its number. What is left out on purpose is no doubt."""
    warnings = [line for line in plan(from_config([DENY, *entries]), LAYOUT).warnings if "not quantized" in line]
    assert [line.partition(":")[0] for line in warnings] == ([said] if said else [])
