"""Transforms that turn channels, applied to every part of a tiny model in float32, without a quantized byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarkcli import algorithms
from quarkcli.algorithms.base import Assignment, Transform
from quarkcli.family import HeaderLike
from quarkcli.job.rewriting import Rewriting
from quarkcli.model.runner import Runner
from quarkcli.numerics.sample import Sample
from quarkcli.plan.model import Plan
from tests import runs
from tests.families import models

TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
Steps = list[tuple[str, dict[str, Any]]]


class Seen:
    """Stands for statistics: channels of random sizes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.generator = torch.Generator().manual_seed(5)

    def samples(self, site: str, expert: int | None = None, held: bool = False) -> Sample:
        return Sample.alike(torch.randn(3, self._width(site), generator=self.generator))

    def channel_amax(self, site: str, expert: int | None = None) -> Tensor:
        return torch.rand(self._width(site), generator=self.generator)

    def mean_abs(self, site: str, expert: int | None = None) -> Tensor:
        return self.channel_amax(site, expert)

    def _width(self, site: str) -> int:
        return self.plan.targets[self.plan.sites[site].members[0]].shape[1]


class Weights:
    """Tensors in memory as a source of weights."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.headers: Mapping[str, HeaderLike] = models.headers(tensors)

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name].clone() for name in names}


def source_tensors(source: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in runs.read_all(source).items()}


@cache
def planned(source: Path) -> Plan:
    return runs.prepare(source, scheme="nvfp4_weight_only", target="none").plan


def checked(plan: Plan, steps: Steps) -> list[Assignment]:
    """The steps. Raises ConfigError where one refuses."""
    made = [Assignment(algorithms.create(name, given), None, name) for name, given in steps]
    for step in made:
        step.check(plan)
    return made


def turned(source: Path, steps: Steps, tensors: dict[str, Tensor], seed: int = 3) -> tuple[dict[str, Tensor], Plan]:
    """Every tensor after the transforms, and the plan. Raises ConfigError where one refuses."""
    plan = replace(planned(source))
    made = checked(plan, steps)
    weights = Weights(tensors)
    plan.changes = {step.key: step.changes(plan) for step in made}
    prepass: Any = {part.index: Seen(plan) for part in plan.parts}
    states = {step.key: step.prepare(plan, seed, prepass) for step in made}
    transforms = [(step, step.algorithm) for step in made if isinstance(step.algorithm, Transform)]
    found: dict[str, Tensor] = {}
    for part in plan.parts:
        own = weights.read_many(part.tensors)
        rewriting = Rewriting(plan, part, own, transforms, states, weights)
        rewriting.before()
        for step, transform in transforms:
            if part.block is not None:
                seen: Any = Seen(plan)
                rewriting.after(step, transform, seen)
        found |= own | rewriting.added
    return found, plan


def logits(source: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """What the model's class computes with these tensors; a head of its own is used."""
    path = source / "config.json"
    text = path.read_text()
    if any(name.endswith("lm_head.weight") for name in tensors):
        config = json.loads(text)
        for part in (config, config.get("text_config")):
            if part is not None:
                part["tie_word_embeddings"] = False
        path.write_text(json.dumps(config))
    try:
        runner = Runner(source, models.headers(tensors), dtype=dtype)
        runner.load_outside({name: tensors[name] for name in runner.outside_tensors()})
        recording = runner.record(TOKENS)
        hidden = recording.hidden
        for index, call in enumerate(recording.calls):
            if call is not None:
                runner.load_block(index, {name: tensors[name].clone() for name in runner.block_tensors(index)})
                hidden = runner.run_block(index, recording, hidden)
                runner.unload_block(index)
        return runner.logits(recording, hidden)
    finally:
        path.write_text(text)
