"""Decides whether a run measures its loss, and on which tokens: by `--eval`, `--no-eval`, or the plan.

The measuring itself comes from outside: `evaluation.after.measure` is handed to the job.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkcli.errors import DataError, ModelError, UsageError
from quarkcli.events import Listener, Message
from quarkcli.job.options import Calibration, Options, Prepared

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData

TOKENS = 4096  # that are scored
LEAST = 40_960  # calibration tokens from which on a run measures unasked: two short passes are little beside them

# Scores a written directory against its source: (prepared, data, directory, device, tell).
Judge = Callable[[Prepared, "CalibrationData | None", Path, str, Listener], dict[str, Any]]


def held_out(options: Options, calibration: Calibration) -> int:
    """Returns how many tokens of the calibration data, which calibration does not use, are kept to be scored."""
    if options.evaluate is None:
        return TOKENS if calibration.samples * calibration.seqlen >= LEAST else 0
    return TOKENS if options.evaluate else 0


def check(prepared: Prepared) -> None:
    """Raises UsageError where measuring was asked for and cannot be done."""
    if prepared.options.evaluate and prepared.download is not None:
        raise UsageError(
            "the model is read from the hub layer by layer, so it cannot be compared with at the end",
            where="--eval",
            hint="run 'hf download' first, or 'quark eval OUT --baseline MODEL' afterwards",
            kind="E-FLAG-CONFLICT",
        )


def check_rows(options: Options, rows: CalibrationData) -> None:
    """Raises DataError where measuring was asked for, and calibration leaves no row to measure on."""
    if options.evaluate and rows.held is None:
        raise DataError(
            "calibration uses all rows, so none is left for the evaluation",
            where=rows.source,
            hint="use --no-eval, fewer --calib-samples, or more data",
            kind="E-DATA-FEW",
        )


def idle(options: Options, calibrated: bool) -> list[str]:
    """Returns a line for `--no-eval` where nothing would be measured anyway."""
    if calibrated or options.evaluate is not False:
        return []
    return ["--no-eval changes nothing: a run without calibration data measures only with --eval"]


def measured(
    prepared: Prepared,
    data: CalibrationData | None,
    directory: Path,
    device: str,
    judge: Judge | None,
    tell: Listener,
) -> dict[str, Any] | None:
    """Returns what the written directory scores beside its source; None where that is not asked for, or not possible.

    Raises ModelError or DataError where it was asked for and is not possible.
    """
    options = prepared.options
    if judge is None or not _wanted(prepared, data):
        return None
    try:
        return judge(prepared, data, directory, device, tell)
    except (ModelError, DataError) as error:
        if options.evaluate:
            raise
        tell(Message(f"the result was not evaluated: {error.what}", "warning"))
        return None


def _wanted(prepared: Prepared, data: CalibrationData | None) -> bool:
    if prepared.options.evaluate is not None:
        return prepared.options.evaluate
    return data is not None and data.held is not None and prepared.download is None
