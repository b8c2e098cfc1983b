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
from quarkcli.errors import ConfigError
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
        return {t.site: {"gram"} for t in plan.quantized() if t.site is not None}

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


def moment(folder: Path, module: str, tokens: torch.Tensor) -> torch.Tensor:
    """Second moment of a linear's inputs, float64, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    rows = seen[0].double().flatten(0, 1)
    return rows.T @ rows / len(rows)


def test_each_activation_is_seen_behind_the_quantized_ones(
    staged: dict[str, tuple[int, Moment]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    token_rows = job_rows.token_rows
    monkeypatch.setattr(job_rows, "token_rows", lambda *given: (rows.append(token_rows(*given)), rows[-1])[1])
    source = runs.build("llama", tmp_path / "m", torch.float32)
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 8, 64)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128", algorithm="staged", **data)
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
            torch.testing.assert_close(own.gram.double(), moment(folder, name, rows[0].tokens), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gptq_in_stages(family: str, tmp_path: Path) -> None:
    source = runs.build(family, tmp_path / "m")
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 16, 128)
    recipe = tmp_path / "own.yaml"
    folders = []
    for staged in ("true", "false"):
        recipe.write_text(
            "schema: quark/recipe/1\nmetadata: {name: own}\nquantize:\n  scheme: int4_wo_32\n"
            f"  algorithm: [{{method: gptq, true_sequential: {staged}}}]\n"
        )
        folders.append(runs.run(source, tmp_path / staged, recipe=str(recipe), **data).folder)
    first, second = ({name: t for name, t in runs.read_all(folder).items() if "packed" in name} for folder in folders)
    layer = "model.layers.0.self_attn.q_proj"
    same = [name for name in first if torch.equal(first[name], second[name])]
    assert any(name.startswith(layer) for name in same)  # nothing lies before it
    assert len(same) < len(first)


def test_two_streams_are_refused() -> None:
    from quarkcli.algorithms.gptq import GPTQ

    class Both(GPTQ):
        streams = frozenset({"served", "source"})

    with pytest.raises(ConfigError, match="stages"):
        Both(**{**GPTQ.parameters, "true_sequential": True}).check(None)  # type: ignore[arg-type]
