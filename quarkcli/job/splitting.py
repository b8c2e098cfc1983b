"""Finds the numbers of devices over which servers can split what a plan writes, from names and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quarkcli.dialects.base import StoredTarget, StoredView, TensorInfo, Writer
from quarkcli.disk import parallel
from quarkcli.errors import CheckError, ModelError
from quarkcli.plan.model import Plan, Target, is_quantized

_HINT = "use another --tp, --exclude for these modules, or a scheme with smaller groups"


def degrees(plan: Plan, dialect: Writer, config: Mapping[str, Any], asked: int | None) -> list[int]:
    """Returns the usual numbers of devices that cut no head, scale group or word of codes.

    asked   the number that must be possible; None: any

    Raises ModelError for it, with what it cuts and the numbers that work.
    """
    if asked is not None:
        weights, view, headers = _written(plan.targets.values(), dialect)
        try:
            parallel.check([asked], weights, view, headers, config)
        except CheckError as error:
            raise ModelError(error.what, where="--tp", hint=_HINT, kind="E-SERVER-SPLIT") from error
    weights, view, headers = _written((run[0] for run in plan.alike()), dialect)
    return parallel.fitting(weights, view, headers, config)


def _written(targets: Iterable[Target], dialect: Writer) -> tuple[dict[str, Target], StoredView, dict[str, TensorInfo]]:
    """Returns weights by name, and what a reader will find of them."""
    weights: dict[str, Target] = {}
    headers: dict[str, TensorInfo] = {}
    view = StoredView()
    for target in targets:
        weights[target.name] = target
        if is_quantized(target):
            infos = {info.name: info for info in dialect.infos(target)}
            headers |= infos
            view.targets[target.name] = StoredTarget(
                target.name, target.weight, target.input, target.shape, tuple(infos)
            )  # fmt: skip
    return weights, view, headers
