"""Gives the weights of a source: a model's files, or a quantized checkpoint that is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from quarkcli.family import HeaderLike

if TYPE_CHECKING:
    from torch import Tensor


class WeightSource(Protocol):
    """Tensors in source form: names, dtypes and shapes as the family's own files have them."""

    @property
    def headers(self) -> Mapping[str, HeaderLike]: ...

    @property
    def unlisted(self) -> Sequence[str]:
        """Returns the tensors that are in a file of the index, and that the index does not name."""

    @property
    def by_offset(self) -> bool:
        """True when tensors that are read one by one cost no more than together."""

    def stored(self, names: Iterable[str]) -> list[str]:
        """Returns the tensors of the files that these are made of."""

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors of memory of their own, on the CPU, in the order asked for."""
