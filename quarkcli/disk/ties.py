"""Tells whether a head and the embedding that config.json says it is have the same values, where a file holds both.

Servers that tie them drop the head; transformers unties them when they differ. So they must not differ under the flag.
"""

from __future__ import annotations

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.disk.values import pieces
from quarkcli.errors import CheckError
from quarkcli.family import TIED


def same_values(source: Source, one: str, other: str) -> bool:
    """Returns whether two tensors of the files have the same bytes, dtype and shape."""
    import numpy as np

    first, second = source.headers[one], source.headers[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if source.pickled:
        tensors = source.read_many([one, other])
        return bool((tensors[one] == tensors[other]).all())
    return all(map(np.array_equal, pieces(source, first), pieces(source, second)))


def check(checkpoint: Checkpoint) -> list[str]:
    """Returns the check made, none where it is not needed. Raises CheckError for a head that is not the embedding."""
    doubled = checkpoint.layout.doubled_head
    if doubled is None:
        return []
    head, embedding = doubled
    tensors = [_stored(checkpoint, name) for name in doubled]
    same = len(tensors[0]) == len(tensors[1]) and (tensors[0] == [head]) == (tensors[1] == [embedding])
    if not same or not all(same_values(checkpoint.source, *pair) for pair in zip(*tensors, strict=True)):
        what = f"config.json says that {head} is {embedding}, and the files hold other values for it"
        raise CheckError(what, where=TIED, hint=f"set {TIED} to false, or write it again", kind="E-CHECK-MODEL")
    return [f"{head} has the values of {embedding}, as config.json says"]


def _stored(checkpoint: Checkpoint, name: str) -> list[str]:
    """Returns the tensors of the files that a weight is: itself, or its codes and scales."""
    quantized = checkpoint.view.targets.get(name.removesuffix(".weight"))
    return [name] if quantized is None else list(quantized.tensors)
