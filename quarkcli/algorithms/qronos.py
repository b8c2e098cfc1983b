"""Qronos (arXiv 2505.11695): rounds column by column what comes nearest to the source's output on inputs that are off.

It sees two streams: x, what the quantized blocks below hand on, and s, the same token's in the source model. The loop
is GPTQ's on the float weights W' for which W' x comes nearest to W s. How far to go from W to W' is chosen on held-out
tokens, 0 (GPTQ) among the choices. Refinement goes for the same.
"""

from __future__ import annotations

from quarkcli.algorithms._twostream import TwoStreamSolver


class Qronos(TwoStreamSolver):
    name = "qronos"
    feed = False


ALGORITHM = Qronos
