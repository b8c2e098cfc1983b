"""Says how a server runs a format on a generation of GPUs: from rows that each server has. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

Way = Literal["fast", "weight-only", "emulated"]
# What the words mean, for people.
MEANING: dict[Way, str] = {
    "fast": "multiplies in this format",
    "weight-only": "keeps weights small in memory and multiplies in 16 bits",
    "emulated": "decodes to 16 bits before each product, which saves memory but no time",
}

NVIDIA = "ampere ada hopper blackwell"
AMD = "cdna2 cdna3 cdna4"
EVERY = f"{NVIDIA} {AMD}"


class Kernel(NamedTuple):
    """One row: which formats, and the generations on which each way is taken, as words.

    weight, read   globs on the names of formats (`dialects._kinds`); a cache and attention are named by what they are
    read_in        the file, and the class or function, of the server's source in which the row was read
    """

    weight: str
    read: str
    fast: str = ""
    weights: str = ""
    emulated: str = ""
    read_in: str = ""


def fits(kinds: tuple[str, str], weight: str, read: str) -> bool:
    """True when the formats of a weight and of what it reads fit a pair of globs."""
    return fnmatchcase(kinds[0], weight) and fnmatchcase(kinds[1], read)


def row(kernels: Iterable[Kernel], kinds: tuple[str, str]) -> Kernel | None:
    """Returns the first row that formats fit; None: there is none."""
    return next((one for one in kernels if fits(kinds, one.weight, one.read)), None)


def way(kernels: Iterable[Kernel], kinds: tuple[str, str], generation: str) -> Way | None:
    """Returns how formats are run on a generation: by the first row that they fit; None: not at all."""
    found = row(kernels, kinds)
    if found is None:
        return None
    ways: tuple[tuple[Way, str], ...] = (
        ("fast", found.fast), ("weight-only", found.weights), ("emulated", found.emulated)
    )  # fmt: skip
    return next((name for name, where in ways if generation in where.split()), None)
