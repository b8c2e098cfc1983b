"""GPTAQ alone; what it has in common with qronos is tested there."""

from __future__ import annotations

import torch

from quarkcli.algorithms import create
from quarkcli.algorithms.gptaq import GPTAQ
from quarkcli.numerics.solve import factorize

from .two_streams import SPECS, streams


def test_the_loop_starts_from_the_source_weights() -> None:
    """What it hands on grows with the strength, as what refinement goes for does."""
    case = streams()
    moment = case.moment()
    factor = factorize(moment.gram, damp=0.01)
    solver = create("gptaq", {})
    assert factor is not None and isinstance(solver, GPTAQ)
    aim = solver.aiming(case.problem(SPECS["int3"], moment))
    assert aim(factor, 0.0).drift is None
    full = aim(factor, 1.0)
    assert full.feed and full.share == 1.0 and full.drift is not None
    assert torch.equal(full.drift.gram, moment.gram) and full.times(0.5).share == 0.5
