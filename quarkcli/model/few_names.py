"""Imports transformers without reading its 1,800 files for the names that each of them gives.

transformers makes a list of all names of all families when it is imported, which takes as long as half of importing
torch. Here it gets those outside families and those of the automatic classes. Names of a family come with its folder,
when it is imported; those of all are read when a name is asked for that no family imported so far has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

_FAMILIES = ("transformers", "models")
_KNOWN = ("_objects", "_object_missing_backend", "_class_to_module", "_modules")  # where a lazy module looks for a name
_PLACES = ("_class_to_module", "_object_missing_backend", "_import_structure")


def import_transformers() -> None:
    """Imports transformers with few names.

    It lists folders by `os.scandir`; a release that does it in another way reads all names at once, as ever.
    """
    real = os.scandir

    def listed(path: Any = ".") -> Any:
        if Path(path).parts[-2:] == _FAMILIES:
            return nullcontext([entry for entry in list(real(path)) if entry.name == "auto"])
        return real(path)

    with mock.patch.object(os, "scandir", listed):
        import transformers.models
    from transformers.utils.import_utils import _LazyModule

    names = _Names({transformers.__file__: _FAMILIES[1], transformers.models.__file__: None}, _LazyModule)
    mine = {"__getattr__": lambda module, name: names.asked(module, name), "__dir__": lambda module: names.all(module)}
    for method, call in mine.items():
        setattr(_LazyModule, method, call)
    for module in (transformers, transformers.models):
        vars(module)["_few"] = vars(module).pop("__all__")  # asked for like any name that is not there


class _Names:
    """Answers for lazy modules that know some of their names.

    partial   their files -> what stands before the name of a family there
    lazy      their class
    """

    def __init__(self, partial: dict[str | None, str | None], lazy: Any) -> None:
        self.partial = partial
        self.lazy = lazy
        self.found, self.names = lazy.__getattr__, lazy.__dir__

    def asked(self, module: Any, name: str) -> Any:
        own = vars(module)
        if not self._is_partial(module) or any(name in own.get(place, ()) for place in _KNOWN) or _is_inner(name):
            return self.found(module, name)
        for family in _imported():
            if name in family._class_to_module and name not in family._object_missing_backend:
                return getattr(family, name)
        self._complete(module)
        return getattr(module, name)

    def all(self, module: Any) -> Any:
        if self._is_partial(module):
            self._complete(module)
        return self.names(module)

    def _is_partial(self, module: Any) -> bool:
        return module.__file__ in self.partial and "_whole" not in vars(module)

    def _complete(self, module: Any) -> None:
        """Adds the names of all families to those that the module has."""
        from transformers.utils import import_utils

        vars(module)["_whole"] = True
        for reader in (import_utils.create_import_structure_from_path, import_utils.define_import_structure):
            reader.cache_clear()
        folder = str(Path(module.__file__).parent.joinpath(*_FAMILIES[1:] if self.partial[module.__file__] else ()))
        structure = import_utils.define_import_structure(folder, self.partial[module.__file__])
        whole = self.lazy(module.__name__, module.__file__, structure)
        for place in _PLACES:
            vars(module)[place] = vars(whole)[place] | vars(module)[place]
        module._modules |= whole._modules
        module.__all__ = list({*vars(module).pop("_few", ()), *vars(module).get("__all__", ()), *whole.__all__})


def _is_inner(name: str) -> bool:
    """True for what introspection asks every module for."""
    return name.startswith("__") and name != "__all__"


def _imported() -> Iterator[Any]:
    """Yields the folders of families that were imported."""
    start = ".".join((*_FAMILIES, ""))
    for name, module in list(sys.modules.items()):
        if name.startswith(start) and hasattr(module, "_class_to_module"):
            yield module
