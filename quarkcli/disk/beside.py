"""The quantization of a model that a file beside config.json describes, where config.json says nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quarkcli import dialects, family
from quarkcli.dialects.base import CONFIG_KEY
from quarkcli.documents.model import Quantization
from quarkcli.documents.shape import Shape

# Leaves of tensors that mean nothing unless the model is quantized; without them the file is of another checkpoint.
_SCALES = (".weight_scale", ".weight_scale_inv")
Read = Callable[[Path, type[Shape]], tuple[str, dict[str, Any]]]


def described(folder: Path, config: dict[str, Any], tensors: Iterable[str], read: Read) -> dict[str, Any]:
    """Returns the object that such a file holds, as a `quantization_config` to add to the config; else {}.

    read   gives the text and the object of a JSON file
    """
    if family.quantization(config) or not any(name.endswith(_SCALES) for name in tensors):
        return {}
    files = (folder / name for name in dialects.files_beside())
    return next(({CONFIG_KEY: read(path, Quantization)[1]} for path in files if path.is_file()), {})
