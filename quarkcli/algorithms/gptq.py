"""GPTQ (arXiv 2210.17323): rounds column by column, and the columns that are not yet rounded compensate the error.

It aims for the source weights on the inputs that the quantized blocks below hand on. Scales are found before the loop
(static groups), so the stored layout does not change; `refine` may fit them again after it. Of inputs that were zero
in calibration nothing is known: their weights are rounded to nearest.
"""

from __future__ import annotations

from quarkcli.algorithms._columns import ColumnSolver


class GPTQ(ColumnSolver):
    name = "gptq"


ALGORITHM = GPTQ
