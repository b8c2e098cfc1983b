"""GPTAQ (arXiv 2504.02692): rounds column by column towards the output that the source's layer makes of its own inputs.

It sees two streams: x, what the quantized blocks below hand on, and s, the same token's in the source model. The loop
is GPTQ's; beside its rounding error every column hands on what its own input has lost, E[(s - x) x^T]. How strongly is
chosen on held-out tokens, 0 (GPTQ) among the choices. Refinement then goes for W s.
"""

from __future__ import annotations

from quarkcli.algorithms._twostream import TwoStreamSolver


class GPTAQ(TwoStreamSolver):
    name = "gptaq"
    feed = True


ALGORITHM = GPTAQ
