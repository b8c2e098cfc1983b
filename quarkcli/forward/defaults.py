"""Gives the calibration data for runs that name none, and words of options. Torch-free."""

from __future__ import annotations

import gzip
import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

BUILTIN = "builtin"
SELF = "self"  # the model writes
DEFAULT_HUB = "neuralmagic/LLM_compression_calibration"
HELD_OUT = 5  # one page in this many is for evaluation
# Where hidden states wait between two blocks, see `carry`.
Offload = Literal["auto", "none", "cpu", "disk"]
FILE = Path(__file__).resolve().parents[1] / "assets" / "text" / "builtin.jsonl.gz"


def builtin_texts(*, held_out: bool) -> list[str]:
    """Returns documentation of Python 3.11 in short documents, mixed: the same with every interpreter.

    One part is for calibration, the other is held out; no page is in both.
    """
    return [text for page, text in _documents() if (zlib.crc32(page.encode()) % HELD_OUT == 0) == held_out]


@lru_cache(maxsize=1)
def _documents() -> tuple[tuple[str, str], ...]:
    """Returns page and text of every document (`tests/docs/builtin_text.py` makes the file)."""
    lines = gzip.decompress(FILE.read_bytes()).decode("utf-8").splitlines()
    return tuple((row["page"], row["text"]) for row in map(json.loads, lines))


def default_source(offline: bool) -> tuple[str, str | None]:
    """Returns (source, warning): the named hub set when it can be reached, else the built-in text and the reason."""
    warning = f"calibrating on the built-in text, because the default data set {DEFAULT_HUB} cannot be reached"
    if offline:
        return BUILTIN, warning
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return BUILTIN, warning
    try:
        HfApi().dataset_info(DEFAULT_HUB, timeout=5)
    except Exception:  # whatever keeps us from the hub has the same consequence, and it is said
        return BUILTIN, warning
    return DEFAULT_HUB, None
