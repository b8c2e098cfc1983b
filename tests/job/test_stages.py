"""Stages: what a later activation's solver sees is what the earlier weights give once they are quantized."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quarkcli import algorithms
from quarkcli.algorithms.base import Moment, Problem
from quarkcli.algorithms.rtn import RoundToNearest
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.forward import lanes
from quarkcli.forward.moments import Moments
from quarkcli.job import rows as job_rows
from tests import runs

ORDER = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
EARLIER = {
    "self_attn.q_proj": [],
    "self_attn.o_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.gate_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
}
EARLIER["mlp.down_proj"] = [*EARLIER["mlp.gate_proj"], "mlp.gate_proj", "mlp.up_proj"]


class Staged(RoundToNearest):
    """Rounds to nearest, stage by stage, and notes the moments and stages that it is given."""

    name = "staged"
    staged = True
    seen: ClassVar[dict[str, tuple[int, Moment]]] = {}

    def needs(self, plan: Any) -> dict[str, set[str]]:
        kinds = {"gram", "cross"} if "source" in self.streams else {"gram"}
        return {t.site: set(kinds) for t in plan.quantized() if t.site is not None}

    def solve(self, problem: Problem) -> Any:
        for target in problem.targets:
            self.seen[target.name] = problem.stage, problem.moment
        return super().solve(problem)


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, Moment]]:
    create = algorithms.create
    monkeypatch.setattr(algorithms, "create", lambda n, p, *w: Staged() if n == "staged" else create(n, p, *w))
    monkeypatch.setattr(Staged, "seen", {})
    return Staged.seen


def inputs(folder: Path, module: str, tokens: torch.Tensor) -> torch.Tensor:
    """A linear's inputs [tokens, features], float64, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    return seen[0].double().flatten(0, 1)


@pytest.mark.parametrize("streams", [{"served"}, {"served", "source"}], ids=len)
def test_each_activation_is_seen_behind_the_quantized_ones(
    streams: set[str], staged: dict[str, tuple[int, Moment]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's stream meets the source's weights in every stage. Each moment is summed once, of four batches."""
    monkeypatch.setattr(Staged, "streams", frozenset(streams))
    rows: list[Any] = []
    token_rows = job_rows.token_rows
    monkeypatch.setattr(job_rows, "token_rows", lambda *given: (rows.append(token_rows(*given)), rows[-1])[1])
    monkeypatch.setattr(lanes, "CPU_TOKENS", 2 * 64)
    added: list[int] = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda *given: (added.append(1), add(*given))[1])
    source = runs.build("llama", tmp_path / "m", torch.float32)
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 8, 64)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128", algorithm="staged", **data)
    assert len(added) == 2 * len(ORDER) * 4
    written = Checkpoint(Source.open(str(made.folder)))
    for block in (0, 1):
        for stage, leaf in enumerate(ORDER):
            replaced = [f"model.layers.{block}.{name}" for name in EARLIER[leaf]]
            replaced += [name for name in staged if block == 1 and name.startswith("model.layers.0.")]
            name = f"model.layers.{block}.{leaf}"
            found, own = staged[name]
            assert found == stage
            folder = tmp_path / f"{block}{stage}"
            shutil.copytree(source, folder)
            tensors = load_file(folder / "model.safetensors")
            tensors |= {f"{name}.weight": written.weight(name).float().contiguous() for name in replaced}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            x = inputs(folder, name, rows[0].tokens)
            torch.testing.assert_close(own.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            if "source" in streams:
                s = inputs(source, name, rows[0].tokens)
                torch.testing.assert_close(own.cross.double(), x.T @ s / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "solver"),
    [("llama", "gptq"), ("qwen3_moe", "qronos"), pytest.param("qwen3_moe", "gptq", marks=pytest.mark.slow)],
)
def test_solvers_in_stages(family: str, solver: str, tmp_path: Path) -> None:
    source = runs.build(family, tmp_path / "m")
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 16, 128)
    recipe = tmp_path / "own.yaml"
    folders = []
    for staged in ("true", "false"):
        recipe.write_text(
            "schema: quark/recipe/1\nmetadata: {name: own}\nquantize:\n  scheme: int4_wo_32\n"
            f"  algorithm: [{{method: {solver}, true_sequential: {staged}}}]\n"
        )
        folders.append(runs.run(source, tmp_path / staged, recipe=str(recipe), **data).folder)
    first, second = ({name: t for name, t in runs.read_all(folder).items() if "packed" in name} for folder in folders)
    layer = "model.layers.0.self_attn.q_proj"
    same = [name for name in first if torch.equal(first[name], second[name])]
    assert any(name.startswith(layer) for name in same)  # nothing lies before it
    assert len(same) < len(first)
