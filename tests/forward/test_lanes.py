"""Lanes of calibration rows: how they are cut, and the fixed tree that joins what is summed over them."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import pytest
import torch

from quarkcli.forward.group import Group
from quarkcli.forward.lanes import Lane, Span, Tree, joined_ranks, lanes, shares, spans
from quarkcli.forward.moments import CHUNK, Moments
from quarkcli.forward.samples import EvenRows, MeanMagnitude, Samples
from quarkcli.spec import PerGroup, ScaleSpec, TensorSpec

NVFP4 = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3"))


@pytest.mark.parametrize(
    ("rows", "seqlen", "count"),
    [
        (1, 2048, 1), (2, 2048, 2), (8, 128, 2), (15, 128, 2), (16, 128, 4), (32, 256, 4), (63, 256, 4), (64, 256, 8),
        (5, 4096, 4), (9, 2048, 8), (512, 2048, 8),
    ],
)  # fmt: skip
def test_rows_are_cut_into_contiguous_lanes_of_enough_tokens(rows: int, seqlen: int, count: int) -> None:
    cut = lanes(rows, seqlen)
    assert [lane.number for lane in cut] == list(range(count))
    assert [row for lane in cut for row in range(lane.start, lane.stop)] == list(range(rows))
    sizes = [lane.stop - lane.start for lane in cut]
    assert max(sizes) - min(sizes) <= 1 and (count == 1 or min(sizes) * seqlen >= (2048 if count == 8 else 512))


def test_a_forward_takes_rows_of_one_lane() -> None:
    cut = spans([Lane(0, 0, 5), Lane(1, 5, 9)], 2)
    assert cut == [Span(0, 0, 2), Span(0, 2, 4), Span(0, 4, 5), Span(1, 5, 7), Span(1, 7, 9)]


def tree_of(values: dict[int, str], alive: list[int] | None = None) -> Tree[str]:
    tree: Tree[str] = Tree(lambda a, b: f"({a}{b})")
    for lane, value in values.items():
        assert tree.of_lane(lane) is None
        tree.put(value)
        if alive is not None:
            alive.append(1 + sum(one is not None for one in tree._complete))
    return tree


def test_the_tree_is_fixed_and_holds_four_values_at_most() -> None:
    alive: list[int] = []
    every = {lane: str(lane) for lane in range(8)}
    assert tree_of(every, alive).total() == "(((01)(23))((45)(67)))"
    assert max(alive) == 4
    assert tree_of({lane: str(lane) for lane in (0, 3, 4, 6)}).total() == "((03)(46))"
    assert tree_of({lane: str(lane) for lane in range(6)}).total() == "(((01)(23))(45))"
    assert tree_of({}).total() is None


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_subtrees_join_to_the_whole(ranks: int) -> None:
    share = 8 // ranks
    own = [tree_of({lane: str(lane) for lane in range(r * share, (r + 1) * share)}).total() for r in range(ranks)]
    assert tree_of({number: str(value) for number, value in enumerate(own)}).total() == "(((01)(23))((45)(67)))"


@pytest.mark.parametrize("read", [None, NVFP4])
@pytest.mark.parametrize("features", [64, 512])
def test_moments_of_the_lanes_of_ranks_join_to_the_same_bits(features: int, read: TensorSpec | None) -> None:
    random = torch.Generator().manual_seed(0)
    chunks = [(torch.randn(700, features, generator=random), torch.randn(700, 6, generator=random)) for _ in range(16)]

    def summed(numbers: range) -> Moments:
        moments = Moments(read)
        for number in numbers:
            moments.add(*chunks[number], number // 2)
        return moments

    whole = summed(range(16)).means()
    left, right = summed(range(8)).sums.total(), summed(range(8, 16)).sums.total()
    both = Moments(read)
    both.sums.of_lane(0)
    both.sums.put(left.plus(right))
    for one, other in zip(whole, both.means(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    x, y = (torch.cat(part).double() for part in zip(*chunks, strict=True))
    assert whole.tokens == len(x) and torch.equal(whole.gram, whole.gram.T)
    if read is None:
        torch.testing.assert_close(whole.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.cross.double(), x.T @ y / len(x), rtol=1e-4, atol=1e-4)


def test_rows_that_wait_are_folded_by_lane_whatever_came_before() -> None:
    lengths = [300, CHUNK + 600, 700, 2 * CHUNK + 900]
    random = torch.Generator().manual_seed(0)
    lanes_ = [(torch.randn(n, 8, generator=random), torch.randn(n, 3, generator=random)) for n in lengths]

    def summed(numbers: Iterable[int], at_once: int) -> Moments:
        moments = Moments(patient=True)
        for lane in numbers:
            for rows, source in zip(*(each.split(at_once) for each in lanes_[lane]), strict=True):
                moments.add(rows, source, lane)
        moments.close()
        return moments

    few = summed([0, 2], 250)
    assert few.sums.is_empty and few.means().tokens == 1000
    whole = summed(range(4), 250)
    assert not whole.sums.is_empty
    left, right = (summed(own, 90)._total() for own in (range(2), range(2, 4)))
    both = Moments()
    both.sums.put(left.plus(right))
    for one, other in zip(whole.means(), both.means(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    x, y = (torch.cat(part).double() for part in zip(*lanes_, strict=True))
    assert whole.means().tokens == len(x)
    torch.testing.assert_close(whole.means().gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.means().cross.double(), x.T @ y / len(x), rtol=1e-4, atol=1e-4)


def test_shares_of_a_chunk_are_folded_together() -> None:
    rows = torch.randn(CHUNK + 900, 8, generator=torch.Generator().manual_seed(0))
    one, other = Moments(), Moments()
    one.add_shares((part, None) for part in rows.split(100))
    for part in rows.split(2000):
        other.add(part)
    assert torch.equal(one.means().gram, other.means().gram)


def even(rows: torch.Tensor, cuts: list[int], most: int, pieces: int) -> EvenRows:
    found = EvenRows(most)
    for lane, start, stop in zip(range(len(cuts)), cuts, cuts[1:], strict=False):
        for part in rows[start:stop].split(pieces):
            found.add(part, lane)
    return found


def test_rows_that_are_kept_depend_on_what_each_lane_saw_alone() -> None:
    rows = torch.arange(200.0)[:, None]
    cuts = [0, 50, 51, 120, 200]
    wanted = even(rows, cuts, 16, 200).rows()
    for pieces in (1, 7, 30):
        assert torch.equal(even(rows, cuts, 16, pieces).rows(), wanted)
    assert 8 <= len(wanted) <= 16
    assert wanted[:, 0].tolist() == [n for a, b in pairwise(cuts) for n in range(a, b, 16)]
    for split in (1, 2, 3):
        parts = EvenRows(16), EvenRows(16)
        for lane, (start, stop) in enumerate(pairwise(cuts)):
            parts[lane >= split].add(rows[start:stop], lane)
        parts[1].merge(parts[0])
        assert torch.equal(parts[1].rows(), wanted)
    nothing = EvenRows(4)
    nothing.merge(EvenRows(4))
    assert nothing.rows() is None


def test_samples_of_lanes_merge() -> None:
    rows, held = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 8 == 7
    first = torch.arange(64) % 4 == 3
    one, other = Samples(), Samples()
    one.add(rows[:40], held[:40], 0, first[:40])
    other.add(rows[40:], held[40:], 1, first[40:])
    one.merge(other)
    for which in (held, ~held):
        found = one.sample(held=bool(which[7]))
        assert torch.equal(found.rows, torch.cat([rows[which & first], rows[which & ~first]]))
        assert torch.equal(found.weights, torch.ones(int(which.sum())))


def test_mean_magnitudes_are_summed_by_lane() -> None:
    rows = torch.randn(5000, 12, generator=torch.Generator().manual_seed(0))
    mean = MeanMagnitude()
    for lane, part in enumerate(rows.split(1000)):
        mean.add(part, lane)
    torch.testing.assert_close(mean.result().double(), rows.double().abs().mean(0), rtol=1e-6, atol=1e-7)
    assert MeanMagnitude().result() is None


@pytest.mark.parametrize("ranks", range(1, 12))
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ranks_have_subtrees_and_any_number_joins_alike(count: int, ranks: int) -> None:
    cut = shares(count, ranks)
    assert len(cut) == ranks and [lane for own in cut for lane in own] == list(range(count))
    assert all(not own or (len(own) in (1, 2, 4, 8) and own.start % len(own) == 0) for own in cut)
    assert (ranks > count) == any(not own for own in cut)
    values = [tree_of({lane: str(lane) for lane in own}).total() for own in cut]
    whole = tree_of({lane: str(lane) for lane in range(count)}).total()
    assert joined_ranks(lambda a, b: f"({a}{b})", values, cut) == whole


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 10])
def test_sums_reach_the_rank_that_asks_for_them(ranks: int) -> None:
    """Every rank in a thread of its own; what one sends waits for the other."""
    pairs = product(range(ranks), repeat=2)
    ways: dict[tuple[int, int], queue.Queue[str | None]] = {pair: queue.Queue() for pair in pairs}  # before any thread

    class Threads(Group):
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, ranks
            super().__init__()

        def pass_on(self, value: str | None, source: int, target: int) -> str | None:
            if self.rank == source:
                ways[source, target].put(value)
                return None
            return ways[source, target].get(timeout=10)

    def asked(rank: int) -> list[str | None]:
        group = Threads(rank)
        own = group.own([Lane(number, number, number + 1) for number in range(8)])
        value = tree_of({lane.number: str(lane.number) for lane in own}).total()
        return [group.collect(lambda a, b: f"({a}{b})", value, target) for target in range(ranks)]

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(asked, range(ranks)))
    for rank, values in enumerate(found):
        for target, value in enumerate(values):
            assert value == ("(((01)(23))((45)(67)))" if rank == target else None)
    assert all(way.empty() for way in ways.values())
