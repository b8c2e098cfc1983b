"""Statistics against float64 formulas on what plain hooks see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quarkcli.errors import DataError
from quarkcli.forward.moments import CHUNK, NARROW, Moments
from quarkcli.forward.statistics import Statistics
from quarkcli.forward.taps import Batch, unpadded
from quarkcli.forward.walk import Walk
from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from quarkcli.numerics.quantize import fake_quantize
from quarkcli.spec import PerTensor, ScaleSpec, TensorSpec
from tests import runs

from .watch import ROWS, Raw, close, collect, hooked, inner, moment, plan

FP8 = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32"))
LAYER = "model.layers.1.block_sparse_moe.experts"
WITHIN = ("w1", "w3")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("llama") / "m", torch.float32)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("mixtral", tmp_path_factory.mktemp("mixtral") / "m", torch.float32)


def test_dense_sites(llama: Path, text: Path) -> None:
    prepared = plan(llama, text)
    found, seen = collect(prepared), hooked(llama)
    sites = [site for site in prepared.plan.sites.values() if site.name in prepared.needs]
    assert len(sites) == 8  # q+k+v, o, gate+up, down of two blocks
    for site in sites:
        statistics = found[site.part - 1]
        mean, tokens = statistics.kept[site.name, None]
        assert tokens == ROWS.numel()
        for member in site.members:  # all members read it
            close(mean, moment(seen[member]))
        largest = float(seen[site.members[0]].abs().max())
        assert float(statistics.amax(site.name, FP8)) == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int8_dynamic", "fp8"])
def test_moments_are_of_inputs_as_weights_read_them(scheme: str, llama: Path, text: Path) -> None:
    """Quantized, 1,024 tokens at once; codes of values that lie next to a tie may differ."""
    prepared = plan(llama, text, scheme=scheme)
    found, seen = collect(prepared, kind=Statistics, batch=len(ROWS)), hooked(llama)
    for site in (site for site in prepared.plan.sites.values() if site.name in prepared.needs):
        mean, _ = found[site.part - 1].kept[site.name, None]
        (member, *_) = site.members
        x = seen[member].reshape(-1, seen[member].shape[-1]).float()
        wanted = moment(fake_quantize(x, prepared.plan.targets[member].input))
        apart = [float((mean.double() - other).norm() / wanted.norm()) for other in (wanted, moment(x))]
        assert apart[0] < 1e-3
        assert apart[0] < 0.5 * apart[1]


def test_padding_is_not_counted(llama: Path, text: Path) -> None:
    mask = torch.ones_like(ROWS, dtype=torch.bool)
    mask[0, 40:] = mask[3, 5:] = mask[7, 63:] = False
    rows = ROWS.masked_fill(~mask, 0)
    prepared = plan(llama, text)
    found, seen = collect(prepared, rows, mask), hooked(llama, rows)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        site = prepared.plan.targets[name].site
        mean, tokens = found[int(name.split(".")[2])].kept[site, None]
        assert tokens == int(mask.sum())
        close(mean, moment(seen[name][mask]))
        real = seen[name][mask].abs().max()
        assert float(found[int(name.split(".")[2])].amax(site, FP8)) == pytest.approx(float(real), rel=1e-5)


def test_experts_see_their_own_tokens(mixtral: Path, text: Path) -> None:
    prepared = plan(mixtral, text)
    statistics = collect(prepared)[1]
    hidden, index, _ = hooked(mixtral)["model.layers.1.mlp.experts"]
    tensors = runs.read_all(mixtral)
    counts = torch.bincount(index.reshape(-1), minlength=4)
    assert statistics.expert_tokens() == {LAYER: {expert: int(counts[expert]) for expert in range(4)}}
    largest = []
    for expert in range(4):
        rows = hidden[(index == expert).any(-1)]
        inside = inner(tensors, f"{LAYER}.{expert}", rows, WITHIN)
        largest.append(float(inside.abs().max()))
        assert len(rows) >= 2 * 128  # enough for the common input to need no prior
        mean, tokens = statistics.kept[f"{LAYER}.input", expert]
        assert tokens == len(rows)
        close(mean, moment(rows))
    assert float(statistics.amax(f"{LAYER}.input", FP8)) == pytest.approx(float(hidden.abs().max()), rel=1e-5)
    assert float(statistics.amax(f"{LAYER}.w2.input", FP8)) == pytest.approx(max(largest), rel=1e-4)


def test_few_tokens_lean_on_the_layer(mixtral: Path, text: Path) -> None:
    """Below two tokens per feature the layer's moment counts as one token per feature."""
    statistics = collect(plan(mixtral, text))[1]
    hidden, index, _ = hooked(mixtral)["model.layers.1.mlp.experts"]
    tensors = runs.read_all(mixtral)
    inside = [inner(tensors, f"{LAYER}.{e}", hidden[(index == e).any(-1)], WITHIN) for e in range(4)]
    pooled = moment(torch.cat(inside))
    for expert in range(4):
        count, features = inside[expert].shape
        assert (count < 2 * features) == (statistics.kept[f"{LAYER}.w2.input", expert][1] < 2 * 256)
        weight = features if count < 2 * features else 0
        wanted = (moment(inside[expert]) * count + pooled * weight) / (count + weight)
        close(statistics.kept[f"{LAYER}.w2.input", expert][0], wanted)
    counts = [len(rows) for rows in inside]
    assert min(counts) < 2 * 256 <= max(counts)  # both cases are met


