"""GPTAQ alone; what it has in common with qronos is tested there."""

from __future__ import annotations

import torch

from quarkcli.algorithms import create
from quarkcli.algorithms.gptaq import GPTAQ
from quarkcli.numerics.shift import deviation
from quarkcli.numerics.solve import factorize

from .two_streams import streams


def test_the_loop_starts_from_the_source_weights() -> None:
    """What it hands on is strictly upper, in the order of rounding; the shift is what refinement goes for."""
    moment = streams().moment()
    factor = factorize(moment.gram, damp=0.01)
    solver = create("gptaq", {})
    assert factor is not None and moment.cross is not None and isinstance(solver, GPTAQ)
    aim = solver.target(deviation(moment.gram, moment.cross, factor.dead), moment.gram, factor)
    assert aim.feed is not None and aim.shift is not None and aim.first is None
    assert torch.equal(aim.feed, aim.feed.triu(1)) and bool(aim.feed.any())
    half = aim.times(0.5)
    assert torch.equal(half.feed * 2, aim.feed) and torch.equal(half.shift * 2, aim.shift)
