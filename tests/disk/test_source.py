"""source.py: headers against the safetensors library, damaged inputs, index, side files, hub errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quarkcli.disk import headers as headers_module
from quarkcli.disk.headers import DTYPES, read_tensors
from quarkcli.disk.source import Source
from quarkcli.errors import AccessError, ModelError, QuarkError, ResourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with exactly this header (object, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def all_dtypes() -> dict[str, torch.Tensor]:
    """One tensor of every dtype we know, plus an empty one and a scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, (_, torch_name) in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == "BOOL" else 100, (3, 16), dtype=torch.uint8, generator=generator)
        tensors[f"t.{dtype}"] = raw.view(getattr(torch, torch_name))
    return tensors | {"empty": torch.zeros(0, 5, dtype=torch.bfloat16), "scalar": torch.tensor(2.5)}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with config.json only."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}\r\n', newline="")
    return folder


def sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    """Two shards `a` (x, y) and `b` (z) with their index."""
    save_file({"x": torch.arange(4.0), "y": torch.ones(2, 2)}, folder / "a.safetensors")
    save_file({"z": torch.zeros(3)}, folder / "b.safetensors")
    weight_map = weight_map or {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_reads_every_dtype_like_the_library(model: Path) -> None:
    save_file(all_dtypes(), model / "model.safetensors", metadata={"format": "pt"})
    source = Source.open(str(model))
    expected = load_file(model / "model.safetensors")
    with safe_open(model / "model.safetensors", framework="pt") as library:
        for name, header in source.headers.items():
            view = library.get_slice(name)
            assert (header.dtype, list(header.shape)) == (view.get_dtype(), view.get_shape())
    found = source.read_many(expected)
    assert list(found) == list(expected)
    assert all(same(found[name], expected[name]) for name in expected)
    assert same(source.read("scalar"), torch.tensor(2.5))
    assert source.read("empty").shape == (0, 5)


def test_reads_in_chunks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers_module, "_READ_CHUNK", 1000)
    values = torch.arange(5001, dtype=torch.int64)
    save_file({"x": values}, model / "model.safetensors")
    source = Source.open(str(model))
    assert torch.equal(source.read("x"), values)
    source.read("x").zero_()  # memory of its own: the file and later reads are untouched
    assert torch.equal(source.read("x"), values)


def test_facts_of_a_local_model(model: Path) -> None:
    save_file({"x": torch.zeros(4)}, model / "model.safetensors")
    source = Source.open(str(model))
    assert (source.name, source.hub_id, source.commit) == ("my-model", None, None)
    assert source.config == {"model_type": "llama"}
    assert source.config_text.endswith("}\r\n")
    assert source.files == {"model.safetensors": (model / "model.safetensors").stat().st_size}
    assert source.headers["x"].nbytes == 16
    with pytest.raises(ModelError, match=r"y: no such tensor"):
        source.read_many(["x", "y"])
    assert Source.open(str(model)).header_digest() == source.header_digest()
    save_file({"x": torch.zeros(2, 2)}, model / "model.safetensors")
    assert Source.open(str(model)).header_digest() != source.header_digest()


def test_shards_of_an_index_in_file_order(model: Path) -> None:
    source = Source.open(str(sharded(model)))
    assert list(source.headers) == ["x", "y", "z"]
    assert source.headers["z"].file == "b.safetensors"
    assert list(source.read_many(["z", "x"])) == ["z", "x"]
    assert source.read("x").tolist() == [0, 1, 2, 3]


def test_opens_without_torch(model: Path) -> None:
    save_file({"x": torch.zeros(4)}, model / "model.safetensors")
    code = "import sys; from quarkcli.disk.source import Source; s = Source.open(sys.argv[1]); s.header_digest(); "
    code += "import quarkcli.disk.writer, quarkcli.disk.journal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(model)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry()}, 3, "its header says"),
        ({"a": entry()}, 5, "its header says"),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, 6, "overlap"),
        ({"a": entry(), "b": entry(offsets=(5, 9))}, 9, "hole"),
        ({"a": entry(shape=(5,))}, 4, "has 4 bytes, but its shape and dtype need 5"),
        ({"a": entry("F32", (2,))}, 4, "need 8"),
        ({"a": entry("F7")}, 4, "unknown dtype 'F7'"),
        ({"a": entry(["U8"])}, 4, "unknown dtype"),
        ({"a": entry(shape=(-4,))}, 4, "no valid shape"),
        ({"a": entry(shape=(True, 4))}, 4, "no valid shape"),
        ({"a": entry(shape=(4.0,))}, 4, "no valid shape"),
        ({"a": entry(offsets=(4, 0))}, 4, "has -4 bytes"),
        ({"a": entry(offsets=(0, 4, 8))}, 4, "no valid shape"),
        ({"a": 7}, 4, "no valid shape"),
        ({"a": {"dtype": "U8"}}, 4, "no valid shape"),
        ({"__metadata__": {"format": "pt"}}, 0, "no tensors"),
        ([1], 4, "not an object"),
        (b"{oops", 4, "not valid"),
        (b"\xff\xfe", 4, "not valid"),
        (b'{"a": 1, "a": 2}', 4, "a name appears twice"),
        (b"[" * 100_000, 4, "not valid"),
        (b'{"a": ' + b"9" * 5000 + b"}", 4, "not valid"),
    ],
)
def test_damaged_header_is_refused(model: Path, header: Any, size: int, message: str) -> None:
    raw_file(model / "model.safetensors", header, bytes(size))
    with pytest.raises(ModelError, match=message) as caught:
        Source.open(str(model))
    assert str(model) in str(caught.value)


