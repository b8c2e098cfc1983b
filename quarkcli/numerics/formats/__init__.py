"""Codes values on a unit scale. Each format has `code_dtype`, `round_`, `encode_`, `decode_`."""

from __future__ import annotations

from types import ModuleType

from quarkcli.numerics.formats import cast, integer, minifloat
from quarkcli.spec import Element

_BY_KIND: dict[str, ModuleType] = {"integer": integer, "float": minifloat, "cast": cast}


def codec(element: Element) -> ModuleType:
    """Returns the module that codes `element`.

        code_dtype(element) -> torch.dtype
        round_(y, element, scratch=None, zero=None) -> y     nearest values, in place
        encode_(y, element, out, scratch=None, zero=None)    codes; destroys y
        decode_(codes, element, out, zero=None) -> out       values

    `y` is float32, already divided by its scale; `zero` is a zero point that broadcasts against it, for integers only;
    `scratch` is int32 [2, *y.shape] and saves allocations where a format needs some.
    """
    return _BY_KIND[element.kind]
