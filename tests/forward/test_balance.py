"""Second moments in which frequent tokens count less, against a float64 formula on what plain hooks see."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.algorithms import create
from quarkcli.errors import ConfigError, ModelError
from quarkcli.forward.balance import Balance
from quarkcli.forward.moments import Moments
from quarkcli.forward.taps import Batch
from tests import runs

from .watch import ROWS as IDS
from .watch import Raw, close, collect, hooked, inner, plan

LAYER = "model.layers.1.block_sparse_moe.experts"
# A few ids often, many seldom: the smallest of three draws; the last tokens are padding.
ROWS = IDS.minimum(IDS.flip(0)).minimum(IDS.flip(1))
MASK = torch.ones_like(ROWS, dtype=torch.bool)
MASK[:, 60:] = False


def weights(share: float) -> torch.Tensor:
    """n^-share as the nearest power of two, float64 [rows, seqlen], by Python's own arithmetic; 0 on padding."""
    counts = Counter(ROWS[MASK].tolist())
    powers = {token: 2.0 ** -round(share * math.log2(count)) for token, count in counts.items()}
    assert len(set(powers.values())) >= 3
    found = torch.tensor([[powers.get(token, 0.0) for token in row] for row in ROWS.tolist()], dtype=torch.float64)
    return found.where(MASK, 0.0)


def mean(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of x x^T, float64."""
    flat, each = x.reshape(-1, x.shape[-1]).double(), weight.reshape(-1, 1)
    return flat.T @ (flat * each) / each.sum()


def balanced(shares: dict[str, float]) -> Any:
    """Statistics with these exponents by site."""
    return lambda *args: Raw(*args, balance=Balance(ROWS, MASK, shares))


def test_weights_are_powers_of_two() -> None:
    ids = torch.tensor([[7] * 16, [3] * 4 + [5] * 2 + [0] * 9 + [1]])
    mask = ids != 0
    table = Balance(ids, mask, {"a": 0.5, "b": 0.25, "c": 0}).table
    # 16, 4, 2 and 1 times; half of 2's is 2^-0.5, which lies between two powers, and Python rounds it to the even one.
    assert [float(table("a")[token]) for token in (7, 3, 5, 1)] == [0.25, 0.5, 1.0, 1.0]
    assert [float(table("b")[token]) for token in (7, 3, 5, 1)] == [0.5, 1.0, 1.0, 1.0]
    assert float(table("a")[0]) == 1.0  # padding is not counted
    assert table("c") is None
    assert table("d") is None


def test_linears(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    prepared = plan(source, runs.text_file(tmp_path / "t.txt"))
    sites = [site for site in prepared.plan.sites.values() if site.name in prepared.needs]
    shares = {site.name: (0.5, 0.75, 1.0, 0.0)[number % 4] for number, site in enumerate(sites)}
    found, seen = collect(prepared, ROWS, MASK, kind=balanced(shares)), hooked(source, ROWS)
    for site in sites:
        share, (gram, tokens) = shares[site.name], found[site.part - 1].kept[site.name, None]
        close(gram, mean(seen[site.members[0]], weights(share) if share else MASK))
        assert tokens == int(MASK.sum())


def test_experts(tmp_path: Path) -> None:
    source = runs.build("mixtral", tmp_path / "m", torch.float32)
    prepared = plan(source, runs.text_file(tmp_path / "t.txt"))
    shares = {f"{LAYER}.input": 0.5, f"{LAYER}.w2.input": 1.0}
    statistics = collect(prepared, ROWS, MASK, kind=balanced(shares))[1]
    hidden, index, _ = hooked(source, ROWS)["model.layers.1.mlp.experts"]
    tensors, flat, full = runs.read_all(source), MASK.flatten(), 0
    inside = [inner(tensors, f"{LAYER}.{e}", hidden, ("w1", "w3")) for e in range(4)]
    chosen = [(index == e).any(-1) & flat for e in range(4)]
    pooled = mean(
        torch.cat([x[own] for x, own in zip(inside, chosen, strict=True)]),
        torch.cat([weights(1.0).flatten()[own] for own in chosen]),
    )
    for expert, own in enumerate(chosen):
        close(statistics.kept[f"{LAYER}.input", expert][0], mean(hidden[own], weights(0.5).flatten()[own]))
        count, features = int(own.sum()), pooled.shape[0]
        wanted = mean(inside[expert][own], weights(1.0).flatten()[own])
        if count < 2 * features:
            wanted = (wanted * count + pooled * features) / (count + features)
        full += count >= 2 * features
        close(statistics.kept[f"{LAYER}.w2.input", expert][0], wanted)
    assert full < 4


def test_held_out_tokens_count_alike(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    prepared = plan(source, runs.text_file(tmp_path / "t.txt"))
    site = prepared.plan.targets["model.layers.0.self_attn.q_proj"].site
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    s = x + 0.1
    each = 2.0 ** -torch.arange(64).remainder(4)
    held = torch.arange(64) % 8 == 7
    statistics = Raw(prepared.plan, 1, {site: {"gram", "gram_val", "cross"}}, None)
    statistics.take(site, x, held, s, each)
    moment = statistics.moment(site)
    close(moment.gram, mean(x[~held], each[~held].double()))
    close(moment.cross, x[~held].double().T @ (s * each[:, None])[~held].double() / each[~held].double().sum())
    close(moment.gram_val, mean(x[held], torch.ones(8, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_are_weighted(dtype: torch.dtype) -> None:
    x = torch.randn(5_000, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    each = 2.0 ** -torch.arange(5_000).remainder(6)
    moments = Moments()
    moments.add(x, None, 0, each)
    close(moments.means().gram, mean(x, each.double()))
    assert moments.means().tokens == 5_000


def test_rows_that_cannot_be_told_apart() -> None:
    batch = Batch(ids=torch.zeros(2, 8, dtype=torch.int64))
    assert len(batch.row_ids(torch.zeros(2, 8, 4))) == 16
    with pytest.raises(ModelError, match=r"which rows of activations of shape \[3, 5, 4\] are which tokens"):
        batch.row_ids(torch.zeros(3, 5, 4))


@pytest.mark.parametrize("name", ["gptq", "gptaq", "qronos"])
@pytest.mark.parametrize("value", [-0.1, 1.5, True, "much"])
def test_values_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} balance must be a number from 0 to 1, not {value!r}"):
        create(name, {"balance": value})


RECIPE = """schema: quark/recipe/1
metadata: {{name: two}}
quantize:
  scheme: int4_wo_32
  algorithm:
  - {{method: gptq, slots: ["*q_proj*", "*down_proj*"], balance: 0.5}}
  - {{method: gptq, slots: ["*k_proj*"], balance: {balance}}}
"""


def test_two_solvers_of_one_input_agree(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    for balance in (0.5, 0.25):
        (tmp_path / "r.yaml").write_text(RECIPE.format(balance=balance))
        if balance == 0.5:
            runs.prepare(source, recipe=str(tmp_path / "r.yaml"))
            continue
        with pytest.raises(ConfigError, match=r"layers\.0\..* ask for balance 0\.5 and 0\.25") as caught:
            runs.prepare(source, recipe=str(tmp_path / "r.yaml"))
        assert caught.value.hint == "give both the same balance"
