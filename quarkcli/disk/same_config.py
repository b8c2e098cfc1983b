"""Compares config.json and generation_config.json of a checkpoint with those of the model that it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarkcli.disk.source import Source
from quarkcli.errors import CheckError, some
from quarkcli.events import Listener, Message
from quarkcli.family import TIED, without_quantization

GENERATION = "generation_config.json"
# What tools write anew with each file, or what says how a file is run: no value that a module computes with.
_FREE = {"_name_or_path", "name_or_path", "transformers_version", "use_cache", "_attn_implementation"}
# What users set on purpose, or what only says how values are stored. A change is told, and is no error.
_TOLD = {"dtype", "torch_dtype", "max_position_embeddings", "architectures", "auto_map"}
_TOKENS = "_token_id"
# Transforms part head and embedding; `disk.ties` compares the key with the files.
_OURS = {TIED}


def check(checkpoint: Source, original: Source, tell: Listener) -> str:
    """Returns the check made. Warns of changes that leave the model as it is; raises CheckError for all others.

    Only keys that both files have are compared: tools add defaults, and leave out what is one.
    """
    found = [*_changed(without_quantization(checkpoint.config), without_quantization(original.config))]
    wrong = [str(change) for change in found if not change.is_meant]
    told = [str(change) for change in found if change.is_meant]
    told += map(str, _changed(_generation(checkpoint.folder), _generation(original.folder), f"{GENERATION}: "))
    if told:
        tell(Message(f"{len(told)} settings are not those of the original model: {some(told)}", "warning"))
    if wrong:
        what = f"{len(wrong)} keys of config.json have other values than in the original model: {some(wrong)}"
        hint = "put the values of the original config.json back, unless you changed them on purpose"
        raise CheckError(what, hint=hint, kind="E-CHECK-VALUES")
    return "config.json has the values of the original model" + (", but for the settings named" if told else "")


@dataclass(frozen=True)
class _Change:
    """A key of a file that has another value in the original's."""

    path: str
    key: str
    is_now: Any
    was: Any

    @property
    def is_meant(self) -> bool:
        """True where people make such a change on purpose, or null stands for a default."""
        return self.key in _TOLD or self.key.endswith(_TOKENS) or self.is_now is None or self.was is None

    def __str__(self) -> str:
        return f"{self.path} is {_shown(self.is_now)} and was {_shown(self.was)}"


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any], before: str = "") -> Iterator[_Change]:
    """Yields each key of both that differs, of inner objects too."""
    for key in theirs:
        if key not in ours or key in _FREE | _OURS:
            continue
        mine, other = ours[key], theirs[key]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _changed(mine, other, f"{before}{key}.")
        elif mine != other and json.dumps(mine) != json.dumps(other):  # NaN equals nothing
            yield _Change(f"{before}{key}", key, mine, other)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _generation(folder: Path) -> dict[str, Any]:
    """Returns generation_config.json; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / GENERATION).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
