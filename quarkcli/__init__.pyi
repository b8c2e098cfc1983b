from quarkcli.api.checkpoints import compare, convert, inspect, report, verify
from quarkcli.api.evaluation import evaluate
from quarkcli.api.notebook import NotebookProgress
from quarkcli.api.options import RunOptions
from quarkcli.api.quant_cfg import (
    NoSuchEntry,
    estimate_quant_compression,
    find_quant_cfg_entry_by_path,
    need_calibration,
    normalize_quant_cfg_list,
    update_quant_cfg_with_kv_cache_quant,
)
from quarkcli.api.results import Report
from quarkcli.api.run import load_recipe, make_plan, quantize, register_scheme, unregister_scheme
from quarkcli.api.template import LLMTemplate
from quarkcli.job.options import Options
from quarkcli.plan.edit import (
    disable_quantizer,
    enable_quantizer,
    set_quantizer_attribute,
    set_quantizer_attributes_full,
    set_quantizer_attributes_partial,
    set_quantizer_by_cfg,
    set_quantizer_by_cfg_context,
)

__all__ = [
    "LLMTemplate",
    "NoSuchEntry",
    "NotebookProgress",
    "Options",
    "Report",
    "RunOptions",
    "__version__",
    "compare",
    "convert",
    "disable_quantizer",
    "enable_quantizer",
    "estimate_quant_compression",
    "evaluate",
    "find_quant_cfg_entry_by_path",
    "inspect",
    "load_recipe",
    "make_plan",
    "need_calibration",
    "normalize_quant_cfg_list",
    "quantize",
    "register_scheme",
    "report",
    "set_quantizer_attribute",
    "set_quantizer_attributes_full",
    "set_quantizer_attributes_partial",
    "set_quantizer_by_cfg",
    "set_quantizer_by_cfg_context",
    "unregister_scheme",
    "update_quant_cfg_with_kv_cache_quant",
    "verify",
]

__version__: str
