"""Rows that are kept and means of magnitudes, against what plain hooks on transformers' model see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quarkcli.algorithms.base import FITTED_ROWS
from quarkcli.forward.moments import held_out
from quarkcli.forward.samples import EvenRows, Samples, Strata, first_tokens
from quarkcli.forward.statistics import Statistics
from quarkcli.forward.taps import Batch
from quarkcli.forward.walk import Walk
from quarkcli.model.runner import Runner
from quarkcli.numerics.sample import Sample
from quarkcli.spec import PerTensor, ScaleSpec, TensorSpec
from tests import runs

from .watch import ROWS, close, hooked, inner, plan

FP8 = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32"))
KINDS = {"absmax", "channel_absmax", "gram", "gram_val", "samples", "mean_abs"}
LAYER = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt")


def collected(source: Path, text: Path, batch: int = 4, rows: torch.Tensor = ROWS, held: bool = True) -> Statistics:
    """All kinds at every site of block 0."""
    prepared = plan(source, text)
    needs = {site.name: KINDS for site in prepared.plan.sites.values()}
    runner = Runner(prepared.source.folder, prepared.source.headers)
    outside = lambda: prepared.source.read_many(runner.outside_tensors())  # noqa: E731
    mask = row_of_eight(rows) if held else None
    walk = Walk(runner, outside, rows, None, batch, lambda event: None, held=mask)
    walk.start()
    part = next(part for part in prepared.plan.parts if part.block == 0)
    runner.load_block(0, prepared.source.read_many(part.tensors))
    statistics, _ = walk.observe(0, lambda: Statistics(prepared.plan, part.index, needs, runner))
    return statistics


def row_of_eight(rows: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(rows.shape, dtype=torch.bool)
    mask[7::8] = True
    return mask


def stratified(found: Sample, rows: torch.Tensor, which: torch.Tensor) -> None:
    """All first tokens of `ROWS` that are asked for, and every second of the others where they are many."""
    first = torch.arange(ROWS.numel()) % ROWS.shape[1] == 0
    step = 1 + (int((which & ~first).sum()) > FITTED_ROWS)
    close(found.rows, torch.cat([rows[which & first], rows[which & ~first][::step]]))
    count = int((which & first).sum())
    close(found.weights / found.weights[0], torch.tensor([1.0] * count + [float(step)] * (len(found.rows) - count)))
    assert float(found.weights.double().mean()) == pytest.approx(1)


@pytest.mark.parametrize(("tokens", "kept", "every"), [(5, 5, 1), (8, 8, 1), (9, 5, 2), (100, 7, 16), (128, 8, 16)])
def test_even_rows_depend_on_the_order_alone(tokens: int, kept: int, every: int) -> None:
    rows = torch.arange(tokens, dtype=torch.float32)[:, None]
    for size in (1, 3, tokens):
        even = EvenRows(8)
        for part in rows.split(size):
            even.add(part)
        assert torch.equal(even.rows(), rows[::every]) and len(even.rows()) == kept
    assert EvenRows(8).rows() is None


def test_held_out_rows_are_told_apart() -> None:
    rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    held = torch.arange(64) % 8 == 7
    samples = Samples()
    for part, own in zip(rows.split(10), held.split(10), strict=True):
        samples.add(part, own)
    for which in (held, ~held):
        found = samples.sample(held=bool(which[7]))
        assert torch.equal(found.rows, rows[which]) and torch.equal(found.weights, torch.ones(int(which.sum())))


def test_first_tokens_are_sampled_apart() -> None:
    rows, first = torch.arange(800.0)[:, None], torch.arange(800) % 8 == 0
    strata = Strata(64)
    for part, own in zip(rows.split(32), first.split(32), strict=True):
        strata.add(part, own, 0)
    found = strata.sample()
    assert torch.equal(found.rows, torch.cat([rows[first][::16], rows[~first][::16]]))  # 100 and 700 of them
    close(found.weights / found.weights[0], torch.tensor([1.0] * 7 + [700 / 44 / (100 / 7)] * 44))
    assert float(found.weights.double().mean()) == pytest.approx(1)
    mean = (100 * rows[first][::16].mean() + 700 * rows[~first][::16].mean()) / 800
    assert float(found.mean(found.rows)) == pytest.approx(float(mean))
    assert float(found.balanced().square().sum()) == pytest.approx(
        float(51 * found.mean(found.rows.square())), rel=1e-5
    )
    assert Strata(64).sample() is None


def test_the_first_token_is_behind_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    first = first_tokens(mask, mask)
    assert first.nonzero().tolist() == [[0, 0], [1, 2], [2, 0]]
    assert torch.equal(first_tokens(mask, None), torch.tensor([[True, False, False, False]] * 3))
    found = Batch(mask, first=first).first_rows(torch.zeros(3, 4, 5))
    assert found.tolist() == [True, False, False, True, False, True, False, False, False]
    assert Batch(mask, first=first).first_rows(torch.zeros(7, 5)) is None


def test_linears(text: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    statistics, seen = collected(source, text), hooked(source)
    held = row_of_eight(ROWS).reshape(-1)
    for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{leaf}"
        site = statistics.plan.targets[name].site
        rows = seen[name].reshape(-1, seen[name].shape[-1])
        for which in (True, False):
            stratified(statistics.samples(site, held=which), rows, held if which else ~held)
        close(statistics.mean_abs(site), rows.double().abs().mean(0))


@pytest.mark.parametrize("held", [True, False])
def test_experts(held: bool, text: Path, tmp_path: Path) -> None:
    source = runs.build("mixtral", tmp_path / "m", torch.float32)
    statistics = collected(source, text, held=held)
    hidden, index, _ = hooked(source)["model.layers.0.mlp.experts"]
    out = row_of_eight(ROWS).reshape(-1) if held else torch.zeros(ROWS.numel(), dtype=torch.bool)
    tensors = runs.read_all(source)
    for expert in range(4):
        for which in (True, False):
            rows = hidden[(index == expert).any(-1) & (out if which else ~out)]
            rows = rows[:: 1 if len(rows) <= (256 if which else 512) else 2]
            common = statistics.samples(f"{LAYER}.input", expert, held=which)
            own = statistics.samples(f"{LAYER}.w2.input", expert, held=which)
            if not len(rows):
                assert common is None and own is None
                continue
            close(common.rows, rows)
            assert torch.equal(own.weights, torch.ones(len(rows)))
            close(own.rows, inner(tensors, f"{LAYER}.{expert}", rows, ("w1", "w3")))
    stratified(statistics.samples(f"{LAYER}.input"), hidden, ~out)
    close(statistics.mean_abs(f"{LAYER}.input"), hidden.double().abs().mean(0))
    assert statistics.samples(f"{LAYER}.w2.input") is None


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_batch_changes_no_row(family: str, text: Path, tmp_path: Path) -> None:
    source = runs.build(family, tmp_path / "m")
    one, three = (collected(source, text, batch) for batch in (1, 3))
    sites = [site for site in one.plan.sites.values() if site.part == one.part]
    for site in sites:
        experts = [None, 0, 3] if site.kind == "experts_in" else [0, 3] if site.kind == "experts_down" else [None]
        for expert in experts:
            for held in (False, True):
                first, other = (s.samples(site.name, expert, held) for s in (one, three))
                assert torch.equal(first.rows, other.rows) and torch.equal(first.weights, other.weights)
        if site.kind != "experts_down":
            torch.testing.assert_close(one.mean_abs(site.name), three.mean_abs(site.name))


def test_they_follow_scaled_channels(text: Path, tmp_path: Path) -> None:
    source = runs.build("mixtral", tmp_path / "m", torch.float32)
    plain, scaled = collected(source, text), collected(source, text)
    assert not scaled.follow({(f"{LAYER}.input", 0): torch.ones(128)}, False)  # moments are of quantized inputs
    scaled._reads = {}
    factor = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5
    common, own = f"{LAYER}.input", f"{LAYER}.w2.input"
    assert scaled.follow({(common, expert): factor for expert in range(4)}, False)
    assert scaled.follow({(common, expert): factor for expert in range(4)}, False)
    close(scaled.samples(common).rows, plain.samples(common).rows * factor**2)
    close(scaled.samples(common, 1, held=True).rows, plain.samples(common, 1, held=True).rows * factor**2)
    close(scaled.mean_abs(common), plain.mean_abs(common) * factor**2)
    close(scaled.channel_amax(common), plain.channel_amax(common) * factor**2)
    largest = (plain.channel_amax(common) * factor**2).max()
    assert float(scaled.amax(common, FP8)) == pytest.approx(float(largest), rel=1e-6)
    inside = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5
    assert not scaled.follow({(own, 0): inside}, False)  # a range of all experts together cannot follow
    scaled.needs = {own: {"gram", "samples"}}
    assert scaled.follow({(own, 2): inside}, False)
    close(scaled.samples(own, 2).rows, plain.samples(own, 2).rows * inside)


def test_samples_alone_hold_rows_out(text: Path) -> None:
    from quarkcli.forward.moments import holds_out

    assert holds_out({"a": {"samples"}}) and holds_out({"a": {"gram_val"}}) and not holds_out({"a": {"gram"}})
    assert held_out(16, 128) is not None
