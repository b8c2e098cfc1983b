"""Measures perplexity and the distance from the source, from Python."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

from quarkcli.api.apart import apart
from quarkcli.api.checked import checked
from quarkcli.disk.embedded import located
from quarkcli.disk.nonfinite import OnNonfinite
from quarkcli.events import Listener, silent


@checked
def evaluate(
    directory: str | PathLike[str],
    *,
    baseline: str | PathLike[str] | None = None,
    text: str | PathLike[str] | None = None,
    window: int | None = None,
    tokens: int | None = None,
    bos: Literal["auto", "on", "off"] = "auto",
    max_kl: float | None = None,
    max_ppl_increase: float | None = None,
    weights_only: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    on_nonfinite: OnNonfinite = "stop",
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Measures a checkpoint and returns what `quark eval --json` shows.

    directory         checkpoint, quantized or not, or "demo"
    baseline          model that it was made from; adds KL (nats per token), top-1 agreement and the model's perplexity
    text              text file; None: the held-out part of the built-in text
    window            tokens per window; windows do not overlap
    tokens            largest number of tokens of the text
    max_kl            limit in nats per token; needs a baseline
    max_ppl_increase  limit as a share, .03 for 3 %; needs a baseline
    weights_only      whether activations and cache stay as they are
    listener          called with each event

    Raises CheckError above a limit, with the measurements in its `result`, and for NaN. Raises QuarkError if the
    checkpoint cannot be measured.
    """
    from quarkcli.evaluation import gates, run

    gates.check_asked(baseline, max_kl, max_ppl_increase)
    with apart():
        result = run.evaluate(
            located(str(directory)), baseline=None if baseline is None else located(str(baseline)),
            text=None if text is None else str(text), window=window, max_tokens=tokens, bos=bos,
            weights_only=weights_only, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code,
            on_nonfinite=on_nonfinite, offline=offline, allow_pickle=allow_pickle, tell=listener,
        )  # fmt: skip
    return gates.judged(result, max_kl, max_ppl_increase)
