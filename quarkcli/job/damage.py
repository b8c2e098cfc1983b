"""Refuses NaN and infinity in the tensors of a part before anything runs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from quarkcli.disk.contents import Copied
from quarkcli.disk.nonfinite import HINT, NonFinite
from quarkcli.errors import DataError
from quarkcli.job.solving import named
from quarkcli.numerics.chunks import require_finite
from quarkcli.numerics.finite import is_finite
from quarkcli.plan.model import Part, Plan
from quarkcli.threads import Workers


def kept(
    rows: Sequence[Copied], tensors: Mapping[str, Tensor], roles: Mapping[str, str], allowed: bool, workers: Workers
) -> NonFinite:
    """Returns the NaN and infinities in kept tensors. Raises DataError for a parameter unless it is `allowed`."""
    found = NonFinite(roles)
    for row, fine in zip(rows, workers.map(lambda row: is_finite(row.of(tensors)), rows), strict=True):
        if not fine:
            found.look(row.info.name, row.of(tensors))
    first = found.first()
    if first is not None and not allowed:
        raise DataError(first[1], where=first[0], hint=HINT, kind="E-NONFINITE-WEIGHT")
    return found


def refuse_weights(plan: Plan, part: Part, tensors: Mapping[str, Tensor]) -> None:
    """Raises DataError for NaN or infinity in a weight that will be quantized.

    Its scale rule refuses it too. But data runs through a part before that, and would be blamed for what comes out.
    """
    for target in plan.quantized(part.index):
        weight = target.view.of(tensors[target.view.tensor])
        if not is_finite(weight):
            named(f"{target.name}.weight", require_finite, weight.float().abs().amax(-1, keepdim=True), weight)
