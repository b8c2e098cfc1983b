"""Opens a source checkpoint, in a folder or on the hub: config text, tensor headers, tensors, revision.

Its weights are safetensors files, or pickles where those are allowed and nothing else is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from quarkcli.disk import beside, hub, meant, pickles
from quarkcli.disk import headers as safetensors
from quarkcli.disk.headers import (
    AGAIN,
    INDEX,
    OTHER_WEIGHTS,
    PICKLES,
    SINGLE,
    Header,
    unreadable,
)
from quarkcli.disk.remote import Remote
from quarkcli.documents import text
from quarkcli.documents.folder import check_folder
from quarkcli.documents.model import Config, Index
from quarkcli.documents.shape import Shape, check
from quarkcli.errors import AccessError, HubError, ModelError, some
from quarkcli.events import Listener, silent

if TYPE_CHECKING:
    import torch

_SAFE = re.compile(r"[^/]+\.safetensors")
_CONVERT = "convert it to safetensors: load it with transformers, then save_pretrained"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A model directory whose index and headers are valid.

    name         last component of the directory or hub id
    hub_id       "org/name" when this is a hub snapshot (asked for by id or by path), else None
    commit       resolved commit of a hub snapshot, else None
    config_text  config.json as it stands on disk; `config` is the same parsed, with what a file beside it says
                 of a quantization that it does not mention
    headers      every tensor of the files, in file order
    stamps       weight file -> size in bytes and modification time in ns, to notice changes; no time: on the hub
    unlisted     tensors that are in a file of the index, and that the index does not name
    pickled      the weight files are pickles
    remote       the model on the hub, where the folder does not hold all of it
    """

    folder: Path
    name: str
    hub_id: str | None
    commit: str | None
    config_text: str
    config: dict[str, Any]
    headers: dict[str, Header]
    stamps: dict[str, tuple[int, int]]
    unlisted: tuple[str, ...] = ()
    remote: Remote | None = None
    pickled: bool = False

    @property
    def by_offset(self) -> bool:
        """True for safetensors files; a pickle is parsed as a whole for every reading."""
        return not self.pickled

    @property
    def files(self) -> dict[str, int]:
        """Returns weight file -> size in bytes."""
        return {file: size for file, (size, _) in self.stamps.items()}

    @staticmethod
    def open(
        path_or_id: str,
        *,
        revision: str = "main",
        offline: bool = False,
        bare: bool = False,
        kept: Path | None = None,
        tell: Listener = silent,
        allow_pickle: bool = False,
        local: bool = False,
    ) -> Source:
        """Opens a local directory or a hub id; reads config, index and headers, no tensor.

        local         a directory and nothing else: the hub is not asked
        bare          of a hub id no more than that is downloaded; the other files when they are asked for
        kept          a file of headers that an earlier run read
        allow_pickle  where there are no safetensors files, `pytorch_model.bin` files are read, which are downloaded

        Raises AccessError (missing, forbidden, offline), ModelError (not a complete safetensors model) and
        ResourceError (the download does not fit).
        """
        path = Path(os.path.expanduser(path_or_id))  # noqa: PTH111 - does not raise where there is no home
        try:
            if path.is_dir():
                return _open_folder(path.resolve(), None, online=False, allow_pickle=allow_pickle)
            exists = path.exists()
        except OSError as error:
            raise unreadable(Path(error.filename or path), error) from error
        if exists:
            raise AccessError(
                "is a file; give the directory that holds config.json", where=path_or_id, kind="E-PATH-NOT-FOUND"
            )
        begun = meant.missing(path)
        if local or begun or not _is_hub_id(path_or_id):
            hint = "" if local else "give a directory that holds config.json, a name on the hub (org/name), or demo"
            hint = begun or hint
            raise AccessError("there is no such directory", where=path_or_id, hint=hint, kind="E-PATH-NOT-FOUND")
        ranged = (bare or allow_pickle) and not hub.is_offline(offline)
        remote = Remote.open(path_or_id, revision, kept, tell) if ranged else None
        if remote is not None and allow_pickle:
            remote.take_pickles()
        folder = remote.folder if remote is not None else hub.download(path_or_id, revision, offline)
        if remote is None and (ranged or offline):  # the hub was not asked, or gave no answer
            _check_cached(folder, path_or_id)
        return _open_folder(folder, path_or_id, online=not offline, remote=remote, allow_pickle=allow_pickle)

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor in its stored dtype and shape: CPU, own memory, no map. Raises ModelError, AccessError."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Returns several tensors, in the order asked for; each file is opened once and read front to back."""
        names = list(dict.fromkeys(names))
        if unknown := [name for name in names if name not in self.headers]:
            raise ModelError("no such tensor in the model's files", where=unknown[0], kind="E-MODEL-INCOMPLETE")
        wanted = [self.headers[name] for name in names]
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(header.file for header in wanted):
            own = [header for header in wanted if header.file == file]
            with self._using(file, {header.name for header in own}) as path:
                found |= (pickles if self.pickled else safetensors).read_tensors(path, own)
        return {header.name: found[header.name] for header in wanted}

    @contextmanager
    def _using(self, file: str, tensors: set[str]) -> Iterator[Path]:
        """Yields the place of a weight file while these tensors are read from it."""
        if self.remote is not None and self.remote.stream is not None and self.is_far(file):
            with self.remote.stream.using(file, tensors) as path:
                yield path
        else:
            yield self.path(file)

    def is_far(self, file: str) -> bool:
        """True for a weight file that was on the hub when the model was opened, and not here."""
        return self.remote is not None and not self.stamps[file][1]

    def stored(self, names: Iterable[str]) -> list[str]:
        """Returns the tensors of the files that these are made of: they themselves."""
        return list(names)

    def path(self, file: str) -> Path:
        """Returns where a weight file is, downloaded first if it is on the hub. Raises ModelError, AccessError."""
        path = self.folder / file
        if self.remote is not None and self.is_far(file):
            self.remote.fetch([file])
        elif _stamp(path) != self.stamps[file]:
            raise ModelError("changed since its header was read", where=str(path), kind="E-MODEL-DAMAGED")
        return path

    def names(self) -> list[str]:
        """Returns the relative names of all files of the model, as text."""
        if self.remote is not None:
            return self.remote.names
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]

    def whole_folder(self) -> Path:
        """Returns the folder with all files beside the weights in it, downloaded first if they are on the hub."""
        if self.remote is not None:
            self.remote.fetch(self.remote.beside())
        return self.folder

    def notes(self) -> list[str]:
        """Returns sentences about how its weights are read."""
        whole = [file for file in self.stamps if self.pickled and pickles.is_read_whole(self.folder / file)]
        what = "are from torch before 1.6; each of them is read into memory as a whole"
        return [f"{len(whole)} weight files {what} ({some(whole)})"] if whole else []

    def header_digest(self) -> str:
        """Returns the sha256 over all headers and file sizes; part of the resume fingerprint."""
        facts = [[list(vars(header).values()) for header in self.headers.values()], self.files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_hub_id(name: str) -> bool:
    """True for what may be a name on the hub, and is no path: `out/demo` is one where there is a directory `out`."""
    organisation, slash, _ = name.partition("/")
    return bool(_HUB_ID.fullmatch(name)) and not (slash and Path(organisation).is_dir())


def _open_folder(
    folder: Path, hub_id: str | None, *, online: bool, remote: Remote | None = None, allow_pickle: bool = False
) -> Source:
    check_folder(folder)
    if not (folder / "config.json").is_file():
        what = "no config.json: this is not a Hugging Face model directory"
        raise ModelError(what, where=str(folder), hint=meant.hint(folder), kind="E-MODEL-FILES")
    if not is_within(folder, folder / "config.json"):  # it is copied into the checkpoint
        hint = "put the file itself into the folder"
        raise ModelError(
            "a link out of the model folder", where=str(folder / "config.json"), hint=hint, kind="E-MODEL-FILES"
        )
    config_text, config = _read_json(folder / "config.json", Config)
    names = remote.names if remote is not None else [path.name for path in folder.iterdir()]
    pickled = allow_pickle and not any(map(_SAFE.fullmatch, names))
    weight_map = _weight_map(folder, pickled)
    files = _weight_files(folder, names, weight_map, pickled)
    if not files:
        raise _no_weights(folder, hub_id if online else None, remote)
    stamps, headers = _headers(folder, files, remote, pickled)
    if not headers:
        raise ModelError("the model's files hold no tensors", where=str(folder), kind="E-MODEL-FILES")
    _check_index(weight_map, headers)
    config |= beside.described(folder, config, headers, _read_json)
    is_snapshot = _is_snapshot(folder)
    commit = folder.name if is_snapshot else None
    if is_snapshot and not hub_id:  # .../models--org--name/snapshots/<commit>
        hub_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    name = (hub_id or folder.name).rpartition("/")[2]
    unlisted = tuple(name for name in headers if weight_map is not None and name not in weight_map)
    return Source(folder, name, hub_id, commit, config_text, config, headers, stamps, unlisted, remote, pickled)


def _check_cached(folder: Path, hub_id: str) -> None:
    """Raises HubError for a snapshot in the hub's cache that has not all of its weights."""
    weight_map = _weight_map(folder, pickled=False) or {}
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    weights = (".safetensors", *PICKLES, *OTHER_WEIGHTS)
    if missing or not any(path.name.endswith(weights) for path in folder.iterdir()):
        what = f"some weight files are not in the hub cache, and the hub was not reached: {some(missing, 3)}"
        raise HubError(
            what.removesuffix(": "), where=hub_id, hint="go online once, or give a local directory", kind="E-HUB-MODEL"
        )


def _headers(
    folder: Path, files: list[str], remote: Remote | None, pickled: bool
) -> tuple[dict[str, tuple[int, int]], dict[str, Header]]:
    """Returns the stamps of weight files, and their headers."""
    reader = pickles if pickled else safetensors
    far = remote.headers(file for file in files if not remote.is_here(file)) if remote is not None else {}
    stamps: dict[str, tuple[int, int]] = {}
    headers: dict[str, Header] = {}
    for file in files:
        stamps[file] = (far[file][0], 0) if file in far else _stamp(folder / file)
        for header in far[file][1] if file in far else reader.read_headers(folder / file, file):
            if header.name in headers:
                raise ModelError(
                    f"is in both {headers[header.name].file} and {file}", where=header.name, kind="E-MODEL-INDEX"
                )
            headers[header.name] = header
    return stamps, headers


def is_within(folder: Path, path: Path) -> bool:
    """True when `path`, links followed, is in a model folder, or for a hub snapshot among its blobs. Raises OSError."""
    try:
        target = path.resolve(strict=True)
    except RuntimeError as error:  # how Python before 3.13 says it
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    return target.is_relative_to(folder) or (_is_snapshot(folder) and target.parent == folder.parents[1] / "blobs")


def _is_snapshot(folder: Path) -> bool:
    """True for a folder `.../models--org--name/snapshots/<commit>`, whose files are links to `../../blobs`."""
    return folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) is not None


