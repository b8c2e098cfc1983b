"""Gives a shell the words that complete a flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def names(kind: Any) -> Callable[[], list[str]]:
    """Returns shell completion from file names."""

    def complete() -> list[str]:
        from quarkcli.recipe import catalog

        return list(catalog.files(kind))

    return complete


def targets() -> list[str]:
    from quarkcli import servers

    return [servers.AUTO, servers.NONE, *servers.names()]
