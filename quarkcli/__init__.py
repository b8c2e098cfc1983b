"""quark: quantize large language models from the command line.

The Python API (`quarkcli.quantize`, `quarkcli.make_plan`, `quarkcli.register_scheme` and the others in `__all__`) is
imported on first use so that `quark --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Options",
    "__version__",
    "load_recipe",
    "make_plan",
    "quantize",
    "register_scheme",
    "unregister_scheme",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("quarkcli.api"), name)
    raise AttributeError(f"module 'quarkcli' has no attribute '{name}'")
