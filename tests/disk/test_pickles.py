"""Models in `pytorch_model.bin` files: read where that is asked for, tensors alone, and nothing in them ever runs."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quarkcli.cli import main
from quarkcli.disk import pickles
from quarkcli.disk.source import Source
from quarkcli.errors import ExitCode, ModelError
from tests import runs

ALLOW = "--allow-pickle"


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("plain") / "model")


def pickled(source: Path, folder: Path, shards: int = 1, **how: Any) -> Path:
    """The model as `save_pretrained` wrote it before safetensors."""
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    names = sorted(tensors)
    if shards == 1:
        torch.save(collections.OrderedDict(tensors), folder / pickles.SINGLE, **how)
        return folder
    files = {f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin": names[n::shards] for n in range(shards)}
    for file, own in files.items():
        torch.save({name: tensors[name] for name in own}, folder / file, **how)
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / pickles.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_bytes_are_those_of_the_model_in_safetensors(
    plainly: Path, tmp_path: Path, shards: int, zipped: bool
) -> None:
    source = pickled(plainly, tmp_path / "model", shards, _use_new_zipfile_serialization=zipped)
    (source / "training_args.bin").write_bytes(pickle.dumps({"lr": 1}))
    options: dict[str, Any] = {"scheme": "nvfp4", "calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}
    made = runs.run(source, tmp_path / "out", allow_pickle=True, **options)
    wanted = runs.run(plainly, tmp_path / "wanted", **options)
    assert runs.same_files(made.folder, wanted.folder)
    assert not list(made.folder.glob("*.bin*"))
    whole = [
        line
        for line in made.report["warnings"]
        if "are from torch before 1.6; each of them is read into memory as a whole" in line
    ]
    assert len(whole) == (0 if zipped else 1)


def test_every_command_that_reads_a_model_takes_the_flag(
    plainly: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(pickled(plainly, tmp_path / "model")), str(tmp_path / "out")
    text = str(runs.text_file(tmp_path / "text.txt"))
    short = ["--text", text, "--window", "32", "--tokens", "64"]
    commands = [
        ["plan", "--model", source, "--scheme", "mxfp4"],
        ["quantize", "--model", source, "--scheme", "mxfp4", "-o", out],
        ["inspect", source],
        ["verify", out, "--source", source],
        ["compare", out, source],
        ["eval", out, "--baseline", source, *short],
        ["models", "infer", source],
        ["data", "preview", "--calib-data", "builtin", "--model", source],
        ["recipes", "explain", "mxfp4", "lm_head", "--model", source],
        ["recipes", "validate", "mxfp4", "--model", source],
    ]
    for command in commands:
        assert main.main(command) == ExitCode.MODEL, command
        said = capsys.readouterr().err
        assert f"only pickle files, which can run foreign code when loaded: {pickles.SINGLE}" in said
        assert f"hint: use {ALLOW}, which reads only tensors and runs no code; or convert it" in said
        assert main.main([*command, ALLOW]) == ExitCode.OK, (command, capsys.readouterr().err)
        said = capsys.readouterr().err  # the next command needs the flag as well
        assert all("quark eval" in line for line in said.splitlines() if ALLOW in line)
        idle = [str(plainly) if word == source else word for word in command]
        assert main.main([*idle, *(["--overwrite"] if "-o" in command else []), ALLOW]) == ExitCode.OK, command
        assert f"{ALLOW} is not used: the model has safetensors files" in "".join(capsys.readouterr())


class Evil:
    """Runs a command when it is unpickled by anything that unpickles."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