def test_all_tokens_for_every_expert(mixtral: Path, text: Path) -> None:
    statistics = collect(plan(mixtral, text), all_tokens=True)[1]
    hidden, index, _ = hooked(mixtral)["model.layers.1.mlp.experts"]
    tensors = runs.read_all(mixtral)
    inside = [inner(tensors, f"{LAYER}.{expert}", hidden, WITHIN) for expert in range(4)]
    for expert in range(4):
        close(statistics.kept[f"{LAYER}.input", expert][0], moment(hidden))
        close(statistics.kept[f"{LAYER}.w2.input", expert][0], moment(inside[expert]))
    largest = max(float(rows.abs().max()) for rows in inside)
    assert float(statistics.amax(f"{LAYER}.w2.input", FP8)) == pytest.approx(largest, rel=1e-4)
    counts = torch.bincount(index.reshape(-1), minlength=4)
    assert statistics.expert_tokens()[LAYER] == {expert: int(counts[expert]) for expert in range(4)}


def test_experts_ignore_padding(mixtral: Path, text: Path) -> None:
    mask = torch.ones_like(ROWS, dtype=torch.bool)
    mask[:, 50:] = False
    rows = ROWS.masked_fill(~mask, 0)
    statistics = collect(plan(mixtral, text), rows, mask)[1]
    hidden, index, _ = hooked(mixtral, rows)["model.layers.1.mlp.experts"]
    hidden, index = hidden[mask.reshape(-1)], index[mask.reshape(-1)]
    counts = torch.bincount(index.reshape(-1), minlength=4)
    assert statistics.expert_tokens()[LAYER] == {expert: int(counts[expert]) for expert in range(4)}
    assert float(statistics.amax(f"{LAYER}.input", FP8)) == pytest.approx(float(hidden.abs().max()), rel=1e-5)
    inside = [
        inner(runs.read_all(mixtral), f"{LAYER}.{e}", hidden[(index == e).any(-1)], WITHIN).abs().max()
        for e in range(4)
    ]
    assert float(statistics.amax(f"{LAYER}.w2.input", FP8)) == pytest.approx(float(max(inside)), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_batch_changes_no_more_than_how_sums_round(family: str, text: Path, tmp_path: Path) -> None:
    prepared = plan(runs.build(family, tmp_path / "m"), text)
    one, three = (collect(prepared, batch=batch) for batch in (1, 3))
    for block, statistics in one.items():
        other = three[block]
        assert statistics.kept.keys() == other.kept.keys()
        for key, (mean, tokens) in statistics.kept.items():
            assert tokens == other.kept[key][1]
            torch.testing.assert_close(mean, other.kept[key][0], rtol=1e-4, atol=1e-6)
        assert statistics._ranges
        assert all(torch.equal(seen.amax, other._ranges[key].amax) for key, seen in statistics._ranges.items())


@pytest.mark.parametrize("features", [24, NARROW, 300])
def test_moments_are_folded_chunk_by_chunk(features: int) -> None:
    """Below `NARROW` features the product is taken whole, from there on in panels; neither must show."""
    rows = torch.randn(2 * CHUNK + 700, features, generator=torch.Generator().manual_seed(0))
    results = []
    for size in (CHUNK, 2 * CHUNK, len(rows)):
        gram = Moments()
        for part in rows.split(size):
            gram.add(part.clone())
        results.append(gram.means().gram)
        assert gram.means().tokens == len(rows)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[0], results[0].T)
    close(results[0], moment(rows))


