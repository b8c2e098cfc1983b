"""A source checkpoint: config text, tensor headers, tensor bytes by offset, revision.

Headers are parsed here by hand (format: https://github.com/huggingface/safetensors#format) because the library
hides the byte offsets and reads through torch or a memory map: plans need headers without torch, and a job needs
buffers that are freed after each part, where mapped pages would stay counted. torch is imported only to read tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from quarkcli.disk import beside
from quarkcli.documents import text
from quarkcli.documents.folder import check_folder
from quarkcli.documents.model import Config, Index
from quarkcli.documents.shape import Shape, check
from quarkcli.errors import AccessError, ModelError, QuarkError, ResourceError

if TYPE_CHECKING:
    import torch

_ROWS: tuple[tuple[int, dict[str, str]], ...] = (
    (1, {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"}),
    (1, {"F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}),
    (2, {"I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16"}),
    (4, {"I32": "int32", "U32": "uint32", "F32": "float32"}),
    (8, {"C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64"}),
)
# safetensors name -> (bytes per value, torch name), in the order of safetensors' own enum: files are laid out by
# it, last row first (see writer.file_size).
DTYPES = {name: (size, torch_name) for size, names in _ROWS for name, torch_name in names.items()}

HEADER_LIMIT = 100_000_000  # bytes, the library's own limit
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".th", ".t7")
OTHER_WEIGHTS = (".gguf", ".onnx", ".h5", ".msgpack")
_IGNORED = [f"*{suffix}" for suffix in PICKLES + OTHER_WEIGHTS] + ["original/*", "*/original/*", "consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_READ_CHUNK = 256 * 2**20
_DENIED = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}
_AGAIN = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file.

    dtype        safetensors text, a key of DTYPES ("BF16")
    file         file name relative to the model directory
    start, end   absolute byte offsets in that file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Source:
    """A model directory whose index and headers are valid.

    name         last component of the directory or hub id
    hub_id       "org/name" when this is a hub snapshot (asked for by id or by path), else None
    commit       resolved commit of a hub snapshot, else None
    config_text  config.json as it stands on disk; `config` is the same parsed, with what a file beside it says
                 of a quantization that it does not mention
    headers      every tensor of the files, in file order
    stamps       weight file -> size in bytes and modification time in ns, to notice changes
    unlisted     tensors that are in a file of the index, and that the index does not name
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

    @property
    def files(self) -> dict[str, int]:
        """Returns weight file -> size in bytes."""
        return {file: size for file, (size, _) in self.stamps.items()}

    @staticmethod
    def open(path_or_id: str, *, revision: str = "main", offline: bool = False) -> Source:
        """Opens a local directory or a hub id; reads config, index and headers, no tensor.

        Raises AccessError (missing, forbidden, offline), ModelError (not a complete safetensors model) and
        ResourceError (the download does not fit).
        """
        local = Path(os.path.expanduser(path_or_id))  # noqa: PTH111 - does not raise where there is no home
        try:
            if local.is_dir():
                return _open_folder(local.resolve(), None, online=False)
            exists = local.exists()
        except OSError as error:
            raise _unreadable(Path(error.filename or local), error) from error
        if exists:
            raise AccessError("is a file; give the directory that holds config.json", where=path_or_id)
        if not _HUB_ID.fullmatch(path_or_id):
            raise AccessError("no such directory", where=path_or_id)
        return _open_folder(_download(path_or_id, revision, offline), path_or_id, online=not offline)

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor in its stored dtype and shape: CPU, own memory, no map. Raises ModelError, AccessError."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Returns several tensors, in the order asked for; each file is opened once and read front to back."""
        names = list(dict.fromkeys(names))
        if unknown := [name for name in names if name not in self.headers]:
            raise ModelError("no such tensor in the model's files", where=unknown[0])
        wanted = [self.headers[name] for name in names]
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(header.file for header in wanted):
            if _stamp(self.folder / file) != self.stamps[file]:
                raise ModelError("changed since its header was read", where=str(self.folder / file))
            found |= read_tensors(self.folder / file, [header for header in wanted if header.file == file])
        return {header.name: found[header.name] for header in wanted}

    def header_digest(self) -> str:
        """Returns the sha256 over all headers and file sizes; part of the resume fingerprint."""
        facts = [[list(vars(header).values()) for header in self.headers.values()], self.files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _open_folder(folder: Path, hub_id: str | None, *, online: bool) -> Source:
    check_folder(folder)
    if not (folder / "config.json").is_file():
        raise ModelError("no config.json: this is not a Hugging Face model directory", where=str(folder))
    if not is_within(folder, folder / "config.json"):  # it is copied into the checkpoint
        hint = "put the file itself into the folder"
        raise ModelError("a link out of the model folder", where=str(folder / "config.json"), hint=hint)
    config_text, config = _read_json(folder / "config.json", Config)
    headers: dict[str, Header] = {}
    stamps: dict[str, tuple[int, int]] = {}
    weight_map = _weight_map(folder)
    for file in _weight_files(folder, weight_map, hub_id if online else None):
        stamps[file] = _stamp(folder / file)
        for header in read_headers(folder / file, file):
            if header.name in headers:
                raise ModelError(f"is in both {headers[header.name].file} and {file}", where=header.name)
            headers[header.name] = header
    if not headers:
        raise ModelError("the model's files hold no tensors", where=str(folder))
    _check_index(weight_map, headers)
    config |= beside.described(folder, config, headers, _read_json)
    is_snapshot = _is_snapshot(folder)
    commit = folder.name if is_snapshot else None
    if is_snapshot and not hub_id:  # .../models--org--name/snapshots/<commit>
        hub_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    name = (hub_id or folder.name).rpartition("/")[2]
    unlisted = tuple(name for name in headers if weight_map is not None and name not in weight_map)
    return Source(folder, name, hub_id, commit, config_text, config, headers, stamps, unlisted)


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
        raise ModelError(f"this weight file is missing{link}", where=str(path), hint="download the model again")
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> QuarkError:
    """Returns an AccessError for a file that is missing or forbidden, which a user can mend; else a ResourceError."""
    kind = AccessError if error.errno in _DENIED else ResourceError
    return kind(f"cannot be read: {error.strerror or error}", where=str(path))


def _read_json(path: Path, shape: type[Shape]) -> tuple[str, dict[str, Any]]:
    """Returns text (line ends untouched) and object of a JSON file of a known shape; errors name the place."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    value = text.parse_object(content, str(path))
    check(shape, value, str(path))
    return content.decode(), value


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Returns tensor name -> file of the index, or None without an index.

    Only the text of a file name is checked: hub snapshots link to ../../blobs, so resolved paths do leave.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    weight_map: dict[str, str] = _read_json(index, Index)[1]["weight_map"]
    if not weight_map:
        raise ModelError("`weight_map` must be an object with at least one tensor", where=str(index))
    for name, file in weight_map.items():
        if not file.endswith(".safetensors") or "\0" in file:
            raise ModelError(f"`weight_map` names {file!r} for {name}, not a .safetensors file", where=str(index))
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ModelError(f"{file!r} of {name} points outside the model directory", where=str(index))
    return weight_map


def _check_index(weight_map: dict[str, str] | None, headers: dict[str, Header]) -> None:
    for name, file in (weight_map or {}).items():
        if name not in headers or headers[name].file != file:
            raise ModelError(f"the index says it is in {file}, but it is not there", where=name, hint=_AGAIN)


def _weight_files(folder: Path, weight_map: dict[str, str] | None, hub_id: str | None) -> list[str]:
    """Returns the files that make the model: those of the index, else model.safetensors, else every *.safetensors."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if weight_map is not None:
        listed = sorted(set(weight_map.values()))
        if SINGLE in found and SINGLE not in listed:
            raise ModelError(f"holds both {SINGLE} and an index without it", where=str(folder), hint="remove one")
        return listed
    if not found:
        raise _no_safetensors(folder, hub_id)
    if SINGLE in found:
        return [SINGLE]
    # Mistral's own layout repeats the weights under other names; it only counts when there is nothing else
    files = [file for file in found if not file.startswith("consolidated")] or found
    # without an index only names like model-00001-of-00003.safetensors can tell that a shard is missing
    totals = [int(match[1]) for file in files if (match := re.search(r"-\d{5}-of-(\d{5})\.safetensors$", file))]
    if totals and len(totals) != totals[0]:
        raise ModelError(f"has {len(totals)} of {totals[0]} weight files and no index", where=str(folder))
    return files


def _no_safetensors(folder: Path, hub_id: str | None) -> ModelError:
    names = sorted(path.name for path in folder.iterdir())
    if hub_id:  # these files were not downloaded; asking only makes the message more precise
        import huggingface_hub

        with suppress(Exception):
            names = sorted(huggingface_hub.list_repo_files(hub_id, revision=folder.name))
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    others = [name for name in names if name.lower().endswith(OTHER_WEIGHTS)]
    shown = ", ".join((pickles or others)[:5]) + (", ..." if len(pickles or others) > 5 else "")
    if pickles:
        what = f"no .safetensors files, only pickle files, which can run foreign code when loaded: {shown}"
        hint = "convert it to safetensors first: load it with transformers, then save_pretrained"
    else:
        what, hint = "no .safetensors files" + (f", only {shown}" if shown else ""), "use the original checkpoint"
    return ModelError(what, where=hub_id or str(folder), hint=hint)


def read_headers(path: Path, file: str) -> list[Header]:
    """Returns the headers of a safetensors file, in order, under the name `file`. Raises ModelError, AccessError."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise _bad(path, f"the header length {length} does not fit a file of {size} bytes")
            content = stream.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        table = text.parse(content, "header", unique=True)
    except ModelError as error:
        raise _bad(path, f"the header is not valid: {error.what}") from error
    if not isinstance(table, dict):
        raise _bad(path, "the header is not an object")
    table.pop("__metadata__", None)
    headers = [_header(path, file, name, entry, 8 + length) for name, entry in table.items()]
    headers.sort(key=lambda header: (header.start, header.end))
    _check_cover(path, headers, 8 + length, size)
    return headers


def _header(path: Path, file: str, name: str, entry: Any, base: int) -> Header:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _bad(path, f"the header entry of {name} has no valid shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = f"known dtypes: {', '.join(DTYPES)}"
        raise ModelError(f"{name} has the unknown dtype {dtype!r}", where=str(path), hint=known)
    expected = math.prod(shape) * DTYPES[dtype][0]
    if offsets[1] - offsets[0] != expected:
        raise _bad(path, f"{name} takes {offsets[1] - offsets[0]} bytes, its shape and dtype say {expected}")
    return Header(name, dtype, tuple(shape), file, base + offsets[0], base + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, headers: list[Header], base: int, size: int) -> None:
    """Raises ModelError unless tensors follow each other from the header to the file's end, as the format demands."""
    position = base
    for header in headers:
        if header.start != position:
            raise _bad(path, f"the bytes of {header.name} overlap another tensor or leave a hole")
        position = header.end
    if position != size:
        raise _bad(path, f"has {size} bytes, its header says {position}")


def _bad(path: Path, what: str) -> ModelError:
    return ModelError(what, where=str(path), hint=_AGAIN)


def read_tensors(path: Path, headers: Sequence[Header]) -> dict[str, torch.Tensor]:
    """Returns tensors of one file, read by offset into own memory, front to back. Raises ModelError, AccessError."""
    try:
        with path.open("rb", buffering=0) as stream:
            ordered = sorted(headers, key=lambda header: header.start)
            return {header.name: _read_tensor(stream, path, header) for header in ordered}
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_tensor(stream: Any, path: Path, header: Header) -> torch.Tensor:
    import torch

    buffer = torch.empty(header.nbytes, dtype=torch.uint8)
    view: Any = memoryview(buffer.numpy())  # type: ignore[arg-type]  # arrays are buffers, numpy's stubs do not say so
    stream.seek(header.start)
    done = 0
    while done < header.nbytes:  # one read returns 2 GiB at most
        count = stream.readinto(view[done : done + _READ_CHUNK])
        if not count:
            raise ModelError(f"ended inside {header.name}: the file shrank while it was being read", where=str(path))
        done += count
    return buffer.view(getattr(torch, DTYPES[header.dtype][1])).reshape(header.shape)


def _download(hub_id: str, revision: str, offline: bool) -> Path:
    """Returns the local snapshot folder of a hub id, without weights of formats that are not read."""
    import huggingface_hub as hub

    try:
        folder = hub.snapshot_download(hub_id, revision=revision, local_files_only=offline, ignore_patterns=_IGNORED)
    except Exception as error:  # the HTTP library's own errors pass through, and which library it is varies
        raise _hub_error(error, hub_id, revision, offline) from error
    return Path(folder)


def _hub_error(error: Exception, hub_id: str, revision: str, offline: bool) -> QuarkError:
    """Returns the plain message of a failed download; the token itself is never shown."""
    from huggingface_hub import constants, errors, get_token

    token = get_token()
    login = f"{'a' if token else 'no'} token was seen; set HF_TOKEN to one that may read this model"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or set HF_HOME to a larger disk"
        return ResourceError("the disk is full while downloading", where=str(constants.HF_HUB_CACHE), hint=hint)
    if isinstance(error, errors.GatedRepoError):
        what, hint = "is a gated model", f"accept its licence at https://huggingface.co/{hub_id}; {login}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what, hint = "no such directory, and no such model on the hub (or it is private)", login
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = f"the hub has no revision {revision} of it", ""
    elif getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        what, hint = "the hub refused access", login
    elif offline or constants.HF_HUB_OFFLINE:
        what = f"no such directory, and revision {revision} is not (completely) in the hub cache while offline"
        hint = "go online once, or give a local directory"
    else:
        text = " ".join(str(error).split())[:300].replace(token or "\0", "***")
        what = f"no such directory, and the download from the hub failed: {type(error).__name__}: {text}"
        hint = "check the network, or give a local directory"
    return AccessError(what, where=hub_id, hint=hint)
