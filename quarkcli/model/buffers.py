"""Rebuilds buffers that no file holds (rotary frequencies, position tables) with the model's own initialization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quarkcli.errors import ModelError
from quarkcli.model.library import PreTrainedModel

Owners = dict[nn.Module, list[str]]


def rebuild_buffers(model: Any, names: Iterable[str], device: torch.device) -> None:
    """Gives the non-persistent buffers `names` of `model` their values, on `device`.

    Values are computed on the CPU, as transformers does while loading, by `_init_weights` of the submodel that owns
    the buffer; parameters are marked as initialized, so nothing else changes. torch's random state is kept.

    raises  ModelError naming a buffer that the model's code does not initialize
    """
    owners: Owners = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owners.setdefault(model.get_submodule(path), []).append(leaf)
    enclosing = _enclosing_models(model, owners)
    if _unset(owners, enclosing, deep=False):
        # falcon_h1 fills its blocks' buffers from the top.
        for module, leaf in _unset(owners, enclosing, deep=True):
            raise ModelError(
                f"{type(module).__name__} does not say how to initialize its buffer {leaf!r}, so it cannot run",
                hint="quantize with a scheme that needs no calibration data, such as mxfp4: that never runs the model",
                kind="E-CLASS-FOLLOW",
            )
    for module, leaves in owners.items():
        for leaf in leaves:
            module._buffers[leaf] = _buffer(module, leaf).to(device)


def _unset(owners: Owners, enclosing: dict[nn.Module, Any], deep: bool) -> list[tuple[nn.Module, str]]:
    """Initializes over zeros and over ones; what then differs was not initialized (works for every dtype)."""
    zeros = _initialized(owners, enclosing, 0, deep)
    ones = _initialized(owners, enclosing, 1, deep)
    return [key for key, value in zeros.items() if not torch.equal(value, ones[key])]


def _initialized(
    owners: Owners, enclosing: dict[nn.Module, Any], fill: int, deep: bool
) -> dict[tuple[nn.Module, str], torch.Tensor]:
    keys = [(module, leaf) for module, leaves in owners.items() for leaf in leaves]
    for module, leaf in keys:
        old = _buffer(module, leaf)
        module._buffers[leaf] = torch.full(old.shape, fill, dtype=old.dtype)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for module, submodel in enclosing.items():
            _initialize(submodel, module)
        for submodel in dict.fromkeys(enclosing.values()) if deep else ():
            _initialize(submodel, submodel)
    return {(module, leaf): _buffer(module, leaf) for module, leaf in keys}


def _initialize(submodel: Any, module: nn.Module) -> None:
    """Runs `_init_weights` of `submodel` on `module`, with everything but non-persistent buffers protected."""
    persistent = (
        buffer
        for part in module.modules()
        for leaf, buffer in part._buffers.items()
        if buffer is not None and leaf not in part._non_persistent_buffers_set
    )
    for tensor in (*module.parameters(), *persistent):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    submodel._init_weights(module)


def _buffer(module: nn.Module, leaf: str) -> torch.Tensor:
    buffer = module._buffers[leaf]
    assert buffer is not None  # named_buffers lists no None
    return buffer


def _enclosing_models(model: Any, modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """Returns the innermost transformers model around each module."""
    wanted, found = set(modules), {}

    def walk(module: nn.Module, submodel: Any) -> None:
        submodel = module if isinstance(module, PreTrainedModel) else submodel
        if module in wanted:
            found[module] = submodel
        for child in module.children():
            walk(child, submodel)

    walk(model, model)
    return found
