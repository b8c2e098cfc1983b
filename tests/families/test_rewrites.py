"""What family files say about activations, tried out on transformers' own blocks in float32.

Sites: what is said to read one activation is given the same tensor. Scaling pairs and rotations: a block rewritten as
the file says computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quarkcli.family import FamilyModel, Layout, ScalingModel
from tests import runs
from tests.families import models
from tests.families.test_all_families import ELSEWHERE

NAMES = tuple(models.RECIPES)
Tensors = dict[str, Tensor]


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
        with runner.handlers(index, linear={tensor: tap(tensor) for tensor in own}):
            runner.run_block(index, recording, hidden)
    for site in sites:
        # Of two tensors that memory holds as one, only the first is seen.
        inputs = {member: seen[file_of[member]] for member in site.members if file_of[member] in seen}
        assert inputs, site.name
        first = next(iter(inputs.values()))
        for member, x in inputs.items():
            assert torch.equal(x, first), member
            assert x.shape[-1] == layout.weights[member].shape[1], member


# ---- scaling


def matching(layout: Layout, block: str, pattern: str) -> list[str]:
    return [name for name in layout.weights if fnmatchcase(name, f"{block}.{pattern}")]


def scale_block(found: FamilyModel, layout: Layout, block: str, pair: ScalingModel, tensors: Tensors) -> Tensors | None:
    """The tensors of a block scaled by one pair, in float32; None where the block has no such linears."""
    changed = {name: tensors[name].float().clone() for name in block_tensors(tensors, block)}
    readers = [name for pattern in pair.readers for name in matching(layout, block, pattern)]
    norm = changed.get(f"{block}.{pair.source}.weight")
    generator = torch.Generator().manual_seed(1)

    def factors(count: int) -> Tensor:
        return torch.rand(count, generator=generator) + 0.5

    if norm is not None and norm.ndim == 1:
        if not readers:
            return None
        scale = factors(len(norm))
        norm.copy_((norm + found.norm_offset) * scale - found.norm_offset)
        bias = changed.get(f"{block}.{pair.source}.bias")
        if bias is not None:
            bias.mul_(scale)
        for reader in readers:
            view = layout.weights[reader].view
            view.of(changed[view.tensor]).div_(scale)
        return changed
    sources = matching(layout, block, pair.source)
    for source in sources:  # an expert's rows are read by the same expert
        weight = layout.weights[source]
        scale = factors(weight.shape[0])
        weight.view.of(changed[weight.view.tensor]).mul_(scale[:, None])
        if weight.bias:
            changed[weight.bias].mul_(scale)
        for reader in (r for r in readers if layout.weights[r].expert == weight.expert):
            other = layout.weights[reader]
            other.view.of(changed[other.view.tensor]).div_(spread(scale, other.shape[1], layout, block))
    return changed if sources and readers else None


def spread(scale: Tensor, width: int, layout: Layout, block: str) -> Tensor:
    """Scales of value channels, repeated for every head that reads the same values."""
    if len(scale) == width:
        return scale
    head = 32 if len(scale) % 32 == 0 else 16
    return scale.view(-1, 1, head).expand(-1, width // len(scale), -1).reshape(-1)


@pytest.mark.parametrize("name", NAMES)
def test_scaling_pairs_do_not_change_a_block(name: str, built: dict[str, Path]) -> None:
    found, layout = models.described(built[name])
    tensors = runs.read_all(built[name])
    used: set[int] = set()
    for runner, index, recording, hidden, output in models.walk(built[name], tensors):
        block = f"{found.blocks}.{index}"
        for number, pair in enumerate(found.scaling):
            changed = scale_block(found, layout, block, pair, tensors)
            if changed is None:
                continue
            used.add(number)
            runner.load_block(index, changed)
            again = runner.run_block(index, recording, hidden)
            assert close(again, output), (block, pair)
        runner.load_block(index, {key: tensors[key] for key in block_tensors(tensors, block)})
    if len([other for other in NAMES if models.RECIPES[other]["file"] == models.RECIPES[name]["file"]]) == 1:
        assert {pair.source for number, pair in enumerate(found.scaling) if number not in used} <= set(ELSEWHERE)


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) < 1e-4 * float(other.abs().max())


# ---- rotation


def rotate_block(found: FamilyModel, layout: Layout, block: str, q: Tensor, tensors: Tensors) -> Tensors:
    """The block for hidden states x q: norms folded into the linears that read them, all of them rotated."""
    assert found.rotation is not None
    changed = {name: tensors[name].float().clone() for name in block_tensors(tensors, block)}
    reads = [name for pattern in found.rotation.reads for name in matching(layout, block, pattern)]
    writes = [name for pattern in found.rotation.writes for name in matching(layout, block, pattern)]
    for pair in found.scaling:
        norm = changed.get(f"{block}.{pair.source}.weight")
        readers = [name for pattern in pair.readers for name in matching(layout, block, pattern)]
        if norm is not None and norm.ndim == 1 and set(readers) & set(reads):
            for reader in readers:
                view = layout.weights[reader].view
                view.of(changed[view.tensor]).mul_(norm)
            norm.fill_(1.0)
    for name in reads:
        view = layout.weights[name].view
        weight = view.of(changed[view.tensor])
        weight.copy_(weight @ q)
    for name in writes:
        weight = layout.weights[name].view.of(changed[layout.weights[name].view.tensor])
        weight.copy_(q.T @ weight)
        bias = layout.weights[name].bias or re.sub(r"\.\d+\.down_proj$", ".down_proj_bias", name)
        if bias in changed and layout.weights[name].expert in (None, (name.rsplit(".", 2)[0], 0)):
            changed[bias].copy_(changed[bias] @ q)
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_a_rotated_block_rotates_its_output(name: str, built: dict[str, Path]) -> None:
    found, layout = models.described(built[name])
    if found.rotation is None:
        return
    tensors = runs.read_all(built[name])
    for runner, index, recording, hidden, output in models.walk(built[name], tensors):
        block = f"{found.blocks}.{index}"
        q, _ = torch.linalg.qr(
            torch.randn(hidden.shape[-1], hidden.shape[-1], generator=torch.Generator().manual_seed(2))
        )
        runner.load_block(index, rotate_block(found, layout, block, q, tensors))
        again = runner.run_block(index, recording, hidden @ q)
        assert close(again, output @ q), block
        runner.load_block(index, {key: tensors[key] for key in block_tensors(tensors, block)})
        runner.run_block(index, recording, hidden)  # what later blocks read of this one
