"""writer.py: bytes against the safetensors library, durability under failures, modes, publishing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quarkcli.disk.headers import DTYPES
from quarkcli.disk.writer import (
    WrittenFile,
    atomic_write_json,
    atomic_write_text,
    disk_errors,
    dtype_text,
    file_size,
    output_state,
    partial_path,
    plan_files,
    publish,
    write_index,
    write_part,
    write_tensors,
)
from quarkcli.errors import ResourceError, UsageError


def zeros(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, DTYPES[dtype][1]))


def sample() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int = errno.ENOSPC) -> None:
    """Let os.<name> fail with this error number."""

    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refuse)


# ---- sizes

# `__metadata__` is reserved by the format
NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 11), max_size=4).map(tuple)
INFOS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=12)


@settings(max_examples=150, deadline=None)
@given(infos=INFOS)
def test_file_size_is_what_the_library_writes(tmp_path_factory: pytest.TempPathFactory, infos: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "size.safetensors"
    save_file({name: zeros(*info) for name, info in infos.items()}, path, metadata={"format": "pt"})
    assert file_size((name, dtype, shape) for name, (dtype, shape) in infos.items()) == path.stat().st_size


def test_layout_follows_the_library_for_every_dtype(tmp_path: Path) -> None:
    """Digits of offsets make the size depend on the order of the dtypes; DTYPES must have the library's."""
    save_file({dtype: zeros(dtype, (8,)) for dtype in DTYPES}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.offset_keys() == list(DTYPES)[::-1]


def test_dtype_texts_are_the_librarys(tmp_path: Path) -> None:
    for text, (_, name) in DTYPES.items():
        assert dtype_text(getattr(torch, name)) == text
        save_file({"x": zeros(text, (1,))}, tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
            assert file.get_slice("x").get_dtype() == text


# ---- parts


def test_written_part_reads_back(tmp_path: Path) -> None:
    [written] = write_part(tmp_path, "block-3", sample())
    path = tmp_path / "model-block-3.safetensors"
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == [written.file]
    assert written.size == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.tensors == {"a": 10, "b": 24, "c": 8}
    assert WrittenFile(**json.loads(json.dumps(written.record()))) == written
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in sample().items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    for folder, tensors in (("one", sample()), ("two", dict(reversed(sample().items())))):
        (tmp_path / folder).mkdir()
        write_part(tmp_path / folder, "x", tensors, limit=30)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["model-x-00002.safetensors", "model-x-00003.safetensors", "model-x.safetensors"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=12), limit=st.integers(1, 60))
def test_plan_is_what_is_written(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    folder = tmp_path_factory.mktemp("plan")
    tensors = {f"t{index}": zeros("U8", (size,)) for index, size in enumerate(sizes)}
    planned = plan_files("x", ((f"t{index}", "U8", (size,)) for index, size in enumerate(sizes)), limit)
    written = write_part(folder, "x", tensors, limit)
    assert [(f.file, f.size, f.tensors) for f in planned] == [(f.file, f.size, f.tensors) for f in written]
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == {f.file: f.size for f in planned}
    assert sorted(name for file in planned for name in file.tensors) == sorted(tensors)
    assert all(sum(file.tensors.values()) <= limit or len(file.tensors) == 1 for file in planned)


def test_split_names_and_limit() -> None:
    infos = [("a", "F32", (10,)), ("b", "F32", (10,)), ("c", "F32", (100,)), ("d", "F32", (1,))]
    files = plan_files("tail", infos, limit=80)
    assert [(file.file, list(file.tensors)) for file in files] == [
        ("model-tail.safetensors", ["a", "b"]),
        ("model-tail-00002.safetensors", ["c"]),
        ("model-tail-00003.safetensors", ["d"]),
    ]


def test_no_tensors_no_files(tmp_path: Path) -> None:
    assert write_part(tmp_path, "rest", {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("slug", ["", "a/b", "../x", ".x", "a b"])
def test_bad_slug(slug: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        plan_files(slug, [])


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "tied": base, "row": base[1], "column": base[:, 1], "turned": base.T, "e": base[:0]}
    write_part(tmp_path, "x", tensors)
    found = load_file(tmp_path / "model-x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_part(tmp_path, "x", sample())
        atomic_write_text(tmp_path / "text", "x")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_file_is_synced_before_and_folder_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace

    def noting_sync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noting_replace(old: Path, new: Path) -> None:
        steps.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_part(tmp_path, "x", sample())
    atomic_write_text(tmp_path / "text", "x")
    assert steps == ["file", "rename", "folder"] * 2


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("library")
    made = {name: zeros(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items() if _is_text(name)}
    for number, tensor in enumerate(made.values()):
        tensor.view(-1).view(torch.uint8).fill_(number + 1) if tensor.numel() else None
    write_tensors(folder / "ours", made)
    save_file(made, folder / "theirs", metadata={"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def _is_text(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name and name != "__metadata__"


# ---- failures


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_tensors(tmp_path / "x.safetensors", sample())
    atomic_write_text(tmp_path / "text", "old")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    fail(monkeypatch, step)
    with pytest.raises(ResourceError, match=r"x\.safetensors: the disk is full: [\d,]+ bytes needed, [\d,]+ free"):
        write_tensors(tmp_path / "x.safetensors", {"new": torch.zeros(100)})
    with pytest.raises(ResourceError, match="text: the disk is full: 3 bytes needed"):
        atomic_write_text(tmp_path / "text", "new")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A real write error, in the middle of a tensor."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"model-x\.safetensors: writing failed: File too large") as caught:
            write_part(tmp_path, "x", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_is_said_where_it_is_known(tmp_path: Path) -> None:
    """A folder that could not be made asked for '0 bytes'."""
    with pytest.raises(ResourceError) as caught, disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == f"{tmp_path}: the disk is full"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full: 5,000 bytes needed"),
        (errno.EDQUOT, "quota exceeded: 5,000 bytes needed"),
        (errno.EACCES, "cannot be written: Permission denied"),
        (errno.EROFS, "cannot be written: Read-only file system"),
        (errno.EIO, "writing failed: Input/output error"),
    ],
)
def test_disk_errors(tmp_path: Path, number: int, message: str) -> None:
    path = tmp_path / "not" / "yet" / "there"
    with pytest.raises(ResourceError, match=message) as caught, disk_errors(path, 5000):
        raise OSError(number, os.strerror(number))
    assert str(path) in str(caught.value)


def test_interrupted_text_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(tmp_path / "text", "new")
    assert list(tmp_path.iterdir()) == []


# ---- text and index


def test_text_and_json(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "text", "é\r\nx")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\r\nx"
    atomic_write_json(tmp_path / "json", {"b": "é", "a": [1]})
    assert (tmp_path / "json").read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'


def test_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"}, 42)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 42}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    assert list(index["weight_map"]) == ["a", "b"]


# ---- output directory


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(path.name)
    return path


def test_output_state(tmp_path: Path) -> None:
    assert output_state(tmp_path / "none") == "absent"
    assert output_state(folder(tmp_path / "empty")) == "empty"
    assert output_state(folder(tmp_path / "ours", "quark/manifest.json")) == "finished"
    assert output_state(folder(tmp_path / "other", "notes.txt")) == "foreign"
    assert output_state(tmp_path / "other" / "notes.txt") == "foreign"
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert output_state(tmp_path / "dangling") == "foreign"


def test_partial_path(tmp_path: Path) -> None:
    assert partial_path(tmp_path / "out") == tmp_path / "out.partial"
    folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert partial_path(tmp_path / "link") == tmp_path / "real.partial"
    with pytest.raises(UsageError, match="mount point"):
        partial_path(Path("/"))


@pytest.mark.parametrize("empty", [False, True])
def test_publish_to_a_new_place(tmp_path: Path, empty: bool) -> None:
    partial, final = folder(tmp_path / "out.partial", "config.json"), tmp_path / "out"
    if empty:
        final.mkdir()
    assert publish(partial, final, overwrite=False) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (final / "config.json").read_text() == "out.partial"


@pytest.mark.parametrize("name", ["quark/manifest.json", "notes.txt"])
def test_publish_refuses_what_exists(tmp_path: Path, name: str) -> None:
    partial, final = folder(tmp_path / "out.partial", "config.json"), folder(tmp_path / "out", name)
    with pytest.raises(UsageError, match=r"not empty \((finished|foreign)\)"):
        publish(partial, final, overwrite=False)
    assert (partial / "config.json").exists()
    assert (final / name).exists()


@pytest.mark.parametrize("name", ["quark/manifest.json", "notes.txt"])
def test_publish_moves_what_was_there_aside(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    said: list[Path] = []
    folder(tmp_path / "out", name)
    for suffix in ("", "-2", "-3"):  # in a container every run has the same pid
        old = publish(folder(tmp_path / "out.partial", name), tmp_path / "out", overwrite=True, announce=said.append)
        assert old == tmp_path / f"out.old-7{suffix}"
        assert (old / name).is_file()
    assert len(said) == 3


def test_publish_is_done_once_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal or an error that comes after the renaming does not undo it."""
    real = Path.rename

    def rename(self: Path, target: Path) -> None:
        real(self, target)
        raise KeyboardInterrupt

    partial = folder(tmp_path / "out.partial", "new")
    monkeypatch.setattr(Path, "rename", rename)
    assert publish(partial, tmp_path / "out", overwrite=False) is None
    assert (tmp_path / "out" / "new").is_file()


def test_publish_through_a_link(tmp_path: Path) -> None:
    folder(tmp_path / "real", "quark/manifest.json")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish(folder(tmp_path / "real.partial", "new"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link" / "new").exists()
    assert (tmp_path / "link").is_symlink()


def test_failed_publish_brings_the_old_output_back(tmp_path: Path) -> None:
    final = folder(tmp_path / "out", "quark/manifest.json")
    with pytest.raises(ResourceError, match="writing failed"):
        publish(tmp_path / "missing.partial", final, overwrite=True)
    assert (final / "quark" / "manifest.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
