"""mxfp4: experts of gpt-oss, against transformers' own decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quarkcli import dialects
from quarkcli.dialects import mxfp4
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.disk.verify import directory
from quarkcli.errors import ConfigError, ModelError
from quarkcli.job import convert
from tests import runs
from tests.dialects.plans import INT8_CHANNEL, MXFP4, moe, plan
from tests.dialects.test_every_scheme import gpt_oss
from tests.dialects.test_roundtrip import Header
from tests.golden import sources

EXPERTS_ALONE = {"scheme": "mxfp4_weight_only", "exclude": ("*self_attn*",)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.build("fused", tmp_path_factory.mktemp("model") / "source", 4096)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Made:
    return runs.run(source, tmp_path_factory.mktemp("made") / "out", dialect="mxfp4", **EXPERTS_ALONE)


def test_the_files_are_those_of_gpt_oss(source: Path, made: runs.Made) -> None:
    tensors, before = runs.read_all(made.folder), runs.read_all(source)
    prefix = "model.layers.0.mlp.experts."
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)}
    assert shapes == {
        "gate_up_proj_blocks": (2, 512, 4, 16), "gate_up_proj_scales": (2, 512, 4), "gate_up_proj_bias": (2, 512),
        "down_proj_blocks": (2, 128, 8, 16), "down_proj_scales": (2, 128, 8), "down_proj_bias": (2, 128),
    }  # fmt: skip
    rest = {name for name in before if not name.endswith(("gate_up_proj", "down_proj"))}
    assert all(runs.same_bytes(tensors[name], before[name]) for name in rest)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    assert {"lm_head", "model.embed_tokens", "model.layers.*.mlp.router"} <= set(config["modules_to_not_convert"])
    assert directory(str(made.folder), source=str(source))


def test_decoded_as_transformers_decodes_it(made: runs.Made) -> None:
    """Random bytes in place of codes and scales: every bit of every value."""
    tensors = runs.read_all(made.folder)
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    generator = torch.Generator().manual_seed(0)
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks = torch.randint(0, 256, tensors[f"{name}_blocks"].shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(1, 250, tensors[f"{name}_scales"].shape, generator=generator, dtype=torch.uint8)
        for codes, powers in ((tensors[f"{name}_blocks"], tensors[f"{name}_scales"]), (blocks, scales)):
            # By the tensors that it holds, in place of the file's.
            checkpoint._held = {f"{name}_blocks": codes, f"{name}_scales": powers}
            found = checkpoint.read_many([name], torch.bfloat16)[name]
            wanted = convert_moe_packed_tensors(codes.clone(), powers.clone())
            assert found.shape == wanted.shape and torch.equal(found.view(torch.int16), wanted.view(torch.int16)), name


def test_the_same_values_as_another_dialect_and_back(source: Path, made: runs.Made, tmp_path: Path) -> None:
    other = runs.run(source, tmp_path / "other", dialect="quark", **EXPERTS_ALONE)
    convert.convert(Source.open(str(other.folder)), "mxfp4", tmp_path / "converted")
    ours, theirs = runs.read_all(made.folder), runs.read_all(tmp_path / "converted")
    assert set(ours) == set(theirs) and all(runs.same_bytes(ours[name], theirs[name]) for name in ours)


def test_calibrated_and_continued_it_is_the_same(source: Path, tmp_path: Path) -> None:
    given = {
        **EXPERTS_ALONE,
        "dialect": "mxfp4",
        "algorithm": "gptq",
        **runs.data(runs.text_file(tmp_path / "text.txt"), 4),
    }
    whole = runs.run(source, tmp_path / "whole", **given)
    runs.killed(2, lambda: runs.run(source, tmp_path / "out", **given))
    again = runs.run(source, tmp_path / "out", **{**given, "resume": "auto"})
    assert runs.same_files(whole.folder, again.folder)


def test_only_such_experts_are_held() -> None:
    assert mxfp4.WRITER.refusals(gpt_oss((MXFP4, None))) == []
    assert mxfp4.WRITER.loaders(gpt_oss((MXFP4, None))) == {"vllm", "transformers"}
    assert "mxfp4 cannot hold weight int8" in mxfp4.WRITER.refusals(gpt_oss((INT8_CHANNEL, None)))[0]
    apart = plan(moe(), lambda m: (MXFP4, None) if m.expert else None)
    assert mxfp4.WRITER.refusals(apart) == [
        "model.layers.0.mlp.experts.0.gate_proj (and 23 more): "
        "mxfp4 holds only experts stored as in gpt-oss: one tensor for all, rows of gate and up in turn"
    ]
    left = gpt_oss((MXFP4, None))
    some = plan_without(left, "model.layers.0.mlp.experts.1.down_proj")
    assert mxfp4.WRITER.refusals(some) == [
        "model.layers.0.mlp.experts.1.down_proj: mxfp4 has one scheme for all experts, and this one is not quantized"
    ]
    with pytest.raises(ConfigError, match="checkpoint format mxfp4 cannot hold this plan"):
        dialects.choose("mxfp4", some)


def plan_without(made, name):
    target = made.targets[name]
    slots = {kind: type(decision)(None, 0) for kind, decision in target.slots.items()}
    return type(made)(**{**vars(made), "targets": {**made.targets, name: type(target).of(target, slots, None)}})


def test_what_is_not_read() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"quant_method": "mxfp4"}
    good = {f"{name}_blocks": Header("U8", (2, 64, 4, 16)), f"{name}_scales": Header("U8", (2, 64, 4))}
    assert len(mxfp4.READER.view(config, good).targets) == 4
    with pytest.raises(ModelError, match="gate_up_proj_scales"):
        mxfp4.READER.view(config, {f"{name}_blocks": good[f"{name}_blocks"]})
    with pytest.raises(ModelError, match=r"_scales: found U8 \[2, 64, 8\]"):
        mxfp4.READER.view(config, {**good, f"{name}_scales": Header("U8", (2, 64, 8))})
    with pytest.raises(ModelError, match="are not those of gpt-oss' experts"):
        mxfp4.READER.view(config, {**good, "x.other_blocks": Header("U8", (2, 64, 4, 16))})