@pytest.mark.parametrize(("start", "size"), [(b"", 0), (b"1234567", 7), (10**15, 8), (100_000_001, 200_000_000)])
def test_impossible_header_length_is_refused(model: Path, start: bytes | int, size: int) -> None:
    with (model / "model.safetensors").open("wb") as stream:
        stream.write(start if isinstance(start, bytes) else start.to_bytes(8, "little"))
        stream.truncate(size)  # sparse: takes no disk
    with pytest.raises(ModelError, match="header length"):
        Source.open(str(model))


@pytest.mark.parametrize("keep", [4, 8, 40, -1])
def test_truncated_file_is_refused(model: Path, keep: int) -> None:
    save_file({"x": torch.zeros(100)}, model / "model.safetensors")
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(ModelError):
        Source.open(str(model))


def test_file_that_changes(model: Path) -> None:
    path = model / "model.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    source = Source.open(str(model))
    os.truncate(path, 200)
    with pytest.raises(ModelError, match="changed since"):
        source.read("x")
    with pytest.raises(ModelError, match="ended inside x"):  # what a change during the read itself looks like
        read_tensors(path, list(source.headers.values()))
    path.unlink()
    with pytest.raises(ModelError, match="missing"):
        source.read("x")


@pytest.mark.parametrize("file", ["/etc/a.safetensors", "../a.safetensors", "sub/../../a.safetensors"])
def test_index_must_stay_in_the_directory(model: Path, file: str) -> None:
    with pytest.raises(ModelError, match="outside the model directory"):
        Source.open(str(sharded(model, {"x": file})))


@pytest.mark.parametrize("weight_map", [{}, 3, None, {"x": 7}, {"x": "model.bin"}, {"x": ""}, {"x": "a\0.safetensors"}])
def test_index_must_name_safetensors_files(model: Path, weight_map: Any) -> None:
    (sharded(model) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="weight_map"):
        Source.open(str(model))


def test_missing_shard(model: Path) -> None:
    (sharded(model) / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors: this weight file is missing"):
        Source.open(str(model))
    (model / "b.safetensors").symlink_to(model / "gone")
    with pytest.raises(ModelError, match="target is gone"):
        Source.open(str(model))


def test_tensor_not_where_the_index_says(model: Path) -> None:
    for weight_map in ({"w": "a.safetensors", "z": "b.safetensors"}, {"x": "b.safetensors", "y": "a.safetensors"}):
        with pytest.raises(ModelError, match="the index says that it is in"):
            Source.open(str(sharded(model, weight_map)))


def test_tensor_in_two_shards(model: Path) -> None:
    sharded(model)
    save_file({"z": torch.zeros(3), "x": torch.zeros(1)}, model / "b.safetensors")
    with pytest.raises(ModelError, match=r"x: is in both a\.safetensors and b\.safetensors"):
        Source.open(str(model))
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="is in both"):
        Source.open(str(model))


def test_which_files_make_the_model(model: Path) -> None:
    save_file({"x": torch.zeros(3)}, sharded(model) / "model.safetensors")
    with pytest.raises(ModelError, match="an index that does not name it"):
        Source.open(str(model))
    (model / "model.safetensors.index.json").unlink()
    assert list(Source.open(str(model)).files) == ["model.safetensors"]
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    assert list(Source.open(str(model)).files) == ["a.safetensors", "b.safetensors"]
    (model / "a.safetensors").rename(model / "m-00001-of-00003.safetensors")
    with pytest.raises(ModelError, match="1 of 3 weight files"):
        Source.open(str(model))


