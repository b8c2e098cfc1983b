"""Checks the environment variables of the libraries of Hugging Face, which take what they do not know for 'no'."""

from __future__ import annotations

import os
from collections.abc import Callable

from quarkcli.errors import UsageError

_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_SWITCH_PREFIX = "HF_HUB_DISABLE_"
_ON = frozenset(("1", "ON", "YES", "TRUE"))
_SHORT_ON = frozenset(("Y", "T"))  # on for transformers and for our flags, off for huggingface_hub and datasets
_OFF = frozenset(("", "0", "OFF", "NO", "FALSE", "N", "F"))
_NUMBERS: dict[str, Callable[[str], float]] = {
    "HF_HUB_DOWNLOAD_TIMEOUT": int, "HF_HUB_ETAG_TIMEOUT": int, "HF_DATASETS_IN_MEMORY_MAX_SIZE": float,
}  # fmt: skip
# Words of commands that import none of the libraries.
_LOCAL = frozenset(("recipes", "schemes", "algorithms", "explain", "report", "list", "show"))


def check(words: list[str]) -> None:
    """Raises UsageError for a switch that is neither on nor off, and for a number that is none.

    `words` are those of the command. One that imports none of the libraries takes every value. A switch with a short
    word becomes 1, so that all libraries read the same.
    """
    if not _LOCAL.isdisjoint(words):
        return
    for name in sorted(os.environ):
        if name in _SWITCHES or name.startswith(_SWITCH_PREFIX):
            _check_switch(name, os.environ[name])
        if name in _NUMBERS and not _is_number(os.environ[name], _NUMBERS[name]):
            what = f"'{os.environ[name]}' is not a number"
            raise UsageError(what, where=name, hint="set it to a number", kind="E-FLAG-VALUE")


def _check_switch(name: str, text: str) -> None:
    if text.upper() in _SHORT_ON:
        os.environ[name] = "1"
    elif text.upper() not in _ON | _OFF:
        raise UsageError(f"'{text}' is neither on nor off", where=name, hint="set it to 1 or 0", kind="E-FLAG-VALUE")


def _is_number(text: str, read: Callable[[str], float]) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True
