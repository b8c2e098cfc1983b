"""Decides which side files of a model are copied beside the weights, and why others are not.

A copied file becomes public with the checkpoint. So nothing from outside the model folder is taken through a link,
and nothing that can run code when it is loaded.
"""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quarkcli import dialects
from quarkcli.disk.headers import OTHER_WEIGHTS, PICKLES
from quarkcli.disk.outputs import OURS
from quarkcli.disk.source import Source, is_within
from quarkcli.errors import ModelError

LIMIT = 64 * 2**20  # bytes
README = "README.md"
# Names that a checkpoint writes itself; those of its weight files begin with `model-`.
QUANTIZATION = "quantization_config.json"  # the same object as in config.json
WRITTEN = ("config.json", QUANTIZATION, "model.safetensors.index.json", README)
_WEIGHTS = (".safetensors", *PICKLES, *OTHER_WEIGHTS, ".safetensors.index.json", ".bin.index.json")
_TOKENIZER = ("tokenizer", "vocab", "merges", "tekken", "special_tokens_map", "added_tokens", "spiece", "sentencepiece")

OUTSIDE = "links to a place outside the model folder"
BROKEN = "links that lead nowhere"


@dataclass
class SideFiles:
    """The files beside a model's weights.

    copied     relative path -> the file it is read from
    readme     the model card's file, or None
    left_out   reason -> relative paths, as text for people; files of weights are not listed
    """

    copied: dict[Path, Path] = field(default_factory=dict)
    readme: Path | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, relative: Path, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(shown(relative))

    def warnings(self) -> list[str]:
        """Returns one line for each reason."""
        lines = []
        for reason, names in self.left_out.items():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"not copied to the output ({reason}): {', '.join(names[:5])}{more}")
        return lines

    def lost_tokenizer(self) -> tuple[str, str] | None:
        """Returns a tokenizer file that is a link to nothing or to elsewhere, and the reason; or None."""
        for reason in (BROKEN, OUTSIDE):
            for name in self.left_out.get(reason, ()):
                if name.startswith(_TOKENIZER):
                    return name, reason
        return None


def gather(source: Source) -> SideFiles:
    """Returns every side file, sorted, opened once.

    Raises ModelError for one that cannot be read or stands in our way.

    Hidden files and folders, `original/`, weights of other formats and descriptions of a quantization are passed over.
    """
    found = SideFiles()
    described = {"config.json", QUANTIZATION, *dialects.files_beside()}
    for path in sorted(_walk(source.folder, found)):
        relative = path.relative_to(source.folder)
        if str(relative) in described or _is_weight(path.name):
            continue
        reason = _reason(source, path)
        if reason is not None:
            found.leave_out(relative, reason)
        elif str(relative) == README:
            found.readme = path.resolve()
        else:
            found.copied[relative] = path.resolve()
    return found


def shown(path: Path) -> str:
    """Returns a path as text that can be printed and stored, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _walk(folder: Path, found: SideFiles) -> Iterator[Path]:
    """Yields files and links of a model folder. Linked folders are not entered."""

    def unreadable(error: OSError) -> None:
        raise ModelError(
            f"cannot be read: {error.strerror}", where=str(error.filename), kind="E-MODEL-SIDE-FILE"
        ) from error

    for root, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(root).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "original")
        for name in list(folders):
            if (folder / here / name).is_symlink():
                found.leave_out(here / name, "linked folders")
                folders.remove(name)
            elif here == Path() and name == OURS:
                found.leave_out(Path(name), "the checkpoint has its own folder of this name")
                folders.remove(name)
            elif here == Path() and (name in WRITTEN or (name.startswith("model-") and name.endswith(".safetensors"))):
                what = "is a folder, and the checkpoint needs a file of this name"
                raise ModelError(what, where=str(folder / name), hint="rename the folder", kind="E-MODEL-SIDE-FILE")
        yield from (folder / here / name for name in names if not name.startswith("."))


def _is_weight(name: str) -> bool:
    return name.lower().endswith(_WEIGHTS) and not _is_adapter(name)


def _is_adapter(name: str) -> bool:
    return name == "adapter_config.json" or name.startswith("adapter_model.")


def _reason(source: Source, path: Path) -> str | None:
    """Returns the reason a file is not copied; None when it is."""
    name = shown(path.relative_to(source.folder))
    if name.encode() != os.fsencode(path.relative_to(source.folder)):
        return "names that are not UTF-8"
    if path.relative_to(source.folder) == Path(OURS):
        return "the checkpoint has its own folder of this name"
    if _is_adapter(path.name):
        return "files of an adapter; merge it into the model first if you want it quantized"
    try:
        if path.is_symlink() and (reason := _bad_link(source, path)):
            return reason
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "neither files nor folders"
        pickle = _is_pickle(path)
    except OSError as error:
        raise ModelError(
            f"cannot be read: {error.strerror or error}", where=str(path), kind="E-MODEL-SIDE-FILE"
        ) from error
    if pickle:
        return "pickle files, which can run code when they are loaded"
    return f"larger than {LIMIT >> 20} MiB" if status.st_size > LIMIT else None


def _bad_link(source: Source, path: Path) -> str | None:
    """Returns the reason a link is not followed; None when it is.

    A refused link leads nowhere, outside, or to a file that would not be copied under its own name.
    """
    try:
        if not is_within(source.folder, path):
            return OUTSIDE
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return BROKEN
        raise
    target = path.resolve()
    if not target.is_relative_to(source.folder):
        return None  # a blob of a hub snapshot
    parts = target.relative_to(source.folder).parts
    hidden = any(part.startswith(".") or part == "original" for part in parts) or parts[0] == OURS
    return "links to files that are not copied" if hidden or _is_weight(target.name) else None


def _is_pickle(path: Path) -> bool:
    """True for a pickle since protocol 2, or an archive as torch.save writes it, by content."""
    with path.open("rb") as stream:
        start = stream.read(4)
        if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return True
        if start != b"PK\x03\x04":
            return False
        try:
            with zipfile.ZipFile(stream) as archive:
                return any(name.lower().endswith((".pkl", ".pickle")) for name in archive.namelist())
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            return False