def test_directories_that_are_no_models(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    cases: list[tuple[str, type[QuarkError], str]] = [
        ("nothing", AccessError, "no such directory"),
        ("file", AccessError, "is a file"),
        ("empty", ModelError, r"no config\.json"),
        ("my-model", ModelError, r"no \.safetensors files"),
    ]
    for name, kind, message in cases:
        with pytest.raises(kind, match=message):
            Source.open(str(tmp_path / name))
    (model / "model.Q4.gguf").touch()
    with pytest.raises(ModelError, match=r"only model\.Q4\.gguf"):
        Source.open(str(model))


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("checkpoint-500/config.json", "give the folder of the model: {}/checkpoint-500"),
        ("snapshots/abc/config.json", "give the folder of the model: {}/snapshots/abc"),
        ("adapter_config.json", "merge the adapter first (merge_and_unload of peft, then save_pretrained)"),
        (".quark-state/lock", "run the same command again to finish the run in this folder"),
        ("config.yaml", ""),
    ],
)
def test_a_folder_without_config_says_what_was_meant(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        Source.open(str(tmp_path))
    assert caught.value.hint.startswith(hint.format(tmp_path)) and bool(caught.value.hint) == bool(hint)


def test_an_output_that_is_not_finished_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.partial" / ".quark-state").mkdir(parents=True)
    for local in (True, False):
        with pytest.raises(AccessError, match="there is no such directory") as caught:
            Source.open("out", local=local)
        assert caught.value.hint == "run the same command again to finish the run in out.partial"
    with pytest.raises(AccessError) as caught:
        Source.open("other", local=True)
    assert caught.value.hint == ""


def test_only_pickle_files_are_named(model: Path) -> None:
    for index in range(7):
        (model / f"pytorch_model-{index}.bin").touch()
    with pytest.raises(ModelError, match=r"(?m)pytorch_model-0\.bin, .*\.\.\.$") as caught:
        Source.open(str(model))
    assert "foreign code" in caught.value.what
    assert "convert it to safetensors" in caught.value.hint


def test_bad_config_says_line_and_column(model: Path) -> None:
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")
    for content, message in [
        (b'{\n  "a": 1,,\n}', r"config\.json:2:10: not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "JSON object"),
    ]:
        (model / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            Source.open(str(model))


def test_unreadable_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", lambda self: b"{}")
    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(AccessError, match=r"model\.safetensors: cannot be read: Permission denied"):
        Source.open(str(model))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return folder


def hub_snapshot(cache: Path, model: Path) -> Path:
    """Move a model into the hub's cache layout."""
    repo = cache / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        file.rename(repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def test_hub_snapshot_in_the_cache(cache: Path, model: Path) -> None:
    snapshot = hub_snapshot(cache, sharded(model))
    for asked in ("org/tiny", str(snapshot)):
        source = Source.open(asked, offline=True)
        assert (source.name, source.hub_id, source.commit) == ("tiny", "org/tiny", COMMIT)
        assert source.read("x").tolist() == [0, 1, 2, 3]
    with pytest.raises(AccessError, match=r"org/none: there is no such directory, and offline revision main"):
        Source.open("org/none", offline=True)


def test_hub_download_leaves_other_weights_out(cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: ["config.json", "pytorch_model.bin"])
    with pytest.raises(ModelError, match=r"org/tiny: .*pytorch_model\.bin"):
        Source.open("org/tiny", revision="v1")
    assert (asked["hub_id"], asked["revision"], asked["local_files_only"]) == ("org/tiny", "v1", False)
    names = ["a.safetensors", "x.bin", "original/a.pth", "sub/b.gguf", "tokenizer.json", "consolidated.00.safetensors"]
    left = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=asked["ignore_patterns"])
    assert list(left) == ["a.safetensors", "tokenizer.json"]


def http_error(kind: Any, status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(headers={}), url="", text="")
    error: Exception = kind("bad hf_secret", response=response)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "message", "hint"),
    [
        (http_error(hub_errors.GatedRepoError, 403), AccessError, "gated", "a token was found"),
        (http_error(hub_errors.RepositoryNotFoundError, 404), AccessError, "no such model on the hub", "HF_TOKEN"),
        (http_error(hub_errors.RevisionNotFoundError, 404), AccessError, "no revision main", ""),
        (http_error(hub_errors.HfHubHTTPError, 401), AccessError, "refused access", "a token was found"),
        (http_error(hub_errors.HfHubHTTPError, 500), AccessError, r"failed: HfHubHTTPError: bad \*\*\*", "network"),
        (hub_errors.LocalEntryNotFoundError("no hf_secret"), AccessError, "the hub cannot be reached", "network"),
        (ConnectionError("down"), AccessError, "the hub cannot be reached", "network"),
        (ValueError("bad hf_secret"), AccessError, r"failed: ValueError: bad \*\*\*", "network"),
        (OSError(28, "No space left on device"), ResourceError, "disk is full", "HF_HOME"),
    ],
)  # fmt: skip
def test_hub_errors(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[QuarkError], message: str, hint: str
) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(kind, match=message) as caught:
        Source.open("org/m")
    assert hint in caught.value.hint
    assert "hf_secret" not in str(caught.value) + caught.value.hint
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(kind) as without:
        Source.open("org/m")
    assert without.value.hint == caught.value.hint.replace("a token was found", "no token was found")
