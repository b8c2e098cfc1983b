"""Mixtures of experts: with transformers where it has a place for them, with compressed-tensors alone elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from tests import runs

from .loading import decompress, load

Runs = dict[tuple[str, str], runs.Made]
LOADED = [(family, scheme) for family in ("qwen3_moe", "mixtral") for scheme in ("mxfp4", "int4_wo_128", "fp8")]
DECODED = [(family, "nvfp4") for family in ("qwen3_moe", "mixtral")] + [("gpt_oss", s) for s in runs.SCHEMES]
# Relative Frobenius error of normal weights, a little above what rounding to each format's grid costs.
ERRORS = {"nvfp4": 0.11, "fp8": 0.03, "mxfp4": 0.135, "int4_wo_128": 0.13}


def in_memory(model: Any, made: runs.Made, name: str) -> torch.Tensor:
    """The weight of a module; transformers holds experts fused, gate above up."""
    target = made.prepared.plan.targets[name]
    if target.expert is None:
        return model.get_submodule(name).weight.float()
    experts = model.get_submodule(target.expert[0].replace("block_sparse_moe", "mlp"))
    if target.role == "expert_down":
        return experts.down_proj[target.expert[1]].float()
    return experts.gate_up_proj[target.expert[1]].chunk(2)[target.role == "expert_up"].float()


@pytest.mark.parametrize(("family", "scheme"), LOADED)
def test_transformers_loads_every_weight(family: str, scheme: str, experts: Runs) -> None:
    made = experts[family, scheme]
    model, wrong = load(made.folder, static=scheme == "fp8")
    assert wrong["missing"] == wrong["mismatched"] == set()
    # transformers has no place for the static input scale of an expert.
    lost = {
        f"{target.name}.input_scale".replace("block_sparse_moe", "mlp")
        for target in made.prepared.plan.quantized()
        if target.expert and scheme == "fp8"
    }
    assert wrong["unexpected"] == lost
    assert len(lost) == (24 if scheme == "fp8" else 0)
    model(torch.arange(20)[None])  # the first pass decompresses
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    for target in made.prepared.plan.quantized():
        found = in_memory(model, made, target.name)
        torch.testing.assert_close(found, checkpoint.weight(target.name), rtol=2**-7, atol=0)


@pytest.mark.parametrize(("family", "scheme"), LOADED)
def test_transformers_is_promised_only_where_it_loads_all(family: str, scheme: str, experts: Runs) -> None:
    made = experts[family, scheme]
    assert made.report["dialect"]["name"] == "compressed-tensors"
    promised = "vLLM only" if scheme == "fp8" else "vLLM and transformers"
    assert made.report["dialect"]["reason"] == f"auto: loads in {promised}"


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_nobody_is_promised_a_quantized_router(dialect: str, experts: Runs, tmp_path: Path) -> None:
    """transformers holds it as a bare parameter: its weight would be missing, and be made up."""
    source = experts["qwen3_moe", "mxfp4"].source
    made = runs.run(source, tmp_path / "out", scheme="mxfp4", unprotect=["router"], dialect=dialect)
    assert made.report["dialect"]["reason"] == "asked for; no server loads it; for measurements only"
    if dialect == "compressed-tensors":
        routers = {f"model.layers.{index}.mlp.gate.weight" for index in range(2)}
        assert load(made.folder)[1]["missing"] == routers


@pytest.mark.parametrize(("family", "scheme"), DECODED)
def test_the_library_decodes_every_tensor(family: str, scheme: str, experts: Runs) -> None:
    made = experts[family, scheme]
    nobody = family == "gpt_oss"  # its class in vLLM wants names of its own
    reason = "no server loads it; for measurements only" if nobody else "loads in vLLM only"
    assert made.report["dialect"] == {"name": "compressed-tensors", "reason": f"auto: {reason}"}
    decoded = decompress(made.folder, runs.read_all(made.folder))
    targets = list(made.prepared.plan.quantized())
    assert set(decoded) == {target.name for target in targets}
    assert len(targets) == 2 * (4 + 4 * 3)
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    source = runs.read_all(made.source)
    # The library expands fp4 in bfloat16, which is exact only under scales that are powers of two.
    rounding = 2**-7 if scheme == "nvfp4" else 0
    for target in targets:
        torch.testing.assert_close(decoded[target.name], checkpoint.weight(target.name), rtol=rounding, atol=0)
        weight = of_file(source, family, target.name).float()
        assert float((decoded[target.name] - weight).norm() / weight.norm()) < ERRORS[scheme], target.name


def of_file(source: dict[str, torch.Tensor], family: str, name: str) -> torch.Tensor:
    """The source weight [out, in] by the published file's own layout, told here independently of the family file."""
    if f"{name}.weight" in source:
        return source[f"{name}.weight"]
    assert family == "gpt_oss"
    prefix, _, rest = name.partition(".experts.")
    index, _, leaf = rest.partition(".")
    if leaf == "down_proj":
        return source[f"{prefix}.experts.down_proj"][int(index)].T
    both = source[f"{prefix}.experts.gate_up_proj"][int(index)].T
    return both[0::2] if leaf == "gate_proj" else both[1::2]
