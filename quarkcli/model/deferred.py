"""Lets transformers be imported, and models be built on meta, without torch's compiler and without DTensor.

Importing `torch._dynamo` takes longer than the rest of transformers, and DTensor half as long (sympy, inductor). Both
libraries read the first to mark functions, which means something to `torch.compile` alone, and transformers takes the
second where it finds `torch.distributed`. Only a process that ends with its command goes without them (`ALLOWED`): in a
Python program of somebody else's, what they compile or shard must find the libraries as they are.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

ALLOWED = False  # set by the command line

_COMPILER = "torch._dynamo"
_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"  # for masks made by vmap, which asks for it by name
_CLASS = "TransformGetItemToIndex"


def unneeded() -> None:
    """Puts `_Compiler` where the compiler would be, until somebody asks for more than marks, and hides DTensor."""
    if not ALLOWED or _COMPILER in sys.modules or "transformers" in sys.modules:
        return
    import torch
    from torch import distributed

    indexing = ModuleType(_INDEXING)
    setattr(indexing, _CLASS, _indexing)
    sys.modules.update({_COMPILER: _Compiler(_COMPILER), _INDEXING: indexing})
    vars(torch)["_dynamo"] = sys.modules[_COMPILER]
    with mock.patch.object(distributed, "is_available", lambda: False):
        from transformers.utils import is_torch_distributed_available

        is_torch_distributed_available()  # the answer is kept


def _real() -> ModuleType:
    """Returns the compiler itself, imported now."""
    import torch

    if isinstance(sys.modules.get(_COMPILER), _Compiler):
        del sys.modules[_COMPILER], sys.modules[_INDEXING], vars(torch)["_dynamo"]
    return importlib.import_module(_COMPILER)


def _indexing() -> Any:
    _real()
    return getattr(importlib.import_module(_INDEXING), _CLASS)()


def _mark(function: Any = None, *_: object, **__: object) -> Any:
    """Stands for a decorator that tells the compiler something of a function."""
    return (lambda it: it) if function is None else function


class _Compiler(ModuleType):
    """Stands for `torch._dynamo` while functions are marked. Whatever else is asked of it imports the compiler."""

    allow_in_graph = staticmethod(_mark)
    assume_constant_result = staticmethod(_mark)
    disable = staticmethod(_mark)

    @property  # asked for by the import of a module inside
    def __path__(self) -> Any:  # type: ignore[override]
        return _real().__path__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what introspection asks every module for
            raise AttributeError(name)
        return getattr(_real(), name)
