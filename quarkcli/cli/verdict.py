"""Shows what a check has found before its verdict ends the command: a gate that fails has its answer too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quarkcli.errors import CheckError

Result = dict[str, Any]


def shown(check: Callable[[], Result], show: Callable[[Result], None]) -> None:
    """Shows the result of a check. Raises the CheckError of one that says no, after its result."""
    try:
        result = check()
    except CheckError as error:
        if error.result is not None:
            show(error.result)
        raise
    show(result)
