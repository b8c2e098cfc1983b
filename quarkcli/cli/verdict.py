"""What a check has found is shown before its verdict ends the command: the answer of a gate is there when it fails."""

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
