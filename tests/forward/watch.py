"""Statistics of a tiny model: collected by quark, and what plain hooks on transformers' model see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from quarkcli.forward.statistics import Statistics
from quarkcli.forward.walk import Walk
from quarkcli.job import run as job
from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from tests import runs

ROWS = torch.randint(3, 256, (16, 64), generator=torch.Generator().manual_seed(0))


class Raw(Statistics):
    """Statistics that take every input as it is, though weights read it quantized."""

    def read(self, site: str) -> None:
        return None


def plan(source: Path, text: Path, **options: Any) -> job.Prepared:
    """A plan that wants everything: absmax, second moments, and the cache."""
    wanted = {"scheme": "nvfp4", "algorithm": "gptq", "kv_cache": "fp8"} | options
    return runs.prepare(source, **wanted, **runs.data(text))


def collect(
    prepared: job.Prepared,
    rows: torch.Tensor = ROWS,
    mask: torch.Tensor | None = None,
    batch: int = 4,
    all_tokens: bool = False,
    kind: type[Statistics] = Raw,
    least: int = 1,
) -> dict[int, Statistics]:
    """Statistics by block, every block in source precision. Experts are asked for while their block is loaded."""
    source = prepared.source
    runner = Runner(source.folder, source.headers)
    walk = Walk(runner, lambda: source.read_many(runner.outside_tensors()), rows, mask, batch, lambda event: None)
    walk.start()
    found = {}
    for part in prepared.plan.parts:
        if part.block is None:
            continue
        runner.load_block(part.block, source.read_many(part.tensors))
        new = lambda index=part.index: kind(prepared.plan, index, prepared.needs, runner, all_tokens, least)  # noqa: E731
        statistics, _ = walk.observe(part.block, new)
        statistics.kept = moments(prepared, part.index, statistics)
        found[part.block] = statistics
        walk.advance(part.block, Handlers())
        runner.unload_block(part.block)
    return found


def moments(prepared: job.Prepared, part: int, statistics: Statistics) -> dict[tuple[str, int | None], Any]:
    """(second moment, tokens) by site and expert."""
    found: dict[tuple[str, int | None], Any] = {}
    for site in prepared.plan.sites.values():
        if site.part != part or "gram" not in prepared.needs.get(site.name, set()):
            continue
        members = [prepared.plan.targets[name].expert for name in site.members]
        experts = sorted({expert[1] for expert in members if expert}) or [None]
        for expert in experts:
            moment = statistics.moment(site.name, expert)
            found[site.name, expert] = (None, 0) if moment is None else (moment.gram, moment.tokens)
    return found


def hooked(source: Path, rows: torch.Tensor = ROWS) -> dict[str, Any]:
    """What every linear reads, by module name in memory: [rows, tokens, features]; experts: (hidden, index)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs: seen.__setitem__(name, args if len(args) > 1 else args[0])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith(".experts"):
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(rows)
    return seen


def moment(x: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T over all but the last axis, float64."""
    flat = x.reshape(-1, x.shape[-1]).double()
    return flat.T @ flat / flat.shape[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to float32 sums, relative to the matrix."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error < 3e-6, error


def inner(tensors: Mapping[str, torch.Tensor], expert: str, x: torch.Tensor, names: tuple[str, str]) -> torch.Tensor:
    """silu(x G^T) * (x U^T) in float64: what an expert's down projection reads."""
    gate, up = (tensors[f"{expert}.{name}.weight"].double() for name in names)
    return torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
