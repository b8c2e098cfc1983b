"""Writes files durably: shards, index, text. A file that has its final name is complete.

Every file is written under another name in the same folder, synced, renamed, and the folder is synced. torch is
imported only where tensors are written, so that forecasts can ask for file sizes without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from quarkcli.disk import outputs
from quarkcli.disk.headers import DTYPES, INDEX
from quarkcli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch

TensorInfo = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype text, shape
OutputState = Literal["absent", "empty", "finished", "foreign"]

SHARD_LIMIT = 5_000_000_000  # bytes of tensors in one file
STATE = ".quark-state"  # the journal's folder in a partial directory; hidden, so that no source has it

_METADATA = {"format": "pt"}  # transformers refuses files without it
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LAYOUT = {dtype: rank for rank, dtype in enumerate(DTYPES)}
_TEXTS = {torch_name: dtype for dtype, (_, torch_name) in DTYPES.items()}


@dataclass(frozen=True)
class PlannedFile:
    """A shard that `write_part` will write: exact size in bytes, and tensor name -> bytes."""

    file: str
    size: int
    tensors: dict[str, int]


@dataclass(frozen=True)
class WrittenFile:
    """A durable shard: size in bytes, sha256 of the whole file, tensor name -> bytes."""

    file: str
    size: int
    sha256: str
    tensors: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Returns the JSON form; `WrittenFile(**record)` is the way back."""
        return asdict(self)


# ---- sizes, known before writing


def dtype_text(dtype: torch.dtype) -> str:
    """Returns the safetensors text of a torch dtype."""
    return _TEXTS[str(dtype).removeprefix("torch.")]


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Returns the bytes of a tensor with safetensors dtype text `dtype`."""
    count = DTYPES[dtype][0]
    for size in shape:
        count *= size
    return count


def file_size(infos: Iterable[TensorInfo]) -> int:
    """Returns the exact bytes of the safetensors file that holds these tensors."""
    ordered = _ordered(infos)
    return len(_header(ordered)) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in ordered)


def _ordered(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Returns tensors in the library's order (its tensor.rs, `prepare`): widest dtype first, then by name."""
    return sorted(infos, key=lambda info: (-_LAYOUT[info[1]], info[0]))


def _header(ordered: Iterable[TensorInfo]) -> bytes:
    """Returns what comes before the tensors: 8 bytes of length, compact JSON padded with blanks to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": _METADATA}
    position = 0
    for name, dtype, shape in ordered:
        end = position + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    content = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def plan_files(slug: str, infos: Iterable[TensorInfo], limit: int = SHARD_LIMIT) -> list[PlannedFile]:
    """Returns the files of a part: `model-<slug>.safetensors`, and `model-<slug>-00002.safetensors` ... above `limit`.

    limit   bytes of tensors in one file; a single larger tensor gets a file of its own
    Tensors are taken by name, so the split does not depend on the order of `infos`. No tensors, no files.
    """
    if not _SLUG.fullmatch(slug):
        raise ValueError(f"cannot be used in a file name: {slug!r}")
    groups: list[list[TensorInfo]] = []
    room = 0
    for info in sorted(infos):
        size = tensor_bytes(info[1], info[2])
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(info)
        room -= size
    return [_planned(slug, number, group) for number, group in enumerate(groups, 1)]


def _planned(slug: str, number: int, group: list[TensorInfo]) -> PlannedFile:
    suffix = "" if number == 1 else f"-{number:05d}"
    tensors = {name: tensor_bytes(dtype, shape) for name, dtype, shape in group}
    return PlannedFile(f"model-{slug}{suffix}.safetensors", file_size(group), tensors)


# ---- tensors


def write_part(
    folder: Path, slug: str, tensors: dict[str, torch.Tensor], limit: int = SHARD_LIMIT
) -> list[WrittenFile]:
    """Writes one part's tensors durably; same tensors, same bytes. See `plan_files` for names and split.

    Tensors may lie on any device, share memory or be strided: their values are written.
    Raises ResourceError when the disk is full or not writable.
    """
    infos = [(name, dtype_text(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    files = plan_files(slug, infos, limit)
    return [write_tensors(folder / file.file, {name: tensors[name] for name in file.tensors}) for file in files]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> WrittenFile:
    """Writes one safetensors file durably, replacing `path` at once. Raises ResourceError."""
    infos = [(name, dtype_text(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    temporary = _temporary(path)
    with disk_errors(path, file_size(infos)):
        try:
            size, digest = _save(tensors, temporary)
            os.replace(temporary, path)  # noqa: PTH105 - one name for tests to interrupt
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return WrittenFile(path.name, size, digest, {name: tensor_bytes(dtype, shape) for name, dtype, shape in infos})


def _save(tensors: dict[str, torch.Tensor], path: Path) -> tuple[int, str]:
    """Writes a safetensors file and waits until it is durable. Returns its size, and the sha256 of its bytes.

    The bytes are those of the library, which would have to be read again for their hash.
    """
    infos = _ordered((name, dtype_text(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as stream:
        for content in chain([_header(infos)], (bytes_of(tensors[name]) for name, _, _ in infos)):
            digest.update(content)
            _write(stream, content)
        os.fsync(stream.fileno())
        return stream.tell(), digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes | memoryview:
    """Returns the bytes of a tensor, copied only where they do not lie one after the other on the CPU."""
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(stream: BinaryIO, content: bytes | memoryview) -> None:
    """Writes all of `content`; one call of the system writes 2 GiB at most."""
    left = memoryview(content)
    while left.nbytes:
        left = left[stream.write(left) :]


def _temporary(path: Path) -> Path:
    """Returns the name of a file on its way to `path`; `remove_staging` finds it after a kill."""
    return path.with_name(f"{outputs.STAGING}{os.getpid()}-{path.name}")


def remove_staging(folder: Path) -> None:
    """Removes temporary folders and files that a kill or a failure left below `folder`. Raises ResourceError."""
    with disk_errors(folder):
        for path in list(folder.rglob(f"{outputs.STAGING}*")):
            remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Writes the index: tensor name -> file, sorted; total_size is the bytes of all tensors without headers."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_write_json(folder / INDEX, index)


# ---- text


def atomic_write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text durably (line ends as given). Readers see the old file or the new one.

    Raises ResourceError.
    """
    data = text.encode("utf-8", "backslashreplace")  # of a path that is no text; in JSON it is the same character
    temporary = _temporary(path)
    with disk_errors(path, len(data)):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)  # noqa: PTH105 - as above
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Writes JSON as `atomic_write_text` does: two blanks of indent, keys in their order, a newline at the end."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, need: int = 0) -> Iterator[None]:
    """Turns an OSError of the body into a ResourceError that names `path`; `need` is the bytes to be written."""
    try:
        yield
    except OSError as error:
        raise _disk_error(error, path, need) from error


