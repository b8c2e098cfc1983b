"""Leaves out the head where nobody reads its logits: a vocabulary times a batch is most of a short pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quarkcli.model.skeleton import Skeleton


@contextmanager
def without_head(skeleton: Skeleton) -> Iterator[None]:
    """Heads return zeros for the last token while inside; their hooks still see all that they read.

    Zeros, and not an end of the forward: what stands behind it (softcapping, outputs of the class) stays as it is.
    Not `logits_to_keep`: gemma4 cuts the hidden states inside its blocks by it.
    """
    changed = heads(skeleton)
    for head in changed:
        head.__dict__["forward"] = _zeros_of(head.weight.shape[0])
    try:
        yield
    finally:
        for head in changed:
            del head.__dict__["forward"]


def heads(skeleton: Skeleton) -> list[Any]:
    """Returns modules that score every token.

    They are the output embeddings of the class, else linears that have as many rows as the embedding.

    Code of a model's own may not say which it is (ChatGLM).
    """
    model = skeleton.model
    named = model.get_output_embeddings()
    if named is not None:
        return [named] if isinstance(getattr(named, "weight", None), torch.Tensor) else []
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == max(tables, default=0)
        and not name.startswith(f"{skeleton.blocks_path}.")
    ]


def _zeros_of(width: int) -> Any:
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden.new_zeros(*hidden[..., -1:, :].shape[:-1], width)

    return forward
