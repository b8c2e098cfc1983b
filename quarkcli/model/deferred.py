"""Imports transformers, and builds models on meta, without the parts of both libraries that quark does not need.

Importing `torch._dynamo` takes longer than the rest of transformers, DTensor half as long (sympy, inductor), and sympy
alone, for which operations on meta ask, a third. The libraries read the first to mark functions, which means something
to `torch.compile` alone; transformers takes the second where it finds `torch.distributed`; sizes that are numbers need
no sympy. Only a process that ends with its command goes without them (`ALLOWED`): in a Python program of somebody
else's, what they compile or shard must find the libraries as they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

ALLOWED = False  # set by the command line

_COMPILER = "torch._dynamo"
_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"  # for masks made by vmap, which asks for it by name
_CLASS = "TransformGetItemToIndex"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_GUARDS = ("expect_true", "guard_bool", "guard_or_false", "guard_or_true", "guard_size_oblivious")
# What functions of that module answer about comparisons of numbers, and about numbers.
_ANSWERS: dict[str, tuple[type, Callable[..., Any]]] = {
    **dict.fromkeys((*_GUARDS, "statically_known_true"), (bool, lambda known: known)),
    "sym_and": (bool, lambda *known: all(known)),
    "sym_or": (bool, lambda *known: any(known)),
    "sym_eq": (int, lambda one, other: one == other),
    "guarding_hint_or_throw": (int, lambda number: number),
    "has_guarding_hint": (int, lambda _: True),
    "is_nested_int": (int, lambda _: False),
}
_SYMBOLS = "sympy"
_ASKS = "torch._prims_common"  # of every number whether it is a symbol


def unneeded() -> None:
    """Imports transformers without what a command does not need. All of it is there as soon as somebody asks."""
    if not ALLOWED or _COMPILER in sys.modules or "transformers" in sys.modules:
        return
    import torch
    from torch import distributed

    indexing = ModuleType(_INDEXING)
    setattr(indexing, _CLASS, _indexing)
    sys.modules.update({_COMPILER: _Compiler(_COMPILER), _INDEXING: indexing})
    vars(torch)["_dynamo"] = sys.modules[_COMPILER]
    if _SHAPES not in sys.modules and _SYMBOLS not in sys.modules:
        sys.modules.update({_SHAPES: _Shapes(_SHAPES), _SYMBOLS: _Symbols(_SYMBOLS)})
        vars(torch.fx.experimental)["symbolic_shapes"] = sys.modules[_SHAPES]
    with mock.patch.object(distributed, "is_available", lambda: False):
        from transformers.utils import is_torch_distributed_available

        is_torch_distributed_available()  # the answer is kept


def _mark(function: Any = None, *_: object, **__: object) -> Any:
    """Stands for a decorator that tells the compiler something of a function."""
    return (lambda it: it) if function is None else function


class _Stand(ModuleType):
    """Stands for a module until more is asked of it than it has; then that is imported."""

    def _real(self) -> ModuleType:
        """Returns the module itself, imported now."""
        if sys.modules.get(self.__name__) is self:
            self._leave()
        return importlib.import_module(self.__name__)

    def _leave(self) -> None:
        del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what introspection asks every module for
            raise AttributeError(name)
        return getattr(self._real(), name)


class _Package(_Stand):
    @property  # asked for by the import of a module inside
    def __path__(self) -> Any:  # type: ignore[override]
        return self._real().__path__


class _Compiler(_Package):
    """Stands for `torch._dynamo` while functions are marked."""

    allow_in_graph = staticmethod(_mark)
    assume_constant_result = staticmethod(_mark)
    disable = staticmethod(_mark)

    def _leave(self) -> None:
        import torch

        del sys.modules[self.__name__], sys.modules[_INDEXING], vars(torch)["_dynamo"]


class _Shapes(_Stand):
    """Stands for the module of sizes that are symbols, while it is asked about numbers."""

    def __getattr__(self, name: str) -> Any:
        if name not in _ANSWERS:
            return super().__getattr__(name)
        kind, answer = _ANSWERS[name]

        def of_numbers(*values: Any, **named: Any) -> Any:
            known = not named and all(_is_known(value, kind) for value in values)
            return answer(*values) if known else getattr(self._real(), name)(*values, **named)

        return of_numbers


def _is_known(value: Any, kind: type) -> bool:
    """True for a value of that kind, and for a shape of numbers."""
    return isinstance(value, kind) or (isinstance(value, tuple) and all(isinstance(size, int) for size in value))


class _Symbols(_Package):
    """Stands for sympy while torch asks whether numbers are symbols: as long as it is not imported, none is."""

    def __getattr__(self, name: str) -> Any:
        if name == "Basic" and sys._getframe(1).f_globals.get("__name__") == _ASKS:
            return _Symbol
        return super().__getattr__(name)


class _Symbol:
    """Nothing is one."""


def _indexing() -> Any:
    importlib.import_module(f"{_COMPILER}.config")
    return getattr(importlib.import_module(_INDEXING), _CLASS)()
