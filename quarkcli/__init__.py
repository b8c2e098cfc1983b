"""quark: quantize large language models from the command line.

The Python API is `quarkcli.quantize`, `quarkcli.make_plan` and `quarkcli.load_recipe`; it is imported on first use so
that `quark --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Options", "__version__", "load_recipe", "make_plan", "quantize"]


def __getattr__(name: str) -> Any:
    if name in {"Options", "load_recipe", "make_plan", "quantize"}:
        return getattr(importlib.import_module("quarkcli.api"), name)
    raise AttributeError(f"module 'quarkcli' has no attribute '{name}'")
