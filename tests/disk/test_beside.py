"""Checkpoints of older tools, whose config.json is silent: a file beside it says how they are quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quarkcli import dialects
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.disk.verify import directory
from quarkcli.errors import ModelError
from tests import runs

GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "model_file_base_name": "gptq_model-4bit-32g"}
AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
# dialect, scheme, the file and what it says, as AutoGPTQ and AutoAWQ wrote them
OLD: list[tuple[str, str, str, dict[str, Any]]] = [
    ("gptq", "int4_wo_32", "quantize_config.json", GPTQ),
    ("gptq", "int4_wo_32", "quantize_config.json", {**GPTQ, "quant_method": "gptq"}),
    ("awq", "uint4_wo_32", "quant_config.json", AWQ),
    ("awq", "uint4_wo_32", "quantize_config.json", AWQ),
    ("awq", "uint4_wo_32", "quantize_config.json", {**AWQ, "quant_method": "awq"}),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    return {
        dialect: runs.run("demo", folder / dialect, scheme=scheme, dialect=dialect).folder
        for dialect, scheme in {row[0]: row[1] for row in OLD}.items()
    }


def silent(checkpoint: Path, folder: Path, file: str, says: object) -> Path:
    """The checkpoint without its own records, and with one file that says something of its quantization."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("quark", "quant*_config.json", "quantization*"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(says))
    return folder


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(Source.open(str(folder)))


@pytest.mark.parametrize(("dialect", "scheme", "file", "says"), OLD)
def test_a_file_beside_a_silent_config_is_read(made, tmp_path, dialect, scheme, file, says):
    folder = silent(made[dialect], tmp_path / "model", file, says)
    found, wanted = opened(folder), opened(made[dialect])
    assert found.reader is wanted.reader and found.view == wanted.view
    assert directory(str(folder))


@pytest.mark.parametrize("row", [OLD[0], OLD[2]])
def test_it_is_not_copied_beside_another_dialect(made, tmp_path, row):
    dialect, _, file, says = row
    folder = silent(made[dialect], tmp_path / "model", file, says)
    again = runs.run(folder, tmp_path / "again", scheme="fp8_block128", dialect="compressed-tensors")
    assert again.report["source"]["method"] == dialect
    assert not {path.name for path in again.folder.iterdir()} & set(dialects.files_beside())


def test_config_json_comes_first(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made["gptq"], folder)
    (folder / "quant_config.json").write_text(json.dumps({**AWQ, "quant_method": "awq"}))
    assert opened(folder).view == opened(made["gptq"]).view


def test_what_such_a_file_says_wrong_is_told(made, tmp_path):
    folder = silent(made["gptq"], tmp_path / "model", "quantize_config.json", {**GPTQ, "quant_method": "hqq"})
    with pytest.raises(ModelError, match="quantized with 'hqq', which quark cannot read"):
        opened(folder)


def test_codes_that_no_file_speaks_of_are_refused(made, tmp_path):
    folder = silent(made["gptq"], tmp_path / "model", "of_another_tool.json", GPTQ)
    with pytest.raises(ModelError):
        runs.run(folder, tmp_path / "again", scheme="fp8_block128")


def test_a_file_beside_a_model_that_is_not_quantized_says_nothing(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "model" / "quantize_config.json").write_text("of another checkpoint")
    assert not opened(tmp_path / "model").quantized
