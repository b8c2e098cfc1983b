"""Taps queries, keys and values where the cache is written, after rotary embedding and norms, and softmax outputs.

The attention function in use ("sdpa" or "eager") is wrapped in transformers' registry and put back afterwards. A new
registry name would silently change three families, which test for those two names. Blocks that do not use the
registry (own code, linear attention, mamba) are simply not called.

Only the "eager" implementation has a softmax that can be seen: one call of torch's, inside the attention function. It
is seen in the dtype it is computed in, before the cast to that of the values; with attention sinks (gpt-oss) it has
their column as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quarkcli.model.library import ALL_ATTENTION_FUNCTIONS

# q [b, heads, t, d], k and v [b, kv_heads, t, d] in, what attention computes with out; None keeps them.
AttentionTap = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], "tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None"
]


# The softmax output [b, heads, t, keys] in, what takes its place out; None keeps it.
SoftmaxTap = Callable[[torch.Tensor], "torch.Tensor | None"]
_SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


@contextmanager
def tapped(
    taps: Mapping[nn.Module, AttentionTap], softmaxes: Mapping[nn.Module, SoftmaxTap], default: str
) -> Iterator[None]:
    """Sends q, k, v and the softmax outputs of the given attention modules through their taps; others are not affected.

    default  implementation name for modules without a config of their own
    """
    with ExitStack() as stack:
        wrapped: list[tuple[Any, str]] = []
        for module in dict.fromkeys((*taps, *softmaxes)):
            registry, key = _registry(module), _implementation(module, default)
            if not any(registry is other and key == name for other, name in wrapped):
                wrapped.append((registry, key))
                stack.enter_context(_wrapped(registry, key, taps, softmaxes))
        yield


def _wrap(
    original: Callable[..., Any] | None,
    taps: Mapping[nn.Module, AttentionTap],
    softmaxes: Mapping[nn.Module, SoftmaxTap],
) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module in taps:
            query, key, value = taps[module](query, key, value) or (query, key, value)
        function = original or _source(module).eager_attention_forward
        with _SoftmaxTapped(softmaxes[module]) if module in softmaxes else nullcontext():
            return function(module, query, key, value, *args, **kwargs)

    return attention


class _SoftmaxTapped(TorchFunctionMode):
    """Sends what softmax returns through a tap. Torch switches the mode off while it handles a call."""

    def __init__(self, tap: SoftmaxTap) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not any(function is softmax for softmax in _SOFTMAXES):
            return result
        new = self.tap(result)
        return result if new is None else new


@contextmanager
def _wrapped(
    registry: Any, key: str, taps: Mapping[nn.Module, AttentionTap], softmaxes: Mapping[nn.Module, SoftmaxTap]
) -> Iterator[None]:
    # Item assignment writes to the registry's local table, which comes before the library's.
    local = registry._local_mapping.get(key)
    # "eager" has no entry: each model file brings its own function as the default.
    registry[key] = _wrap(registry.get(key), taps, softmaxes)
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
