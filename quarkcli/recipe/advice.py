"""Reads the default advice: which algorithms `auto` stands for, by format, and which schemes `quark init` chooses.

Reads `recipes/advice.yaml` and `recipes/choices.yaml`; torch-free.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache

from quarkcli.recipe import catalog, schema
from quarkcli.spec import TensorSpec

AUTO = "auto"  # stands for the steps of the advice, in place of a step


@cache
def rows() -> tuple[schema.AdviceRow, ...]:
    """Returns the rows of the table; the first that a format fits holds for it."""
    document = catalog.document(catalog.built_in_folder() / "advice.yaml")
    return tuple(schema.validate(schema.AdviceModel, document).rows)


@cache
def choices() -> tuple[schema.ChoiceRow, ...]:
    """Returns the schemes that `quark init` chooses among, best first."""
    document = catalog.document(catalog.built_in_folder() / "choices.yaml")
    return tuple(schema.validate(schema.ChoicesModel, document).rows)


def of(weight: TensorSpec, read: TensorSpec | None) -> schema.AdviceRow:
    """Returns the row for a weight's spec and that of its input, None for one that stays as it is."""
    codes, state = weight.codes, _state(read)
    for row in rows():
        fits = any(fnmatchcase(codes.element, pattern) for pattern in row.elements)
        if fits and (row.inputs is None or state in row.inputs):
            return row
    raise AssertionError("the last row of the advice must fit every format")


def _state(read: TensorSpec | None) -> str:
    if read is None:
        return "kept"
    return "static" if read.is_static else "dynamic"
