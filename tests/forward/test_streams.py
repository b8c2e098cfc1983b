"""Two streams over the same tokens, and held-out rows: moments against float64 sums over what transformers computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quarkcli import algorithms
from quarkcli.algorithms.base import Moment, Problem
from quarkcli.algorithms.rtn import RoundToNearest
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import Stopped
from quarkcli.forward.moments import held_out
from quarkcli.job import rows as job_rows
from tests import runs

from .watch import hooked, inner

ROWS, LENGTH = 32, 64


class Watching(RoundToNearest):
    """Rounds to nearest, and notes the moments that it is given."""

    name = "watching"
    streams = frozenset({"served", "source"})
    seen: ClassVar[dict[str, Moment]] = {}

    def needs(self, plan: Any) -> dict[str, set[str]]:
        return {t.site: {"gram", "gram_val", "cross"} for t in plan.quantized() if t.site is not None}

    def solve(self, problem: Problem) -> Any:
        expert = "" if problem.expert is None else f" {problem.expert}"
        self.seen[f"{problem.site}{expert}"] = problem.moment
        return super().solve(problem)


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Moment]:
    create = algorithms.create
    monkeypatch.setattr(algorithms, "create", lambda n, p, *w: Watching() if n == "watching" else create(n, p, *w))
    monkeypatch.setattr(Watching, "seen", {})
    return Watching.seen


def inputs(folder: Path, tokens: torch.Tensor, leaf: str) -> torch.Tensor:
    """What a linear of block 1 reads, [rows, tokens, features], by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(f"model.layers.1.{leaf}").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    return seen[0].double()


class Both(NamedTuple):
    """A run that watched two streams: the source, a model that is the source but for block 0 as served, the tokens."""

    made: runs.Made
    source: Path
    served: Path
    tokens: torch.Tensor

    @property
    def held(self) -> torch.Tensor:
        mask = torch.zeros(ROWS, dtype=torch.bool)
        mask[7::8] = True
        return mask


