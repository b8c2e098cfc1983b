"""Element formats: values on a unit scale <-> codes. Each module has `code_dtype`, `round_`, `encode_`, `decode_`."""

from __future__ import annotations

from types import ModuleType

from quarkcli.numerics.formats import integer, minifloat
from quarkcli.spec import Element

_BY_KIND: dict[str, ModuleType] = {"integer": integer, "float": minifloat}


def codec(element: Element) -> ModuleType:
    """The module that codes `element`."""
    return _BY_KIND[element.kind]
