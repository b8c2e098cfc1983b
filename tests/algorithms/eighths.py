"""A transform that keeps the function exactly: rows of v_proj / 8, columns of o_proj * 8. Dropped in by tests.

It asks for a pass over the source before part 0, and decides from it in which blocks it acts: in all where a channel of
o_proj's input was larger than nothing. `through` says how it changes the tensors.
"""

from typing import Any, ClassVar

import torch

from quarkcli.algorithms.base import Needs, Transform
from quarkcli.plan.model import Changes, Plan, Target


class Eighths(Transform):
    """through: `pair` scales a pair of the family file, `hand` changes both weights by hand; when: before or after."""

    name = "eighths"
    parameters: ClassVar[dict[str, Any]] = {"through": "pair", "when": "after"}

    def __init__(self, through: str, when: str) -> None:
        self.through, self.when = through, when

    def changes(self, plan: Plan) -> Changes:
        return Changes(frozenset(t.view.tensor for t in plan.targets.values() if mine(t)))

    def prepass(self, plan: Plan) -> Needs:
        return {t.site: {"channel_absmax"} for t in plan.targets.values() if mine(t) and t.role == "o"}

    def prepare(self, plan: Plan, seed: int, prepass: Any) -> Any:
        seen = {}
        for index, statistics in prepass.items():
            for target in (t for t in plan.targets.values() if t.part == index and t.role == "o"):
                largest = statistics.channel_amax(target.site)
                assert largest.shape == target.shape[1:]
                seen[plan.parts[index].name] = float(largest.max())
        return {"seed": seed, "largest": seen}

    def before(self, part: Any, state: Any) -> None:
        if self.when == "before":
            self._change(part, state)

    def after(self, part: Any, statistics: Any, state: Any) -> None:
        if self.when == "after":
            self._change(part, state)

    def _change(self, part: Any, state: Any) -> None:
        if not state["largest"].get(part.part.name, 0.0) > 0.0:
            return
        (v,) = [t.name for t in part.targets.values() if t.role == "v"]
        (o,) = [t.name for t in part.targets.values() if t.role == "o"]
        if self.through == "hand":
            part.weight(v).div_(8)
            part.weight(o).mul_(8)
            return
        (pair,) = [pair for pair in part.pairs if pair.source == v]
        assert pair.readers == (o,)
        part.scale(pair, torch.full((len(part.columns(v)),), 0.125))


def mine(target: Target) -> bool:
    return target.role in {"v", "o"}


ALGORITHM = Eighths
