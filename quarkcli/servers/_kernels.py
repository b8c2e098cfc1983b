"""Says how a server runs a format on a generation of GPUs: from rows that each server has. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

Way = Literal["fast", "weight-only", "emulated"]
# What the words mean, for people.
MEANING: dict[Way, str] = {
    "fast": "products in this format",
    "weight-only": "weights stay small in memory; products are in 16 bits",
    "emulated": "decoded to 16 bits before each product; it saves memory, no time",
}

NVIDIA = "ampere ada hopper blackwell"
AMD = "cdna2 cdna3 cdna4"
EVERY = f"{NVIDIA} {AMD}"


class Kernel(NamedTuple):
    """One row: which formats, and the generations on which each way is taken, as words.

    weight, read   globs on the names of formats (`dialects._kinds`); a cache and attention are named by what they are
    """

    weight: str
    read: str
    fast: str = ""
    weights: str = ""
    emulated: str = ""


def way(kernels: Iterable[Kernel], kinds: tuple[str, str], generation: str) -> Way | None:
    """Returns how formats are run on a generation: by the first row that they fit; None: not at all."""
    for row in kernels:
        if fnmatchcase(kinds[0], row.weight) and fnmatchcase(kinds[1], row.read):
            found: tuple[tuple[Way, str], ...] = (
                ("fast", row.fast), ("weight-only", row.weights), ("emulated", row.emulated)
            )  # fmt: skip
            return next((name for name, where in found if generation in where.split()), None)
    return None
