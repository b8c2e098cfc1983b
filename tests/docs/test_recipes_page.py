"""Every YAML block of docs/recipes.md is a recipe that works, or is refused as it says.

The first line of a block may say: `# file: NAME` (kept for the blocks below), `# refused: TEXT`, `# before` and
`# after` (the same plan).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quarkcli.errors import ConfigError
from quarkcli.job import run as job
from quarkcli.job.options import Options
from quarkcli.plan.model import Plan
from quarkcli.recipe import recipe as recipes
from tests.docs.reference import PAGE
from tests.plan import layouts

GUIDE = PAGE.parent / "recipes.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
FILES = {block.split()[2]: block for block in BLOCKS if block.startswith("# file: ")}
REFUSED = [block for block in BLOCKS if block.startswith("# refused: ")]
PAIRS = [block for block in BLOCKS if block.startswith(("# before\n", "# after\n"))]
RECIPES = [block for block in BLOCKS if block not in [*FILES.values(), *REFUSED, *PAIRS]]


def planned(folder: Path, block: str) -> Plan:
    """The plan of a block: on the demo model, or on a mixture of experts where it speaks of experts."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    path = folder / "recipe.yaml"
    path.write_text(block)
    if ".experts." in block:
        return layouts.plan(recipes.from_file(path), layouts.MIXTRAL)
    return job.prepare(Options(model="demo", recipe=str(path), calib_data="builtin", output=folder / "out")).plan


def test_the_guide_has_examples() -> None:
    assert len(RECIPES) > 12 and len(REFUSED) > 1 and len(FILES) > 1
    assert len(PAIRS) == 4
    assert len(BLOCKS) == TEXT.count("```yaml")


@pytest.mark.parametrize("block", RECIPES, ids=range(len(RECIPES)))
def test_it_works(block: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, block)
    assert any(decision.spec for _, decision in plan.slots())
    assert not [warning for warning in plan.warnings if "recipe.yaml" in warning]  # all of it has an effect


@pytest.mark.parametrize("block", REFUSED, ids=range(len(REFUSED)))
def test_it_is_refused(block: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, block)
    assert block.splitlines()[0].removeprefix("# refused: ") in str(caught.value)
    assert str(tmp_path / "recipe.yaml:") in str(caught.value)


@pytest.mark.parametrize("index", range(0, len(PAIRS), 2))
def test_both_forms_say_the_same(index: int, tmp_path: Path) -> None:
    before, after = PAIRS[index : index + 2]
    assert before.startswith("# before") and after.startswith("# after")
    plans = [dict(planned(tmp_path, block).slots()) for block in (before, after)]
    assert [decision.spec for decision in plans[0].values()] == [decision.spec for decision in plans[1].values()]
    assert plans[0].keys() == plans[1].keys()


def test_a_chain_in_both_vocabularies_is_one_spec(tmp_path: Path) -> None:
    (block,) = [block for block in RECIPES if "then:" in block]
    slots = dict(planned(tmp_path, block).slots())
    first, second = (slots[f"model.layers.{index}.mlp.up_proj.weight_quantizer"].spec for index in (0, 1))
    assert first is not None and first == second


def test_what_replaces_and_what_switches(tmp_path: Path) -> None:
    (block,) = [block for block in RECIPES if "the group of 32 is gone" in block]
    slots = dict(planned(tmp_path, block).slots())
    sizes = {
        leaf: spec.group_size if (spec := slots[f"model.layers.{leaf}_proj.weight_quantizer"].spec) else "off"
        for leaf in ("1.mlp.down", "1.mlp.up", "0.mlp.down", "0.self_attn.o")
    }
    assert sizes == {"1.mlp.down": None, "1.mlp.up": 32, "0.mlp.down": "off", "0.self_attn.o": 32}