def test_no_tokens_and_bad_numbers(llama: Path, text: Path) -> None:
    prepared = plan(llama, text)
    site = prepared.plan.targets["model.layers.0.mlp.up_proj"].site
    statistics = Raw(prepared.plan, 1, prepared.needs, None)
    assert statistics.moment(site) is None
    with pytest.raises(DataError, match="no calibration token reached"):
        statistics.amax(site, FP8)
    statistics.batch = Batch(name=", batch 2 of 3 (rows 5 to 8)")
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(DataError, match=r"NaN or inf in .*, batch 2 of 3 \(rows 5 to 8\)") as error:
            statistics.take(site, torch.tensor([[1.0, value]]))
        assert error.value.where == site
    statistics.take(site, torch.tensor([[1.0, 1e30]]))
    with pytest.raises(DataError, match="squares of the calibration activations overflow"):
        statistics.moment(site)


def test_no_product_is_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x x^T at most 40/64 of the products, however the rows come."""
    products: list[int] = []
    addmm_ = torch.Tensor.addmm_

    def counted(self: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **given: float) -> torch.Tensor:
        products.append(a.shape[0] * a.shape[1] * b.shape[1])
        return addmm_(self, a, b, **given)

    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    gram = Moments()
    for part in torch.randn(CHUNK + 100, 512).split(300):
        gram.add(part)
    gram.means()
    assert sum(products) <= 40 / 64 * (CHUNK + 100) * 512 * 512


def test_bad_numbers_of_the_other_stream_and_of_held_out_tokens(llama: Path, text: Path) -> None:
    prepared = plan(llama, text)
    site = prepared.plan.targets["model.layers.0.mlp.up_proj"].site
    assert site is not None
    good, bad, large = torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2)
    bad[3, 1], large[3, 1] = float("inf"), 1e30
    held = torch.arange(4) == 3
    for mask in (None, held):
        statistics = Raw(prepared.plan, 1, {site: {"gram", "gram_val", "cross"}}, None)
        with pytest.raises(DataError, match="NaN or inf in the calibration activations of the original model"):
            statistics.take(site, good, mask, bad)
        statistics = Raw(prepared.plan, 1, {site: {"gram", "gram_val", "cross"}}, None)
        statistics.take(site, large, mask, good)  # its square overflows
        with pytest.raises(DataError, match="squares of the calibration activations overflow"):
            statistics.moment(site)


@pytest.mark.parametrize("leading", [(2, 3), (6,), (4, 2, 3), (2, 3, 4), (5, 2, 3, 4)])
def test_padding_is_found_beside_other_axes(leading: tuple[int, ...]) -> None:
    """Experts see tokens flat; some families carry streams before the rows or behind the tokens."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    places = torch.arange(6).reshape(2, 3).masked_fill(mask == 0, -1)
    shapes = {(6,): (6,), (4, 2, 3): (1, 2, 3), (2, 3, 4): (2, 3, 1), (5, 2, 3, 4): (1, 2, 3, 1), (2, 3): (2, 3)}
    values = places.reshape(shapes[leading]).expand(leading).reshape(-1)
    kept = unpadded(mask, torch.Size(leading))
    assert kept is not None and torch.equal(kept, values >= 0)
    assert unpadded(mask, torch.Size((7, 3))) is None


@pytest.mark.parametrize(
    ("family", "cache", "passes"), [("llama", "none", 1), ("llama", "fp8", 1), ("mixtral", "none", 8)]
)
def test_a_pass_that_is_only_looked_at_ends_at_its_last_input(
    family: str, cache: str, passes: int, request: pytest.FixtureRequest, text: Path
) -> None:
    """The down projection's product is nobody's, but for the first batch; experts' inputs come in any number."""
    source = request.getfixturevalue(family)
    prepared = plan(source, text, kv_cache=cache)
    runner = Runner(prepared.source.folder, prepared.source.headers)
    outside = lambda: prepared.source.read_many(runner.outside_tensors())  # noqa: E731
    walk = Walk(runner, outside, ROWS, None, 2, lambda event: None)
    walk.start()
    part = next(part for part in prepared.plan.parts if part.block == 0)
    runner.load_block(0, prepared.source.read_many(part.tensors))
    ended: list[int] = []
    block = runner._skeleton.blocks[0]
    block.mlp.register_forward_hook(lambda *given: ended.append(1))
    statistics, first = walk.observe(0, lambda: Raw(prepared.plan, part.index, prepared.needs, runner))
    assert len(walk.served) == 8
    assert len(ended) == passes
    assert torch.equal(first, walk.probe(0, Handlers()))
    linears = {site.name for site in prepared.plan.sites.values() if site.part == part.index and site.kind == "linear"}
    for name in linears & prepared.needs.keys():
        assert statistics.moment(name, None).tokens == ROWS.numel()
