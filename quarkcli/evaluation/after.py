"""Measures the loss of a run that just ended, on tokens that calibration did not use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quarkcli import family
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.nonfinite import OnNonfinite
from quarkcli.disk.source import Source
from quarkcli.evaluation import windows
from quarkcli.evaluation.run import BATCH, scored
from quarkcli.evaluation.windows import Windows
from quarkcli.events import Event, Listener, PartDone, Phase
from quarkcli.forward.data import CalibrationData
from quarkcli.job import judging
from quarkcli.job.options import Prepared
from quarkcli.job.rows import tokenizer_of
from quarkcli.model.tokenizer import Tokenizer

LOGITS = 1 << 26  # of one forward at most: 256 MB in float32


def measure(
    prepared: Prepared, data: CalibrationData | None, directory: Path, device: str, tell: Listener
) -> dict[str, Any]:
    """Returns perplexity, KL and agreement with their text, as `quark eval` defines them (part of `quark/eval/1`).

    Both sides compute in the dtype of the source model. Raises ModelError for a model without a head.
    """
    tell(Phase("evaluate"))
    checkpoint, reference = Checkpoint(Source.open(str(directory))), Checkpoint(prepared.source)
    tokenizer = tokenizer_of(prepared.source, prepared.options)
    rows = _rows(prepared, data, tokenizer)
    vocabulary = family.vocabulary(prepared.source.config) or 0
    tokens = min(BATCH, LOGITS // vocabulary) if vocabulary > 0 else BATCH
    kept: OnNonfinite = "keep" if prepared.options.on_nonfinite == "keep" else "stop"
    found = scored(
        checkpoint, reference, rows, dtype=None, device=device, trust=prepared.options.trust_remote_code,
        on_nonfinite=kept, batch=max(1, tokens // rows.tokens.shape[1]), decode=tokenizer.decode,
        tell=lambda event: _tell_parts(event, tell),
    )  # fmt: skip
    return {**found, "text": rows.source, "window": rows.tokens.shape[1]}


def _rows(prepared: Prepared, data: CalibrationData | None, tokenizer: Tokenizer) -> Windows:
    """Returns rows that calibration left over; of the built-in text where there was no calibration."""
    if data is not None and data.held is not None:
        return Windows(data.held, data.prefix, f"{data.source}, rows that calibration did not use", data.held_mask)
    window = windows.width(None, [family.position_limit(prepared.source.config)])
    rows = windows.windows(tokenizer, None, window, judging.TOKENS, "auto")
    return replace(rows, source="the built-in text")


def _tell_parts(event: Event, tell: Listener) -> None:
    """Passes on what is being done; a line for every block would read like the work done again."""
    if not isinstance(event, PartDone | Phase):
        tell(event)
