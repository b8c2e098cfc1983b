"""Writes and reads the manifest of a checkpoint: sha256 and size of each file, a digest of each header.

`quark verify` compares with it what is there; replacing a checkpoint looks up in it which files are ours to remove.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quarkcli.disk import outputs
from quarkcli.disk.outputs import LOG, MANIFEST
from quarkcli.disk.writer import STATE, atomic_write_json, disk_errors
from quarkcli.errors import CheckError, QuarkError, all_of, some

SCHEMA = "quark/manifest/1"
HASH_LIMIT = 20_000_000_000  # bytes that are hashed without being asked for
_UNLISTED = {MANIFEST, LOG}
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint when it was finished: by file name, sha256; size; sha256 of the header."""

    files: dict[str, str]
    sizes: dict[str, int]
    headers: dict[str, str]


def write(folder: Path, source: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Writes the manifest of a folder. `known`: hashes taken while files were written. Raises ResourceError."""
    manifest = Manifest({}, {}, {})
    with disk_errors(folder):
        for name in sorted(_files(folder)):
            path = folder / name
            if name in _UNLISTED or name.startswith(f"{STATE}/"):
                continue
            with disk_errors(path):
                manifest.sizes[name] = path.stat().st_size
                manifest.files[name] = known.get(name) or _digest(path)
                if name.endswith(_WEIGHTS):
                    manifest.headers[name] = header_digest(path)
    atomic_write_json(folder / MANIFEST, {"schema": SCHEMA, "source": source, **vars(manifest)})


def read(folder: Path) -> Manifest | None:
    """Returns the manifest of a checkpoint, None when it has none. Raises CheckError when it cannot be used."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckError(f"the manifest cannot be read: {error}", where=str(path), kind="E-CHECK-FILES") from error
    value = value if isinstance(value, dict) else {}
    files, sizes, headers = (value.get(key, {}) for key in ("files", "sizes", "headers"))
    if not (_is_table(files, str) and _is_table(sizes, int) and _is_table(headers, str) and files):
        raise CheckError("the manifest does not list any files", where=str(path), kind="E-CHECK-FILES")
    return Manifest(files, sizes, headers)


def made_from(folder: Path) -> Mapping[str, Any]:
    """Returns what a manifest says of the model that a checkpoint was made from; nothing where none can be read."""
    try:
        source = json.loads((folder / MANIFEST).read_bytes())["source"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return source if isinstance(source, dict) else {}


def compare(folder: Path, manifest: Manifest, hashes: bool | None = None) -> list[str]:
    """Compares a folder with its manifest. Returns the checks made; raises CheckError.

    hashes   read every file; None: when they are 20 GB at most
    """
    sizes = {name: _size(folder / name) for name in manifest.files}
    there = {name: size for name, size in sizes.items() if size is not None}
    total = sum(there.values())
    hashed = hashes or (hashes is None and total <= HASH_LIMIT)
    wrong: dict[str, list[str]] = {}
    for name in manifest.files:
        what = _difference(folder / name, name, manifest, hashed)
        if what is not None:
            wrong.setdefault(what, []).append(name)
    if wrong:
        raise all_of(
            [
                CheckError(f"{len(names)} {what}: {_listed(names)}", kind="E-CHECK-FILES")
                for what, names in sorted(wrong.items())
            ]
        )
    lines = [f"{len(there)} files have the sizes and headers of the manifest"]
    if hashed:
        lines.append(f"{len(there)} files have the hashes of the manifest")
    else:
        lines.append(f"hashes not compared ({_shown(total)} of files); --hashes compares them")
    added = sorted(set(_files(folder)) - set(manifest.files) - _UNLISTED)
    if added:
        lines.append(f"{len(added)} files are not in the manifest: {_listed(added)}")
    return lines


def unchanged(folder: Path) -> Callable[[str], bool]:
    """Returns a function that is true for a weight file whose header is as it was written; of no manifest, never."""
    try:
        listed = read(folder)
    except CheckError:
        listed = None
    headers = listed.headers if listed is not None else {}

    def same(name: str) -> bool:
        return name in headers and _header(folder / name) == headers[name]

    return same


def _difference(path: Path, name: str, manifest: Manifest, hashed: bool) -> str | None:
    """Returns the fault of a file as a phrase that fits several files; None when it has none."""
    size = _size(path)
    if size is None:
        return "files of the manifest are missing"
    if size != manifest.sizes.get(name, size):
        return "files have another size than in the manifest"
    if name in manifest.headers and _header(path) != manifest.headers[name]:
        return "weight files have another header than in the manifest"
    if hashed and _sha256(path) != manifest.files[name]:
        return "files have other bytes than in the manifest"
    return None


def remove_ours(output: Path) -> list[str]:
    """Removes the checkpoints of an output by their manifests; the directory too when nothing else was in there.

    Returns the files that stay: those that somebody added, linked or changed. A manifest goes last of its folder, and
    the list of folders last of all, so that a removal that was interrupted can be gone on with. Raises OSError.
    """
    folders = outputs.listed(output)
    if not folders:
        return _remove_checkpoint(output)
    found = {name: output / name for name in folders if (output / name).is_dir() and not (output / name).is_symlink()}
    kept = [f"{name}/{file}" for name, folder in found.items() for file in _remove_checkpoint(folder)]
    kept += [file for file in sorted(_files(output)) if file not in kept and file != outputs.LIST]
    (output / outputs.LIST).unlink()
    if not kept:
        shutil.rmtree(output)
    return kept


def _remove_checkpoint(folder: Path) -> list[str]:
    try:
        manifest = read(folder)
    except CheckError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        manifest = None
    names = sorted(_files(folder))
    if manifest is None and names:
        return names
    ours = [name for name in names if name in _UNLISTED or (manifest and _is_ours(folder / name, name, manifest))]
    for name in sorted(ours, key=lambda name: name == MANIFEST):
        (folder / name).unlink()
    kept = [name for name in names if name not in ours]
    if not kept:
        shutil.rmtree(folder)  # folders are all that is left
    return kept


def header_digest(path: Path) -> str:
    """Returns the sha256 of a safetensors file's header, its length included."""
    with path.open("rb") as stream:
        length = stream.read(8)
        size = min(int.from_bytes(length, "little"), path.stat().st_size)  # a damaged length says anything
        return hashlib.sha256(length + stream.read(size)).hexdigest()


def _is_ours(path: Path, name: str, manifest: Manifest) -> bool:
    """True when a file is as it was written. Raises OSError.

    Weights are told by their size, everything else by its hash: a card that was edited is somebody's work.
    """
    if name not in manifest.files or path.is_symlink():
        return False
    if name.endswith(_WEIGHTS):
        return name not in manifest.sizes or path.stat().st_size == manifest.sizes[name]
    return _sha256(path) == manifest.files[name]


def _files(folder: Path) -> Iterator[str]:
    """Yields the names of all files below a folder; a linked folder counts as a file. Raises OSError."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(root, name).is_symlink()]
        yield from (Path(root, name).relative_to(folder).as_posix() for name in (*names, *links))


def _is_table(value: Any, kind: type) -> bool:
    """True for names of files inside the folder -> values of one type."""
    return isinstance(value, dict) and all(
        type(item) is kind and "\0" not in name and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        for name, item in value.items()
    )  # fmt: skip


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise _unreadable(path, error) from error


def _header(path: Path) -> str:
    return _checked(header_digest, path)


def _digest(path: Path) -> str:
    """Returns the sha256 of a file, read in pieces. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256(path: Path) -> str:
    return _checked(_digest, path)


def _checked(digest: Callable[[Path], str], path: Path) -> str:
    """Returns the digest of a file. Raises CheckError for one that cannot be read."""
    try:
        return digest(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> QuarkError:
    return CheckError(f"cannot be read: {error.strerror or error}", where=str(path), kind="E-CHECK-FILES")


def _shown(count: int) -> str:
    return f"{count / 1e9:.0f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _listed(names: list[str]) -> str:
    return some(os.fsencode(name).decode("utf-8", "backslashreplace") for name in names)
