"""Permutation and rotation on every family that transformers builds: the function stays, or a reason why not.

The reasons are those of `data/refusals.json`, which `test_algorithms.py` holds the product to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quarkcli.errors import ConfigError
from tests import runs
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


@pytest.mark.parametrize("name", NAMES)
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
        "mllama_text", "nemotron_h", "nemotron_h_latent", "deepseek_v4", "glm4", "starcoder2", "stablelm",
        "stablelm_parallel", "nemotron", "gpt_neox", "phimoe", "falcon", "falcon_new", "falcon_rw",
        "llava_next", "glm4v", "afmoe", "hyperclovax", "hyperclovax_vision_v2",
    }  # fmt: skip


def with_more_layer(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a tiny DeepSeek V3 with a layer behind the last block that predicts one token more."""
    models.build("deepseek_v3", folder)
    tensors = runs.read_all(folder)
    blocks = models.RECIPES["deepseek_v3"]["config"]["num_hidden_layers"]
    last, more = f"model.layers.{blocks - 1}.", f"model.layers.{blocks}."
    tensors |= {more + name.removeprefix(last): t + 0.5 for name, t in tensors.items() if name.startswith(last)}
    embedding = tensors["model.embed_tokens.weight"]
    width = embedding.shape[1]
    extra = {"enorm": (width,), "hnorm": (width,), "eh_proj": (width, 2 * width), "shared_head.norm": (width,)}
    extra |= {"embed_tokens": embedding.shape, "shared_head.head": embedding.shape}
    generator = torch.Generator().manual_seed(4)
    tensors |= {f"{more}{leaf}.weight": torch.randn(s, generator=generator).bfloat16() for leaf, s in extra.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(more)}


def test_a_layer_that_predicts_more_tokens_follows(tmp_path: Path) -> None:
    """transformers does not run it: every tensor against where its channels have to be."""
    added = with_more_layer(tmp_path / "m")
    source = turning.source_tensors(tmp_path / "m")
    after, _ = turning.turned(tmp_path / "m", [("permutation", {"inner": False, "values": False})], source)
    embedding = "model.embed_tokens.weight"
    order = [int((source[embedding] == column[:, None]).all(0).nonzero()) for column in after[embedding].T]
    width = len(order)
    both = [*order, *(width + channel for channel in order)]
    inner = {"q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj", "e_score_correction_bias"}
    for name in added:
        wanted, leaf = source[name], name.removesuffix(".weight").rpartition(".")[2]
        if leaf in {"o_proj", "down_proj", "eh_proj"}:
            wanted = wanted[order]
        if leaf == "eh_proj":
            wanted = wanted[:, both]
        elif leaf not in {"o_proj", "down_proj"} and not inner & set(name.split(".")):
            wanted = wanted[..., order]
        assert torch.equal(after[name], wanted), name
    with pytest.raises(
        ConfigError, match="no linear layer is known that could take over this norm or vector"
    ) as caught:
        turning.checked(turning.planned(tmp_path / "m"), [("rotation", {})])
    assert caught.value.where in added
