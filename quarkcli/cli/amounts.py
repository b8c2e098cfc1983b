"""Reads durations, sizes and other numbers as people write them on a command line."""

from __future__ import annotations

import math
import re

import typer

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?")
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def number(text: str) -> float:
    """Returns a number. NaN and infinity are none: every comparison with them would pass, or none."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise typer.BadParameter(f"'{text}' is not a finite number")
    return found


def amount(text: str) -> float:
    """Returns a number that is not negative."""
    found = number(text)
    if found < 0:
        raise typer.BadParameter(f"{text} is less than 0")
    return found


def seconds(text: str) -> float:
    """Returns `3h50m`, `90s`, `90` as seconds."""
    found = _DURATION.fullmatch(text.strip())
    if not found or not any(found.groups()):
        raise typer.BadParameter(f"'{text}' is not a duration; write 3h50m, 90s or a number of seconds")
    hours, minutes, rest = (int(group or 0) for group in found.groups())
    total = 3600 * hours + 60 * minutes + rest
    if not total:
        raise typer.BadParameter("a time budget must be more than 0 s")
    return float(total)


def size(text: str) -> int:
    """Returns `4.5GB` or `4500000000` as bytes."""
    found = _SIZE.fullmatch(text.strip())
    count = float(found[1]) * _UNITS.get((found[2] or "").replace("K", "k"), 1) if found else 0.0
    if count < 1:
        raise typer.BadParameter(f"'{text}' is not a size; write 4.5GB, 4.2GiB or a number of bytes")
    return int(count)
