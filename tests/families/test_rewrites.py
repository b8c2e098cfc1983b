"""What family files say about activations, tried out on transformers' own blocks in float32.

Sites: what is said to read one activation is given the same tensor. Scaling pairs and rotations: a block rewritten as
the file says computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quarkcli.algorithms.tensors import PartTensors
from quarkcli.errors import ConfigError
from quarkcli.family import Pair, known
from quarkcli.model.handlers import Handlers
from quarkcli.plan.model import Plan
from quarkcli.recipe.match import starred
from tests import runs
from tests.families import models
from tests.families.test_all_families import ELSEWHERE

NAMES = tuple(models.RECIPES)
Tensors = dict[str, Tensor]
# Linears that the class never calls: it takes their weight and bias.
UNCALLED = {"jamba": {"model.layers.0.mamba.dt_proj.input"}}


def block_tensors(tensors: Tensors, block: str) -> list[str]:
    return [name for name in tensors if name.startswith(block + ".")]


@pytest.mark.parametrize("name", NAMES)
def test_sites_read_one_tensor(name: str, built: dict[str, Path]) -> None:
    _, layout = models.described(built[name])
    tensors = runs.read_all(built[name])
    sites = [
        site for site in layout.sites.values() if site.kind == "linear" and layout.parts[site.part].kind == "block"
    ]
    file_of = {member: layout.weights[member].view.tensor for site in sites for member in site.members}
    seen: Tensors = {}

    def tap(tensor: str) -> Callable[[Tensor], None]:
        return lambda x: seen.update({tensor: x})

    for runner, index, recording, hidden, _ in models.walk(built[name], tensors):
        own = [file_of[member] for site in sites if site.part == index + 1 for member in site.members]
        with runner.handlers(index, Handlers(linear={tensor: tap(tensor) for tensor in own})):
            runner.run_block(index, recording, hidden)
    for site in sites:
        if site.name in UNCALLED.get(name, ()):
            assert not seen.keys() & {file_of[member] for member in site.members}
            continue
        # Of two tensors that memory holds as one, only the first is seen.
        inputs = {member: seen[file_of[member]] for member in site.members if file_of[member] in seen}
        assert inputs, site.name
        first = next(iter(inputs.values()))
        for member, x in inputs.items():
            assert torch.equal(x, first), member
            assert x.shape[-1] == layout.weights[member].shape[1], member


# ---- scaling


def part_of(source: Path, tensors: Tensors, index: int) -> tuple[PartTensors, Tensors]:
    """The tensors of a block in float32, as a transform sees them."""
    plan = plans(source)
    part = next(part for part in plan.parts if part.block == index)
    own = {name: tensors[name].float() for name in part.tensors}
    return PartTensors(plan, part, own), own


@cache
def plans(source: Path) -> Plan:
    return runs.prepare(source, scheme="int8_dynamic", target="none").plan


@pytest.mark.parametrize("name", NAMES)
def test_scaling_pairs_do_not_change_a_block(name: str, built: dict[str, Path]) -> None:
    found, _ = models.described(built[name])
    tensors = runs.read_all(built[name])
    used: set[str] = set()
    generator = torch.Generator().manual_seed(1)
    for runner, index, recording, hidden, output in models.walk(built[name], tensors):
        block = f"{found.blocks}.{index}"
        rules: dict[str, list[Pair]] = {}
        for pair in part_of(built[name], tensors, index)[0].pairs:
            rules.setdefault(starred(pair.source.removeprefix(f"{block}.")), []).append(pair)
        for rule, pairs in rules.items():  # all experts at once
            part, own = part_of(built[name], tensors, index)
            for pair in pairs:
                width = len(part.columns(pair.source)) if not pair.norm else part.read(f"{pair.source}.weight").numel()
                part.scale(pair, torch.rand(width, generator=generator) + 0.5)
            changed = part.commit()
            assert changed
            runner.load_block(index, own)
            assert close(runner.run_block(index, recording, hidden), output), (block, rule)
            used.add(rule)
        runner.load_block(index, {key: tensors[key] for key in block_tensors(tensors, block)})
    if len([other for other in NAMES if models.RECIPES[other]["file"] == models.RECIPES[name]["file"]]) == 1:
        assert {pair.source for pair in found.scaling} - used <= set(ELSEWHERE)


@pytest.mark.parametrize(
    ("name", "config", "lost"),
    [
        ("opt", {"activation_function": "gelu"}, "fc1"),
        ("olmoe", {"clip_qkv": 0.1}, "self_attn.v_proj"),
        ("step3p7", {"swiglu_limits_shared": [0.05, 0.05]}, "mlp.up_proj"),
    ],
)
def test_a_config_under_which_a_pair_would_change_the_block(
    name: str, config: dict[str, object], lost: str, tmp_path: Path
) -> None:
    source = models.build(name, tmp_path / name, **config)
    tensors = runs.read_all(source)
    runner, index, recording, hidden, output = next(models.walk(source, tensors))
    part, own = part_of(source, tensors, index)
    assert part.pairs and not any(pair.source.endswith(lost) for pair in part.pairs)
    for pair in part.pairs:
        width = len(part.columns(pair.source)) if not pair.norm else part.read(f"{pair.source}.weight").numel()
        part.scale(pair, torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.5)
    assert part.commit()
    runner.load_block(index, own)
    assert close(runner.run_block(index, recording, hidden), output)


@pytest.mark.parametrize("behind", [None, False, True])
def test_a_residual_stream_that_goes_on_from_behind_the_norm(behind: bool | None) -> None:
    """ChatGLM, which transformers has no class for: nothing is scaled or rotated before the norms then."""
    config = {"architectures": ["ChatGLMModel"], "model_type": "chatglm"}
    config |= {"apply_residual_connection_post_layernorm": behind} if behind is not None else {}
    identified = known.identify(config)
    assert identified is not None
    found = identified[1].suited(config)
    assert bool(found.scaling) == (not behind)
    assert found.residual is not None
    assert found.residual.no_rotation == (
        "config.json has apply_residual_connection_post_layernorm: True" if behind else None
    )


def test_a_key_that_must_be_there_and_is_not() -> None:
    identified = known.identify({"architectures": ["OlmoeForCausalLM"]})
    assert identified is not None
    heads = identified[1].heads
    assert heads is not None
    family = identified[1].model_copy(update={"heads": heads.model_copy(update={"only": {"other": [True]}})})
    found = family.suited({}).heads
    assert found is not None and found.no_rotation == "config.json has other: None"


def test_clipped_values_are_not_rotated(tmp_path: Path) -> None:
    source = models.build("olmoe", tmp_path / "olmoe", clip_qkv=0.1)
    with pytest.raises(ConfigError, match=r"config\.json has clip_qkv: 0\.1"):
        runs.prepare(source, scheme="int8_dynamic", algorithm="rotation", settings=["rotation.r2=true"], target="none")


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) < 1e-4 * float(other.abs().max())


# ---- rotation


@pytest.mark.parametrize("name", [name for name in NAMES if models.can_rotate(name)])
def test_a_rotated_block_rotates_its_output(name: str, built: dict[str, Path]) -> None:
    tensors = runs.read_all(built[name])
    for runner, index, recording, hidden, output in models.walk(built[name], tensors):
        generator = torch.Generator().manual_seed(2)
        q, _ = torch.linalg.qr(torch.randn(hidden.shape[-1], hidden.shape[-1], generator=generator))
        part, own = part_of(built[name], tensors, index)
        part.fold_norms()
        part.rotate(partial(torch.matmul, other=q))
        part.commit()
        runner.load_block(index, own)
        again = runner.run_block(index, recording, hidden @ q)
        assert close(again, output @ q), index
        runner.load_block(index, {key: tensors[key] for key in part.names})
        runner.run_block(index, recording, hidden)  # what later blocks read of this one
