"""Lists the options of a plan or a run as keyword arguments: the names of the flags, with `_` for `-`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from os import PathLike
from typing import TYPE_CHECKING, Literal, ParamSpec, TypedDict, TypeVar

if TYPE_CHECKING:
    from quarkcli.job.options import Offload, OnNonfinite
    from quarkcli.plan.fused import Servers
    from quarkcli.recipe.entries import Entry

Given = ParamSpec("Given")
Made = TypeVar("Made")


class RunOptions(TypedDict, total=False):
    """Lists the options of `quantize` and `make_plan`; each is a flag of `quark quantize`.

    Memory is in bytes and time in seconds. A type checker refuses a name that is not here; at run time it is a
    TypeError.
    """

    settings: Sequence[str]
    dialect: str | Sequence[str] | None
    target: Servers
    algorithm: str | None
    calib_data: str | PathLike[str] | None
    calib_samples: int | None
    calib_seqlen: int | None
    calib_batch: int | None
    calib_column: str | None
    chat_template: str | PathLike[str] | None
    bos: Literal["auto", "on", "off"] | None
    allow_short: bool
    moe_calibration: Literal["routed", "all"] | None
    min_expert_tokens: int | None
    device: str
    seed: int | None
    resume: Literal["auto", "never", "require"]
    overwrite: bool
    strict: bool
    on_nonfinite: OnNonfinite
    time_budget: float | None
    max_cpu_mem: int | None
    max_gpu_mem: int | None
    offload: Offload
    threads: int | None
    verify: bool
    evaluate: bool | None
    tp: int | None
    trust_remote_code: bool
    allow_pickle: bool
    revision: str
    offline: bool
    keep_download: bool
    layer_types: Sequence[str]
    layers: Sequence[str]
    exclude: Sequence[str]
    include: Sequence[str]
    unprotect: Sequence[str]
    kv_cache: str | None
    attention: str | None
    min_kv_scale: float | None
    on_indivisible: Literal["error", "keep", "pad"]
    allow_unmatched: bool
    entries: Sequence[Entry]


def with_options(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Shows the options by name in the signature of a function: `help` and completion in a notebook look there."""
    own = signature(function)
    plain = [parameter for parameter in own.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    shown = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=..., annotation=getattr(kind, "__forward_arg__", kind))
        for name, kind in RunOptions.__annotations__.items()
    ]
    vars(function)["__signature__"] = own.replace(parameters=[*plain, *shown])
    return function
