"""quark: quantize large language models from the command line.

The Python API (`quarkcli.quantize`, `quarkcli.make_plan`, `quarkcli.LLMTemplate` and the others in `__all__`) is
imported on first use so that `quark --help` does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "LLMTemplate",
    "NoSuchEntry",
    "Options",
    "__version__",
    "disable_quantizer",
    "enable_quantizer",
    "estimate_quant_compression",
    "find_quant_cfg_entry_by_path",
    "load_recipe",
    "make_plan",
    "need_calibration",
    "normalize_quant_cfg_list",
    "quantize",
    "register_scheme",
    "set_quantizer_attribute",
    "set_quantizer_attributes_full",
    "set_quantizer_attributes_partial",
    "set_quantizer_by_cfg",
    "set_quantizer_by_cfg_context",
    "unregister_scheme",
    "update_quant_cfg_with_kv_cache_quant",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("quarkcli.api"), name)
    raise AttributeError(f"module 'quarkcli' has no attribute '{name}'")
