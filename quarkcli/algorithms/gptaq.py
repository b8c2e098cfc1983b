"""GPTAQ (arXiv 2504.02692): rounds column by column towards what the source's layer makes of its own inputs.

It sees two streams: x, what the quantized blocks below hand on, and s, the same token's in the source model. The loop
is GPTQ's; beside its rounding error every column hands on what its own input has lost, E[(s - x) x^T]. How strongly is
chosen on held-out tokens, 0 (GPTQ) among the choices. Refinement then goes for W s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quarkcli.algorithms._twostream import TwoStreamSolver

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.settle import Aim
    from quarkcli.numerics.solve import Factor


class GPTAQ(TwoStreamSolver):
    name = "gptaq"

    def target(self, away: Tensor, gram: Tensor, factor: Factor) -> Aim:
        from quarkcli.numerics.settle import Aim
        from quarkcli.numerics.shift import feeds, least_squares

        return Aim(shift=least_squares(away, factor), feed=feeds(away, factor))


ALGORITHM = GPTAQ
