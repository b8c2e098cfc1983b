"""Installs handlers that see or change the inputs and outputs of modules, in a block or outside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.model.experts import ExpertHandler

    # Gets a module's input or output [..., features]; what it returns, if not None, takes its place.
    LinearHandler = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Handlers:
    """Handlers by file tensor.

    linear     gets the input of the module that owns the tensor; of several tensors of one module (gate and up that
               memory holds fused), the first one's is called
    outputs    gets what the module returns
    experts    any file tensor of an experts module -> its handler
    attention  file tensor of a k projection -> gets q, k, v after rotary embedding, and returns those to go on with
    softmax    file tensor of a k projection -> gets the softmax output, and returns what takes its place or None;
               needs `Runner(eager=True)`
    """

    linear: Mapping[str, LinearHandler] = field(default_factory=dict)
    outputs: Mapping[str, LinearHandler] = field(default_factory=dict)
    experts: Mapping[str, ExpertHandler] = field(default_factory=dict)
    attention: Mapping[str, Callable[[Tensor, Tensor, Tensor], Any]] = field(default_factory=dict)
    softmax: Mapping[str, Callable[[Tensor], Any]] = field(default_factory=dict)