def _stamp(path: Path) -> tuple[int, int]:
    """Returns size and modification time of a weight file that must be there."""
    if not path.is_file():
        link = " (a link whose target is gone)" if path.is_symlink() else ""
        raise ModelError(
            f"this weight file is missing{link}",
            where=str(path),
            hint="download the model again",
            kind="E-MODEL-INCOMPLETE",
        )
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_json(path: Path, shape: type[Shape]) -> tuple[str, dict[str, Any]]:
    """Returns text (line ends untouched) and object of a JSON file of a known shape; errors name the place."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    value = text.parse_object(content, str(path))
    check(shape, value, str(path))
    return content.decode(), value


def _weight_map(folder: Path, pickled: bool) -> dict[str, str] | None:
    """Returns tensor name -> file of the index, or None without an index.

    Only the text of a file name is checked: hub snapshots link to ../../blobs, so resolved paths do leave.
    """
    index, suffix = (folder / pickles.INDEX, ".bin") if pickled else (folder / INDEX, ".safetensors")
    if not index.is_file():
        return None
    weight_map: dict[str, str] = _read_json(index, Index)[1]["weight_map"]
    if not weight_map:
        raise ModelError(
            "'weight_map' must be an object with at least one tensor", where=str(index), kind="E-MODEL-INDEX"
        )
    for file, name in {file: name for name, file in reversed(weight_map.items())}.items():  # the first name of each
        if not file.endswith(suffix) or "\0" in file:
            raise ModelError(
                f"'weight_map' names {file!r} for {name}, which is not a {suffix} file",
                where=str(index),
                kind="E-MODEL-INDEX",
            )
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ModelError(
                f"{file!r} of {name} is outside the model directory", where=str(index), kind="E-MODEL-INDEX"
            )
    return weight_map


def _check_index(weight_map: dict[str, str] | None, headers: dict[str, Header]) -> None:
    for name, file in (weight_map or {}).items():
        if name not in headers or headers[name].file != file:
            raise ModelError(
                f"the index says that it is in {file}, but it is not there",
                where=name,
                hint=AGAIN,
                kind="E-MODEL-INDEX",
            )


def _weight_files(folder: Path, names: list[str], weight_map: dict[str, str] | None, pickled: bool) -> list[str]:
    """Returns the files that make the model: those of the index, else the single one, else every one with weights."""
    single, is_weight = (pickles.SINGLE, pickles.READ) if pickled else (SINGLE, _SAFE)
    found = sorted(name for name in names if is_weight.fullmatch(name))
    if weight_map is not None:
        listed = sorted(set(weight_map.values()))
        if single in found and single not in listed:
            raise ModelError(
                f"holds {single} and an index that does not name it",
                where=str(folder),
                hint="remove one of the two",
                kind="E-MODEL-INDEX",
            )
        return listed
    if single in found:
        return [single]
    # Mistral's own layout repeats the weights under other names; it only counts when there is nothing else
    files = [file for file in found if not file.startswith("consolidated")] or found
    # without an index only names like model-00001-of-00003.safetensors can tell that a shard is missing
    totals = [int(match[1]) for file in files if (match := re.search(r"-\d{5}-of-(\d{5})\.\w+$", file))]
    if totals and len(totals) != totals[0]:
        raise ModelError(
            f"has {len(totals)} of {totals[0]} weight files and no index", where=str(folder), kind="E-MODEL-INCOMPLETE"
        )
    return files


def _no_weights(folder: Path, hub_id: str | None, remote: Remote | None) -> ModelError:
    names = sorted(path.name for path in folder.iterdir())
    if remote is not None:
        names = sorted(remote.ignored)
    elif hub_id:  # these files were not downloaded; asking only makes the message more precise
        import huggingface_hub

        with suppress(Exception):
            names = sorted(huggingface_hub.list_repo_files(hub_id, revision=folder.name))
    unsafe = [name for name in names if name.lower().endswith(PICKLES)]
    others = [name for name in names if name.lower().endswith(OTHER_WEIGHTS)]
    shown = ", ".join((unsafe or others)[:5]) + (", ..." if len(unsafe or others) > 5 else "")
    if unsafe:
        what = f"no .safetensors files, only pickle files, which can run foreign code when loaded: {shown}"
        readable = any(map(pickles.READ.fullmatch, unsafe))
        hint = (f"use {pickles.FLAG}, which reads only tensors and runs no code; or " if readable else "") + _CONVERT
    else:
        what, hint = "no .safetensors files" + (f", only {shown}" if shown else ""), "use the original checkpoint"
    return ModelError(what, where=hub_id or str(folder), hint=hint, kind="E-MODEL-FILES")
