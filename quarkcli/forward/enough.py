"""Ends a pass behind its last tap, so that nobody computes products that are not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quarkcli.model.handlers import Handlers

if TYPE_CHECKING:
    from torch import Tensor


class Enough(Exception):
    """Everything that is looked at in this batch has been seen."""


class Watched:
    """Taps of one block: a first pass tells which is called last, further ones end there.

    The last must be the input of a linear, called once: experts get other numbers of calls with every batch.
    """

    def __init__(self, taps: Handlers) -> None:
        self._taps = taps
        self._called: list[str] = []  # names of linears whose inputs were seen; empty ones for all other taps

    def whole(self) -> Handlers:
        """Returns the taps for the first batch."""
        self._called = []
        return Handlers(
            {name: self._noted(name, tap) for name, tap in self._taps.linear.items()},
            self._others(self._taps.outputs),
            {name: _NotedExperts(handler, self._note) for name, handler in self._taps.experts.items()},
            self._others(self._taps.attention),
            self._others(self._taps.softmax),
        )

    def ending(self) -> Handlers:
        """Returns the taps for further batches: the last raises Enough, where that is possible."""
        last = self._called[-1] if self._called else ""
        if not last or self._called.count(last) > 1:
            return self._taps
        return replace(self._taps, linear={**self._taps.linear, last: _last(self._taps.linear[last])})

    def _note(self) -> None:
        self._called.append("")

    def _noted(self, name: str, tap: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*values: Tensor) -> Any:
            self._called.append(name)
            return tap(*values)

        return noted

    def _others(self, taps: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        return {name: self._noted("", tap) for name, tap in taps.items()}


def _last(tap: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    def last(x: Tensor) -> Tensor | None:
        tap(x)
        raise Enough

    return last


class _NotedExperts:
    """Passes calls on to an `ExpertHandler`, and notes them."""

    def __init__(self, handler: Any, note: Callable[[], None]) -> None:
        self._handler = handler
        self._note = note

    def observe(self, module: Any, hidden: Tensor, top_k_index: Tensor) -> None:
        self._note()
        self._handler.observe(module, hidden, top_k_index)

    def gate_up_input(self, expert: int, x: Tensor) -> Tensor:
        self._note()
        found: Tensor = self._handler.gate_up_input(expert, x)
        return found

    def down_input(self, expert: int, h: Tensor) -> Tensor:
        self._note()
        found: Tensor = self._handler.down_input(expert, h)
        return found
