"""Finds NaN and infinity in kept tensors: refuses them in parameters, mentions them in buffers.

A quantized weight is refused by its own scale rule. A copied tensor is looked at while it is in memory anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

OnNonfinite = Literal["stop", "keep"]
HINT = "repair the original model, or use --on-nonfinite keep to accept it"

# Leaves of names that are tables and masks, which the model makes anew; -inf is usual there.
_BUFFER = re.compile(
    r"(\w*_)?mask|masked_bias|(\w*_)?inv_freq|freqs_cis|(cos|sin)_cached?|position_ids|invalid_logits_value"
)
_SHOWN = 5


@dataclass
class NonFinite:
    """The non-finite values of a model's kept tensors: name -> how many and where the first is.

    roles       role of every tensor that the family knows, see `Layout.tensor_roles`; a tensor without one is a
                parameter, one of role `other` is not known
    parameters  tensors that the model computes with: norms, embeddings, heads, biases, routers, kept linears
    others      buffers, and tensors that the family does not know
    """

    roles: Mapping[str, str]
    parameters: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def look(self, name: str, tensor: Tensor) -> None:
        """Notes a tensor if it holds NaN or infinity."""
        from quarkcli.numerics.finite import is_finite

        if not is_finite(tensor):
            self.note(name, tensor.ndim, _describe(tensor))

    def note(self, name: str, ndim: int, what: str) -> None:
        """Notes a tensor that holds NaN or infinity; `what`: how many, and where the first is."""
        known = self.roles.get(name, "parameter") != "other" and not is_buffer(name, ndim)
        (self.parameters if known else self.others)[name] = what

    def first(self) -> tuple[str, str] | None:
        """Returns (name, sentence) of the first parameter."""
        return next(
            ((name, f"NaN or inf in a tensor that is not quantized: {what}") for name, what in self.parameters.items()),
            None,
        )


def is_buffer(name: str, ndim: int) -> bool:
    """True for tables and masks, told by their names: a `bias` with several axes is GPT-2's causal mask."""
    leaf = name.rpartition(".")[2]
    return bool(_BUFFER.fullmatch(leaf)) or (leaf == "bias" and ndim > 2)


def warning(names: Iterable[str], what: str) -> str | None:
    """Returns one sentence about tensors that hold NaN or infinity and are taken as they are; None without any."""
    listed = list(dict.fromkeys(names))
    if not listed:
        return None
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"NaN or inf in {len(listed)} {what}, kept as they are: {', '.join(listed[:_SHOWN])}{more}"


def warnings(parameters: Iterable[str], others: Iterable[str]) -> list[str]:
    """Returns the sentences about both kinds."""
    both = (warning(parameters, "kept parameters"), warning(others, "buffers or unknown tensors"))
    return [text for text in both if text is not None]


def describe(bad: int, count: int, place: Iterable[int]) -> str:
    """Returns how many values of a tensor are NaN or infinite, and where the first is."""
    return f"{bad:,} of {count:,} values, the first at {[*place]}"


def place(index: int, shape: Sequence[int]) -> list[int]:
    """Returns the place of a value by axes, from its number in a flat tensor."""
    found: list[int] = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        found.insert(0, at)
    return found


def _describe(tensor: Tensor) -> str:
    from quarkcli.numerics.finite import bad_values

    bad = bad_values(tensor).nonzero()
    return describe(len(bad), tensor.numel(), bad[0].tolist())
