"""The embedded Llama, quantized by the job and loaded by transformers with its own code."""

from __future__ import annotations

import pytest
import torch

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from tests import runs

from .loading import CACHE_SCALES, load, passed_over


@pytest.mark.parametrize("scheme", runs.SCHEMES)
def test_every_key_finds_its_place_and_its_value(scheme: str, demo: dict[str, runs.Made]) -> None:
    made = demo[scheme]
    reason = "asked for; loads in vLLM and transformers"
    caveat = "; transformers 5.24 with compressed-tensors 0.20 ignores the scales of the KV cache"
    assert made.report["dialect"]["reason"] == reason + caveat * (scheme in runs.CALIBRATED)
    model, wrong = load(made.folder, static=scheme in runs.CALIBRATED)
    assert wrong == {"missing": set(), "unexpected": passed_over(runs.read_all(made.folder)), "mismatched": set()}
    assert bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())  # the first pass decompresses
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    targets = [target.name for target in made.prepared.plan.quantized()]
    assert len(targets) == 28
    for name in targets:
        found = model.get_submodule(name).weight.float()
        torch.testing.assert_close(found, checkpoint.weight(name), rtol=2**-7, atol=0)  # bfloat16 in memory


@pytest.mark.parametrize(
    ("scheme", "promised"),
    [
        ("uint4_wo_128", "vLLM"),
        ("fp8_block128", "transformers"),  # vLLM: the 64 rows of this k projection are half a tile
        ("int8_dynamic", "vLLM and transformers"),
    ],
)
def test_zero_points_tiles_and_channels_find_their_place(
    scheme: str, promised: str, demo: dict[str, runs.Made]
) -> None:
    made = demo[scheme]
    targets = list(made.prepared.plan.quantized())
    assert made.report["dialect"]["reason"] == f"asked for; loads in {promised}"
    asymmetric = not all(target.weight.symmetric for target in targets)
    try:
        model, wrong = load(made.folder)
    except RuntimeError as error:  # why transformers is not promised; 5.22 loads it
        assert asymmetric and "mismatched" in str(error)
        model, wrong = load(made.folder, decoded=True)
    assert wrong == {"missing": set(), "unexpected": set(), "mismatched": set()}
    model(torch.arange(20)[None])  # the first pass decompresses
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    assert len(targets) == 28
    for target in targets:
        found = model.get_submodule(target.name).weight.float()
        torch.testing.assert_close(found, checkpoint.weight(target.name), rtol=2**-7, atol=0)


@pytest.mark.parametrize("scheme", sorted(runs.CALIBRATED))
def test_static_scales_arrive(scheme: str, demo: dict[str, runs.Made]) -> None:
    model, _ = load(demo[scheme].folder, dtype=torch.float32, static=True)
    tensors = runs.read_all(demo[scheme].folder)
    suffixes = ("input_scale", "input_global_scale", *CACHE_SCALES)
    static = {name: tensor for name, tensor in tensors.items() if name.endswith(suffixes)}
    assert len(static) == 28 + 2 * 4
    for name, tensor in static.items():
        if name in passed_over(static):
            continue
        module, _, attribute = name.rpartition(".")
        found = getattr(model.get_submodule(module), attribute).detach().reshape(1)
        torch.testing.assert_close(found.float(), tensor, rtol=2**-7, atol=0)


@pytest.mark.parametrize("scheme", runs.SCHEMES)
def test_one_input_and_one_tensor_scale_where_servers_fuse(scheme: str, demo: dict[str, runs.Made]) -> None:
    tensors = runs.read_all(demo[scheme].folder)
    names = [name for name in tensors if name.endswith(("input_scale", "global_scale"))]
    names += [name for name in tensors if name.endswith("weight_scale") and tensors[name].numel() == 1]
    assert bool(names) == (scheme in runs.CALIBRATED)
    for name in names:
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if f".{first}." in name:
                assert all(torch.equal(tensors[name], tensors[name.replace(first, other)]) for other in others), name
