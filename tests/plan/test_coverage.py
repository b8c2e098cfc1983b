"""What share of a model a plan quantizes, and when that is doubtful."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli.plan.coverage import Coverage, coverage
from tests.plan import layouts
from tests.plan.layouts import Shapes, lay_out, plan
from tests.tiny import Header

LINEARS = 3 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 256 * 128)
TEXT = {"hidden_size": 128, "num_hidden_layers": 3}


def measure(shapes: Shapes, kind: str, scheme: str = "mxfp4", **overrides: Any) -> Coverage:
    layout = lay_out(shapes, kind, **TEXT)
    headers = {name: Header("BF16", shape) for name, shape in shapes.items()}
    return coverage(plan(scheme, layout, **overrides), layout, headers)


def other(path: str, blocks: int) -> Shapes:
    return {f"{path}.{block}.{leaf}.weight": (256, 128) for block in range(blocks) for leaf in ("fc1", "fc2")}


def test_language_vision_and_rest_are_counted_apart() -> None:
    shapes = layouts.llama() | other("vision_tower.blocks", 2) | {"multi_modal_projector.linear.weight": (128, 128)}
    for kind in ("llama", "novel"):
        found = measure(shapes, kind)
        assert found.quantized["language"] == found.linears == found.covered == LINEARS
        assert found.total["language"] == LINEARS + 2 * 300 * 128 + 3 * 128 + 128
        assert (found.total["vision"], found.quantized["vision"]) == (4 * 256 * 128, 0)
        assert (found.total["rest"], found.quantized["rest"]) == (128 * 128, 0)
        assert found.warning() is None
        assert found.text().startswith(f"language {LINEARS / found.total['language']:.0%} of ")


@pytest.mark.parametrize("overrides", [{"exclude": ["*mlp*"]}, {"exclude": ["*layers.1*", "*layers.2*"]}])
def test_what_a_flag_leaves_out_is_no_doubt(overrides: dict[str, Any]) -> None:
    for kind in ("llama", "novel"):
        found = measure(layouts.llama(), kind, **overrides)
        assert found.covered < found.linears / 2
        assert found.explained == found.linears - found.covered
        assert found.warning() is None


@pytest.mark.parametrize("extra", [6, 1])
def test_a_list_of_blocks_that_is_left_out_is_a_doubt(extra: int) -> None:
    """A described family on a file that holds more than the family knows, most of all an unnamed second stack."""
    found = measure(layouts.llama() | other("second.layers", extra), "llama")
    assert found.linears == LINEARS + extra * 2 * 256 * 128
    warning = found.warning()
    assert (warning is not None) == (found.covered < found.linears / 2)
    if warning is not None:
        assert f"only {found.covered / found.linears:.0%}" in warning


def test_experts_in_a_form_that_nobody_knows_are_a_doubt() -> None:
    shapes = layouts.llama() | {f"model.layers.{block}.mlp.experts.stack": (8, 256, 128) for block in range(3)}
    found = measure(shapes, "novel")
    assert found.covered == LINEARS and found.linears == LINEARS + 3 * 8 * 256 * 128
    assert found.warning() is not None
