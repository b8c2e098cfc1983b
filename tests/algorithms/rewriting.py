"""Transforms applied to the blocks of a tiny model in source precision, without a quantized byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from quarkcli.algorithms.base import Transform
from quarkcli.forward.moments import held_out, holds_out
from quarkcli.forward.statistics import Statistics
from quarkcli.forward.walk import Walk
from quarkcli.job import run as job
from quarkcli.job.rewriting import Rewriting
from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from tests import runs

ROWS = torch.randint(3, 256, (32, 64), generator=torch.Generator().manual_seed(0))


def build(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny model in float32 whose norms have outliers, and whose biases are not zero."""
    source = runs.build(family, folder, torch.float32, **changes)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 1 and "norm" in name and name.endswith(".weight"):
            tensor *= 0.5 + torch.rand(tensor.shape, generator=generator)
            tensor[torch.randperm(len(tensor), generator=generator)[:3]] += 8.0
        elif ".layers." in name and "bias" in name:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def rewritten(prepared: job.Prepared, rows: torch.Tensor = ROWS, batch: int = 4) -> tuple[dict[str, Any], Any]:
    """Every tensor of the source after the plan's transforms, and what they noted by part."""
    plan, source = prepared.plan, prepared.source
    runner = Runner(source.folder, source.headers)
    held = held_out(*rows.shape) if holds_out(prepared.needs) else None
    outside = lambda: source.read_many(runner.outside_tensors())  # noqa: E731
    walk = Walk(runner, outside, rows, None, batch, lambda event: None, held=held)
    walk.start()
    tensors, notes = dict(source.read_many(list(source.headers))), {}
    transforms = [(step, step.algorithm) for step in prepared.steps if isinstance(step.algorithm, Transform)]
    for part in plan.parts:
        if part.block is None:
            continue
        own = {name: tensors[name].clone() for name in part.tensors}
        runner.load_block(part.block, own)
        new = lambda index=part.index: Statistics(plan, index, prepared.needs, runner)  # noqa: E731
        statistics, _ = walk.observe(part.block, new)
        rewriting = Rewriting(plan, part, own, transforms, {}, source)
        for step, transform in transforms:
            if rewriting.after(step, transform, statistics):
                runner.load_block(part.block, own)
                statistics, _ = walk.observe(part.block, new)
        notes[part.name] = rewriting.notes
        tensors.update(own)
        walk.advance(part.block, Handlers())
        runner.unload_block(part.block)
    return tensors, notes


def logits(source: Path, tensors: dict[str, torch.Tensor] | None, folder: Path) -> torch.Tensor:
    """What transformers computes with a source, or with these tensors in its place."""
    if tensors is not None:
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                folder.mkdir(exist_ok=True)
                (folder / file.name).write_bytes(file.read_bytes())
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        source = folder
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(ROWS[:4]).logits
    return found
