"""--tp: what servers could not split is refused before the work, in words that name it."""

from __future__ import annotations

import pytest

from quarkcli.disk import verify
from quarkcli.errors import CheckError, ModelError
from quarkcli.recipe import recipe as recipes
from tests import runs


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Down projections of 768 inputs: six groups of 128, which four devices would cut."""
    return runs.build("llama", tmp_path_factory.mktemp("narrow") / "model", intermediate_size=768, head_dim=128)


def test_groups_that_would_be_cut(narrow, tmp_path):
    flags = {"scheme": "int4_wo_128", "output": tmp_path / "out"}
    with pytest.raises(ModelError, match="cut scale groups of 128") as refused:
        runs.prepare(narrow, tp=4, **flags)
    assert refused.value.where == "--tp" and "down_proj" in refused.value.what
    assert "tensor parallel over" in refused.value.what
    assert runs.prepare(narrow, tp=2, **flags).tensor_parallel == [1, 2]
    assert runs.prepare(narrow, tp=4, exclude=["*down_proj"], **flags).tensor_parallel == [1, 2, 4]


def test_one_device_splits_nothing(narrow):
    """Also where the last group of a row is shorter."""
    pad = runs.prepare(narrow, recipe=_in_groups_of(96 * 5), on_indivisible="pad")
    assert pad.tensor_parallel == [1]


def _in_groups_of(size):
    cfg = {"element": "int4", "granularity": {"group": size}}
    entries = [{"quantizer_path": "*", "enable": False}, {"quantizer_path": "*down_proj.weight_quantizer", "cfg": cfg}]
    return recipes.from_config({"schema": "quark/recipe/1", "quantize": {"quant_cfg": entries}}, "own")


def test_heads_under_another_name_are_counted(tmp_path):
    """GPT-J has `n_head`: 3 heads, which two devices cannot share out, though they could halve each linear."""
    source = runs.build("gptj", tmp_path / "model", n_embd=96, n_head=3)
    with pytest.raises(ModelError, match=r"config\.json: 3 attention heads cannot be divided evenly"):
        runs.prepare(source, scheme="ptpc_fp8", tp=2, output=tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("scheme", ["int4_wo_128", "mxfp4", "fp8_block128"])
def test_the_plan_says_what_verify_says(tmp_path, family, scheme):
    source = runs.build(family, tmp_path / "source")
    prepared = runs.prepare(source, scheme=scheme, target="none")
    made = runs.run(source, tmp_path / "out", scheme=scheme, target="none").folder
    for degree in (1, 2, 4, 8):
        asked = verify.Asked(target="none", tensor_parallel=(degree,))
        if degree in prepared.tensor_parallel:
            verify.check(str(made), asked)
            continue
        with pytest.raises(CheckError, match=f"tensor parallel over {degree} devices"):
            verify.check(str(made), asked)
