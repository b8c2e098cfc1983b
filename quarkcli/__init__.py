"""quark: quantize large language models from the command line.

`__all__` lists the Python functions: `quarkcli.quantize`, `quarkcli.make_plan`, `quarkcli.LLMTemplate` and others. Each
is imported at its first use, so that `quark --help` does not wait.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Module -> what the API offers of it. `__init__.pyi` says the same to type checkers.
_API = {
    "quarkcli.api.checkpoints": ("compare", "convert", "inspect", "report", "verify"),
    "quarkcli.api.evaluation": ("evaluate",),
    "quarkcli.api.notebook": ("NotebookProgress",),
    "quarkcli.api.options": ("RunOptions",),
    "quarkcli.api.quant_cfg": (
        "NoSuchEntry", "estimate_quant_compression", "find_quant_cfg_entry_by_path", "need_calibration",
        "normalize_quant_cfg_list", "update_quant_cfg_with_kv_cache_quant",
    ),
    "quarkcli.api.results": ("Report",),
    "quarkcli.api.run": ("load_recipe", "make_plan", "quantize", "register_scheme", "unregister_scheme"),
    "quarkcli.api.template": ("LLMTemplate",),
    "quarkcli.job.options": ("Options",),
    "quarkcli.plan.edit": (
        "disable_quantizer", "enable_quantizer", "set_quantizer_attribute", "set_quantizer_attributes_full",
        "set_quantizer_attributes_partial", "set_quantizer_by_cfg", "set_quantizer_by_cfg_context",
    ),
}  # fmt: skip
_HOMES = {name: module for module, names in _API.items() for name in names}
__all__ = sorted([*_HOMES, "__version__"])


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'quarkcli' has no attribute '{name}'")