def _disk_error(error: OSError, path: Path, need: int) -> ResourceError:
    where = str(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        quota = error.errno == errno.EDQUOT
        what = "disk quota exceeded" if quota else "the disk is full"
        if need:
            what += f": {need:,} bytes needed{_free(path, ' on the disk as a whole' if quota else '')}"
        return ResourceError(
            what, where=where, hint="free some space, then run the same command again to continue", kind="E-DISK-FULL"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"cannot be written: {error.strerror}"
        return ResourceError(what, where=where, hint="choose another directory with -o", kind="E-DISK-WRITE")
    hint = "use a higher limit of file sizes (ulimit -f), then run it again" if error.errno == errno.EFBIG else ""
    return ResourceError(f"writing failed: {error.strerror or error}", where=where, hint=hint, kind="E-DISK-WRITE")


def _free(path: Path, of: str = "") -> str:
    """Returns a remark about the free space, where that can be told."""
    try:
        return f", {free_bytes(path):,} free{of}"
    except OSError:
        return ""


def free_bytes(path: Path) -> int:
    """Returns the bytes free for this user on the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(outputs.nearest(path)).free


# ---- the output directory


def output_state(final: Path) -> OutputState:
    """Returns the state of the output path; `finished`: checkpoints of ours, one or several; `foreign`: anything else.

    Raises ResourceError.
    """
    with disk_errors(final):
        if not final.exists() and not final.is_symlink():
            return "absent"
        if not final.is_dir():
            return "foreign"
        content = list(final.iterdir())
        if not content:
            return "empty"
        return "finished" if outputs.checkpoints(final) else "foreign"


def partial_path(final: Path) -> Path:
    """Returns `<final>.partial` beside it, where the work happens; links are followed.

    Raises UsageError for a place that cannot have one: a mount point, a link that leads to itself, a name too long.
    """
    final = resolved(final)
    if what := outputs.too_long(final, f"{outputs.PARTIAL}.state"):
        raise UsageError(what, where=f"{str(final)[:80]}...", hint="choose another -o", kind="E-OUTPUT-PLACE")
    with disk_errors(final):
        mounted = final.is_mount()
    if mounted:
        raise UsageError(
            "is a mount point, and nothing can be renamed to it", where=str(final), hint="give a folder inside it",
            kind="E-OUTPUT-PLACE",
        )  # fmt: skip
    return outputs.beside(final)


def resolved(path: Path) -> Path:
    """Returns an absolute path without links.

    Raises UsageError for links in a circle, ResourceError where it may not look.
    """
    with disk_errors(path):
        found = Path(os.path.realpath(path))
    try:
        found.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:  # nothing else is wrong with a place that is not there yet
            raise UsageError(
                "is a link that leads to itself", where=str(path), hint="choose another -o", kind="E-OUTPUT-PLACE"
            ) from error
    return found


def publish(
    partial: Path, final: Path, overwrite: bool, announce: Callable[[Path], None] = lambda old: None
) -> Path | None:
    """Renames `partial` to `final`; on any failure the old content of `final` is back in place.

    With `overwrite` the old content moves aside. `announce` gets its new place before; it is returned too.
    Raises UsageError when `final` is not empty and `overwrite` is off, ResourceError when renaming fails.
    """
    final = resolved(final)
    state = output_state(final)
    if state in ("finished", "foreign") and not overwrite:
        raise UsageError(
            f"exists and is not empty ({state})", where=str(final), hint="use --overwrite to replace it",
            kind="E-OUTPUT-EXISTS",
        )  # fmt: skip
    with disk_errors(final):
        if state in ("absent", "empty"):
            _rename(partial, final)  # POSIX replaces an empty directory
            return None
        old = _unused(final)
        announce(old)
        _swap(partial, final, old)
    return old


def _unused(final: Path) -> Path:
    """Returns `<final>.old-<pid>`, or with a number behind it: in a container every run has the same pid."""
    first = final.with_name(f"{final.name}.old-{os.getpid()}")
    names = (first, *(first.with_name(f"{first.name}-{number}") for number in range(2, 10_000)))
    return next(path for path in names if not os.path.lexists(path))


def _swap(partial: Path, final: Path, old: Path) -> None:
    final.rename(old)
    try:
        _rename(partial, final)
    except BaseException:
        old.rename(final)
        raise


def _rename(partial: Path, final: Path) -> None:
    """Renames. A signal, or an error of a network file system, that arrives once it is done does not undo it."""
    inode = partial.stat().st_ino
    try:
        partial.rename(final)
    except BaseException:
        if partial.exists() or not final.exists() or final.stat().st_ino != inode:
            raise
