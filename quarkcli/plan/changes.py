"""Holds what algorithms change of a checkpoint beside the values of quantized weights. Pure data, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Added(NamedTuple):
    """A tensor of the output that the source lacks: its name, safetensors dtype, shape, and the index of its part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: int


@dataclass(frozen=True)
class Changes:
    """Holds the changes that a transform or tuner makes to a checkpoint. They are known before any weight is read.

    tensors  source tensors whose values it changes; those of quantized weights are quantized afterwards
    added    tensors that the source lacks
    dropped  source tensor -> why it is not written
    config   keys of config.json that it sets
    online   weight -> size of the Hadamard blocks that its input is multiplied by while the model runs; its columns
             are turned likewise, when all transforms are done with it, and the transform changes nothing itself
    """

    tensors: frozenset[str] = frozenset()
    added: tuple[Added, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    online: Mapping[str, int] = field(default_factory=dict)