def both(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Both:
    source = runs.build(family, tmp_path / "m", torch.float32, **config)
    rows: list[torch.Tensor] = []
    token_rows = job_rows.token_rows
    monkeypatch.setattr(job_rows, "token_rows", lambda *given: (rows.append(token_rows(*given)), rows[-1])[1])
    text = runs.data(runs.text_file(tmp_path / "t.txt"), ROWS, LENGTH)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_32", algorithm="watching", **text)
    served = tmp_path / "served"
    shutil.copytree(source, served)
    tensors, decoded = load_file(served / "model.safetensors"), Checkpoint(Source.open(str(made.folder)))
    for target in made.prepared.plan.quantized(1):
        target.view.of(tensors[target.view.tensor]).copy_(decoded.weight(target.name))
    save_file(tensors, served / "model.safetensors", metadata={"format": "pt"})
    return Both(made, source, served, rows[0].tokens)


def test_moments_of_both_streams(
    watching: Mapping[str, Moment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = both("llama", tmp_path, monkeypatch)
    held, targets = run.held, run.made.prepared.plan.targets
    for leaf in ("self_attn.o_proj", "mlp.down_proj"):
        moment = watching[targets[f"model.layers.1.{leaf}"].site]
        x, s = (inputs(folder, run.tokens, leaf) for folder in (run.served, run.source))
        assert moment.tokens == int((~held).sum()) * LENGTH
        expected = {
            "gram": mean(x[~held], x[~held]),
            "gram_val": mean(x[held], x[held]),
            "cross": mean(x[~held], s[~held]),
            "cross_val": mean(x[held], s[held]),
        }
        near(moment, expected)
        assert float((moment.cross - moment.gram).norm() / moment.gram.norm()) > 1e-3  # block 0 was quantized
    first = watching[targets["model.layers.0.self_attn.q_proj"].site]
    torch.testing.assert_close(first.cross, first.gram)


def test_the_head_sees_both_streams(watching: Mapping[str, Moment], tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    text = runs.data(runs.text_file(tmp_path / "t.txt"), ROWS, LENGTH)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_32", algorithm="watching", unprotect=["head"], **text)
    moment = watching[made.prepared.plan.targets["lm_head"].site]
    served, other = moment.cross.diagonal(), moment.gram.diagonal()
    assert moment.cross_val is not None and float(((served - other) / other).abs().max()) > 1e-3
    torch.testing.assert_close(served.sum(), other.sum(), rtol=0.1, atol=0)  # near the source, behind its own norm


def near(moment: Moment, expected: Mapping[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        found = getattr(moment, name).double()
        assert float((found - value).norm() / value.norm()) < 1e-4, name


def test_streams_of_experts_see_the_same_tokens(
    watching: Mapping[str, Moment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert's moments are of the tokens that the source stream routes to it, as both streams have them."""
    run = both("qwen3_moe", tmp_path, monkeypatch)
    layer = "model.layers.1.mlp.experts"
    (x, served, _), (s, routed, _) = (hooked(folder, run.tokens)[layer] for folder in (run.served, run.source))
    x, s = x.double(), s.double()
    assert not torch.equal(served.sort().values, routed.sort().values)  # the streams route differently
    held = run.held[:, None].expand(ROWS, LENGTH).reshape(-1)
    tensors = runs.read_all(run.source)
    chosen = {e: (routed == e).any(-1) for e in range(4)}
    streams: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
        "input": lambda e, rows: rows,
        "down_proj.input": lambda e, rows: inner(tensors, f"{layer}.{e}", rows, ("gate_proj", "up_proj")),
    }
    shrunk = set()
    for site, of in streams.items():
        fitted = {e: [of(e, rows[mask & ~held]) for rows in (x, s)] for e, mask in chosen.items()}
        together = [torch.cat(rows) for rows in zip(*fitted.values(), strict=True)]
        prior = [x[~held], s[~held]] if site == "input" else together
        for e, (own, other) in fitted.items():
            count, features = own.shape
            weight = features if count < 2 * features else 0
            shrunk.add(weight)
            moment = watching[f"{layer}.{site} {e}"]
            assert moment.tokens == count
            expected = {
                "gram": (mean(own, own) * count + mean(prior[0], prior[0]) * weight) / (count + weight),
                "cross": (mean(own, other) * count + mean(*prior) * weight) / (count + weight),
            }
            own, other = (of(e, rows[chosen[e] & held]) for rows in (x, s))
            near(moment, {**expected, "gram_val": mean(own, own), "cross_val": mean(own, other)})
    assert len(shrunk) > 1  # some lean on their layer, some do not


def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return x.T @ y / len(x)


def test_experts_have_held_out_moments_of_their_own(watching: Mapping[str, Moment], tmp_path: Path) -> None:
    """The moments of what is fitted and of what is held out make the moment of all tokens."""
    source = runs.build("qwen3_moe", tmp_path / "m", torch.float32)
    text = runs.data(runs.text_file(tmp_path / "t.txt"), ROWS, LENGTH)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_32", algorithm="watching", **text)
    sites = {s.name: s for s in made.prepared.plan.sites.values() if s.part == 1 and s.kind == "experts_in"}
    (site,) = sites
    experts = [moment for name, moment in watching.items() if name.startswith(f"{site} ")]
    assert len(experts) == 4
    assert all(moment.cross_val is not None and moment.gram_val is not None for moment in experts)
    counts = made.report["experts"]["calibration_tokens"]["model.layers.0.mlp.experts"].values()
    assert sorted(moment.tokens for moment in experts) < sorted(counts)


def test_a_killed_run_takes_both_streams_up(watching: Mapping[str, Moment], tmp_path: Path) -> None:
    text = {**runs.data(runs.text_file(tmp_path / "t.txt"), ROWS, LENGTH), "algorithm": "watching"}
    whole = runs.run("demo", tmp_path / "whole", scheme="int4_wo_128", **text)
    site = whole.prepared.plan.targets["model.layers.3.mlp.down_proj"].site
    last = watching[site]
    with pytest.raises(Stopped):
        runs.run("demo", tmp_path / "out", scheme="int4_wo_128", time_budget=0.0, **text)
    with pytest.raises(Stopped):
        runs.run("demo", tmp_path / "out", scheme="int4_wo_128", time_budget=0.0, **{**text, "resume": "require"})
    Watching.seen.clear()
    again = runs.run("demo", tmp_path / "out", scheme="int4_wo_128", **{**text, "resume": "require"})
    assert runs.same_files(whole.folder, again.folder)
    for name in ("gram", "gram_val", "cross", "cross_val"):
        assert torch.equal(getattr(watching[site], name), getattr(last, name))


def test_a_killed_run_takes_up_shared_keys_and_values(tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 1}
    source = runs.build("gemma4_text", tmp_path / "m", num_hidden_layers=3, **kinds)
    text = {**runs.data(runs.text_file(tmp_path / "t.txt"), 4, 32), "scheme": "fp8"}
    whole = runs.run(source, tmp_path / "whole", **text)
    for resume in ("auto", "require"):  # the embedding, and the block whose keys and values the last one reads
        with pytest.raises(Stopped):
            runs.run(source, tmp_path / "out", time_budget=0.0, **{**text, "resume": resume})
    again = runs.run(source, tmp_path / "out", **{**text, "resume": "require"})
    assert runs.same_files(whole.folder, again.folder)


def test_which_tokens_are_held_out() -> None:
    rows = held_out(32, 64)
    assert rows is not None and rows.any(1).nonzero().flatten().tolist() == [7, 15, 23, 31]
    few = held_out(8, 512)
    assert few is not None and few.flatten().nonzero().flatten().tolist() == list(range(7 * 512, 8 * 512))
    assert held_out(8, 255) is None
