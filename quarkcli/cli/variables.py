"""Checks the environment variables of the libraries of Hugging Face, which take what they do not know for 'no'."""

from __future__ import annotations

import os
from collections.abc import Callable

from quarkcli.errors import UsageError

_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_SWITCH_PREFIX = "HF_HUB_DISABLE_"
_KNOWN = frozenset(("", "1", "ON", "YES", "TRUE", "0", "OFF", "NO", "FALSE"))
_NUMBERS: dict[str, Callable[[str], float]] = {
    "HF_HUB_DOWNLOAD_TIMEOUT": int, "HF_HUB_ETAG_TIMEOUT": int, "HF_DATASETS_IN_MEMORY_MAX_SIZE": float,
}  # fmt: skip


def check() -> None:
    """Raises UsageError for a switch that is neither on nor off, and for a number that is none."""
    for name in sorted(os.environ):
        text = os.environ[name]
        if (name in _SWITCHES or name.startswith(_SWITCH_PREFIX)) and text.upper() not in _KNOWN:
            raise UsageError(
                f"'{text}' is neither on nor off", where=name, hint="set it to 1 or 0", kind="E-FLAG-VALUE"
            )
        if name in _NUMBERS and not _is_number(text, _NUMBERS[name]):
            raise UsageError(f"'{text}' is not a number", where=name, hint="set it to a number", kind="E-FLAG-VALUE")


def _is_number(text: str, read: Callable[[str], float]) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True
