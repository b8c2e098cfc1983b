"""A head that config.json ties to the embedding, and that the files have as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quarkcli.disk import ties
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError
from tests import runs

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def model(to: Path, same: bool) -> Path:
    """The embedded model, tied as its config says, with a head in the file: the embedding, or other values."""
    shutil.copytree(EMBEDDED, to)
    tensors = load_file(to / "model.safetensors")
    tensors[TABLE if same else HEAD] = tensors[HEAD].clone() if same else -tensors[HEAD]
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return to


def tied(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


@pytest.mark.parametrize(
    ("same", "options", "stays"),
    [
        (True, {"scheme": "mxfp4"}, True),
        (True, {"scheme": "int8_dynamic", "algorithm": "rotation"}, False),
        (True, {"scheme": "int8_dynamic", "unprotect": ["head"]}, False),
        (True, {"scheme": "mxfp4", "unprotect": ["head", "embedding"]}, True),
        (False, {"scheme": "mxfp4"}, False),
        (False, {"scheme": "mxfp4", "unprotect": ["head", "embedding"]}, False),
    ],
    ids=["as they were", "rotated", "one is quantized", "both are", "they differ", "both, and they differ"],
)
def test_the_flag_says_what_the_files_hold(same: bool, options: dict[str, Any], stays: bool, tmp_path: Path) -> None:
    made = runs.run(model(tmp_path / "m", same), tmp_path / "out", **options)
    assert tied(made.folder) is stays
    assert any("quark writes tie_word_embeddings: false" in text for text in made.report["warnings"]) is not same
    lines = ties.check(Checkpoint(Source.open(made.folder)))
    assert lines == ([f"{HEAD} has the values of {TABLE}, as config.json says"] if stays else [])
    if not stays:
        config = json.loads((made.folder / "config.json").read_text())
        (made.folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        with pytest.raises(
            CheckError, match=f"config.json says that {HEAD} is {TABLE}, and the files hold other values"
        ):
            ties.check(Checkpoint(Source.open(made.folder)))
