"""Finds a quantization that a file beside config.json describes, if config.json describes none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quarkcli import dialects, family
from quarkcli.dialects.base import CONFIG_KEY
from quarkcli.documents.model import Quantization
from quarkcli.documents.shape import Shape
from quarkcli.family import HeaderLike

Read = Callable[[Path, type[Shape]], tuple[str, dict[str, Any]]]


def described(folder: Path, config: dict[str, Any], headers: Mapping[str, HeaderLike], read: Read) -> dict[str, Any]:
    """Returns the object that such a file holds, as a `quantization_config` to add to the config; else {}.

    A file that does not name its method is of the dialect that the tensors are packed as.

    read   gives the text and the object of a JSON file
    """
    if family.quantization(config):
        return {}
    for reader in dialects.readers():
        path = next((folder / file for file in reader.beside if (folder / file).is_file()), None)
        if path is not None and reader.packs(headers):
            found = read(path, Quantization)[1]
            named = "quant_method" in found or reader.matches(found, headers)
            return {CONFIG_KEY: found if named else {"quant_method": reader.quant_method, **found}}
    return {}
