"""The size of scales over the scales of blocks: an inverse is told from a weight with one huge value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.disk import completeness, verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError
from tests import runs
from tests.families import models


def test_inverted_scales_are_refused(tmp_path: Path) -> None:
    """compressed-tensors stores divisors: written as multipliers, all are far too large."""
    folder = runs.run("demo", tmp_path / "out", scheme="nvfp4_weight_only").folder
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        inverted = {name: 1 / tensors[name] for name in tensors if name.endswith("weight_global_scale")}
        save_file({**tensors, **inverted}, file, metadata={"format": "pt"})
    with pytest.raises(CheckError, match=r"it makes values of .*: is it the inverse"):
        verify.scales(Checkpoint(Source.open(folder)))


@pytest.mark.parametrize(("value", "dtype"), [(11_000.0, torch.bfloat16), (3e37, torch.float32)])
def test_a_huge_weight_is_written_and_said(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    source = shutil.copytree(EMBEDDED, tmp_path / "m")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[f"{name}.weight"][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = runs.run(source, tmp_path / "out", scheme="nvfp4_weight_only")
    said: list[Any] = []
    verify.scales(Checkpoint(Source.open(made.folder)), tell=said.append)
    assert [
        event.text for event in said if "1 scales are larger than usual: " + name[:-7] in getattr(event, "text", "")
    ]
    decoded = Checkpoint(Source.open(made.folder)).weight(name)
    assert float(decoded[3, 5]) == pytest.approx(value, rel=0.04)


def test_a_size_that_config_does_not_say_is_named(tmp_path: Path) -> None:
    source = shutil.copytree(EMBEDDED, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    for key, also in (("num_hidden_layers", {}), ("hidden_size", {"num_hidden_layers": 4})):
        less = {name: value for name, value in (config | also).items() if name != key}
        (source / "config.json").write_text(json.dumps(less))
        line = completeness.model(Checkpoint(Source.open(source)))
        assert line.endswith(f"; it does not say {key}, so that a server takes what the model's class has")
    (source / "config.json").write_text(json.dumps(config))
    assert completeness.model(Checkpoint(Source.open(source))).endswith("fit config.json and each other")


@pytest.mark.parametrize("adjusted", [True, False, None])
def test_a_width_that_the_model_class_adjusts_is_no_damage(adjusted: bool | None, tmp_path: Path) -> None:
    """LFM2 makes its MLP two thirds as wide as config.json says, unless that says otherwise; so does a missing key."""
    source = models.build("lfm2", tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    key = "block_auto_adjust_ff_dim"
    config = {**config, key: adjusted} if adjusted is not None else {k: v for k, v in config.items() if k != key}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(Source.open(source))
    if adjusted is not False:
        assert completeness.model(checkpoint).endswith("and each other")
        return
    with pytest.raises(CheckError, match="weights have another width than config"):
        completeness.model(checkpoint)
