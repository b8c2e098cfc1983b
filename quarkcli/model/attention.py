"""Queries, keys and values where the cache is written: after rotary embedding and normalization.

The attention function in use ("sdpa" or "eager") is wrapped in transformers' registry and put back afterwards. A new
registry name would silently change three families, which test for those two names. Blocks that do not use the
registry (gptj, linear attention, mamba) are simply not called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from quarkcli.model.library import ALL_ATTENTION_FUNCTIONS

# q [b, heads, t, d], k and v [b, kv_heads, t, d] in, what attention computes with out; None keeps them.
AttentionTap = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], "tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None"
]


@contextmanager
def tapped(taps: Mapping[nn.Module, AttentionTap], default: str) -> Iterator[None]:
    """Send q, k, v of the given attention modules through their taps; other modules are not affected.

    default  implementation name for modules without a config of their own
    """
    with ExitStack() as stack:
        wrapped: list[tuple[Any, str]] = []
        for module in taps:
            registry, key = _registry(module), _implementation(module, default)
            if not any(registry is other and key == name for other, name in wrapped):
                wrapped.append((registry, key))
                stack.enter_context(_wrapped(registry, key, taps))
        yield


def _wrap(original: Callable[..., Any] | None, taps: Mapping[nn.Module, AttentionTap]) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module in taps:
            query, key, value = taps[module](query, key, value) or (query, key, value)
        function = original or _source(module).eager_attention_forward
        return function(module, query, key, value, *args, **kwargs)

    return attention


@contextmanager
def _wrapped(registry: Any, key: str, taps: Mapping[nn.Module, AttentionTap]) -> Iterator[None]:
    # Item assignment writes to the registry's local table, which comes before the library's.
    local = registry._local_mapping.get(key)
    # "eager" has no entry: each model file brings its own function as the default.
    registry[key] = _wrap(registry.get(key), taps)
    try:
        yield
    finally:
        del registry[key]
        if local is not None:
            registry[key] = local


def _registry(module: nn.Module) -> Any:
    return getattr(_source(module), "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)


def _source(module: nn.Module) -> Any:
    return sys.modules[type(module).__module__]


def _implementation(module: Any, default: str) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or default