BAD: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "code": (lambda file, mark: torch.save({"a": Evil(mark)}, file), "asks for posix.system, which could run code"),
    "code in the old format": (
        lambda file, mark: torch.save({"a": Evil(mark)}, file, _use_new_zipfile_serialization=False),
        "asks for posix.system, which could run code",
    ),
    "a bare pickle": (lambda file, mark: file.write_bytes(pickle.dumps(Evil(mark))), "was not loaded"),
    "a module": (lambda file, mark: torch.save({"a": torch.nn.Linear(2, 2)}, file), "modules.linear.Linear"),
    "a program": (
        lambda file, mark: torch.jit.script(torch.nn.Linear(2, 2)).save(str(file)),
        "a TorchScript program, which could run code",
    ),
    "a page": (lambda file, mark: file.write_text("<html>"), "holds more than tensors"),
    "nothing": (lambda file, mark: file.touch(), "torch cannot read it"),
    "a list": (lambda file, mark: torch.save([torch.ones(2)], file), "holds a list, not tensors by name"),
    "more than tensors": (
        lambda file, mark: torch.save({"a": torch.ones(2), "epoch": 3}, file),
        "holds more than weights",
    ),
    "a nested state": (lambda file, mark: torch.save({"state": {"a": torch.ones(2)}}, file), "holds more than weights"),
    "a sparse tensor": (lambda file, mark: torch.save({"a": torch.ones(2).to_sparse()}, file), "torch.sparse_coo"),
    "an unknown dtype": (
        lambda file, mark: torch.save({"a": torch.ones(2, dtype=torch.complex128)}, file),
        "cannot read a, which is of complex128",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_and_nothing_runs(
    kind: str, plainly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the environment says."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    source = pickled(plainly, tmp_path / "model")
    make, message = BAD[kind]
    (source / pickles.SINGLE).unlink()
    make(source / pickles.SINGLE, tmp_path / "mark")
    assert main.main(["plan", "--model", str(source), "--scheme", "mxfp4", ALLOW]) == ExitCode.MODEL
    said = capsys.readouterr().err
    assert message in said and f"error: {source / pickles.SINGLE}: " in said
    assert len(said.strip().splitlines()) <= 2
    assert not (tmp_path / "mark").exists()


def test_a_cut_off_file_and_one_that_changes(plainly: Path, tmp_path: Path) -> None:
    source = pickled(plainly, tmp_path / "model")
    opened = Source.open(str(source), allow_pickle=True)
    content = (source / pickles.SINGLE).read_bytes()
    (source / pickles.SINGLE).write_bytes(content[:-100])
    with pytest.raises(ModelError, match="changed since its header was read"):
        opened.read("model.norm.weight")
    with pytest.raises(ModelError, match="torch cannot read it") as caught:
        Source.open(str(source), allow_pickle=True)
    assert "download the file again" in caught.value.hint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no index", "has 2 of 3 weight files and no index"),
        ("a file lost", "this weight file is missing"),
        ("another name", "of model.norm.weight is outside the model directory"),
    ],
)
def test_indexes_are_checked_as_those_of_safetensors(damage: str, message: str, plainly: Path, tmp_path: Path) -> None:
    source = pickled(plainly, tmp_path / "model", shards=3)
    if damage == "another name":
        index = json.loads((source / pickles.INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = "../x.bin"
        (source / pickles.INDEX).write_text(json.dumps(index))
    else:
        (source / "pytorch_model-00002-of-00003.bin").unlink()
    if damage == "no index":
        (source / pickles.INDEX).unlink()
    with pytest.raises(ModelError, match=message):
        Source.open(str(source), allow_pickle=True)


def test_tensors_are_read_as_they_are(tmp_path: Path) -> None:
    """Shares of one storage, transposed ones, parameters; memory of their own."""
    whole = torch.arange(12.0).reshape(3, 4)
    own = torch.nn.Parameter(torch.ones(2))
    found = {"whole": whole, "turned": whole.T, "row": whole[1], "own": own,
             "empty": torch.empty(0, 3), "one": torch.tensor(1.5), "bf16": torch.ones(2).bfloat16()}  # fmt: skip
    file = tmp_path / pickles.SINGLE
    torch.save(found, file)
    headers = pickles.read_headers(file, file.name)
    assert {header.name: header.shape for header in headers} == {n: tuple(t.shape) for n, t in found.items()}
    assert [header.dtype for header in headers] == [*["F32"] * 6, "BF16"]
    read = pickles.read_tensors(file, headers[1:3])
    file.unlink()
    assert list(read) == ["turned", "row"]
    for name, tensor in read.items():
        assert torch.equal(tensor, found[name]) and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Of a file of 256 MiB, memory takes the tensors that are read."""
    torch.save({f"t{n}": torch.zeros(2**22) for n in range(16)}, tmp_path / pickles.SINGLE)
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from quarkcli.disk import pickles\n"
        "import torch\n"
        "file = Path(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "headers = pickles.read_headers(file, file.name)\n"
        "for header in headers:\n"
        "    pickles.read_tensors(file, [header])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / pickles.SINGLE], capture_output=True, check=True)
    taken = int(done.stdout)
    assert taken < 80 * 1024  # KiB: one tensor, mapped and copied, twice over


def test_a_quantized_checkpoint_in_pickles_is_converted_and_a_source(plainly: Path, tmp_path: Path) -> None:
    """As AutoGPTQ wrote them at first: int32 words in `.bin` files."""
    made = runs.run(plainly, tmp_path / "made", scheme="int4_wo_32", dialect="gptq")
    source = tmp_path / "source"
    shutil.copytree(made.folder, source, ignore=shutil.ignore_patterns("*.safetensors*", "quark"))
    torch.save(runs.read_all(made.folder), source / pickles.SINGLE)
    for folder, flags in ((source, [ALLOW]), (made.folder, [])):
        out = tmp_path / f"of-{folder.name}"
        assert main.main(["convert", str(folder), "--to", "compressed-tensors", "-o", str(out), *flags]) == 0
    assert runs.same_files(tmp_path / "of-source", tmp_path / "of-made")
    again = runs.run(source, tmp_path / "again", scheme="fp8_block128", exclude=["*self_attn*"], allow_pickle=True)
    assert again.report["source"]["method"] == "gptq"
