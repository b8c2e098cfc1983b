"""Opens a model on the hub with what a plan needs: small files whole, and the headers of weight files."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from quarkcli import dialects
from quarkcli.disk import hub, pickles
from quarkcli.disk.headers import INDEX, Header, header_length, parse_headers
from quarkcli.disk.stream import Stream
from quarkcli.disk.writer import atomic_write_json, disk_errors
from quarkcli.errors import HubError, ModelError, QuarkError
from quarkcli.events import Listener, silent

CONFIG = "config.json"
SMALL = 64 * 2**20  # bytes; larger files beside the weights are not copied into a checkpoint
_AT_ONCE = 8  # requests
PART = ".part"
Known = tuple[int, list[Header]]


@dataclass
class Remote:
    """One commit of a model on the hub.

    folder   its snapshot in the hub's cache, which holds what was downloaded
    names    all its files, but weights of formats that are not read
    ignored  those
    sizes    bytes of files whose size is known
    digests  sha256 of large files
    known    size and headers of weight files, from an earlier run
    stream   brings weight files one after the other while a job runs; None: they go to the hub's cache
    """

    hub_id: str
    commit: str
    folder: Path
    names: list[str]
    ignored: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    stream: Stream | None = None
    tell: Listener = silent

    @staticmethod
    def open(hub_id: str, revision: str, kept: Path | None = None, tell: Listener = silent) -> Remote | None:
        """Returns a model with its config, its index, and the names of its files; None when the hub is out of reach.

        kept   a file that `keep` wrote

        Raises HubError, ModelError (no config.json), ResourceError.
        """
        import huggingface_hub as api
        from huggingface_hub import errors, utils

        with hub.refusals(hub_id, revision):
            if not hub.answers():
                api.hf_hub_download(hub_id, CONFIG, revision=revision, local_files_only=True)
                return None
            try:
                config = Path(api.hf_hub_download(hub_id, CONFIG, revision=revision))
            except errors.RemoteEntryNotFoundError as error:
                what = "no config.json: this is not a Hugging Face model"
                raise ModelError(
                    what, where=hub_id, hint=f"look for another revision; {revision} has none", kind="E-MODEL-FILES"
                ) from error
            commit = config.parent.name
            try:
                asked = lambda: api.HfApi().model_info(hub_id, revision=commit, files_metadata=True)  # noqa: E731
                files = hub.patiently(asked, hub_id, tell).siblings or []
            except Exception as error:
                if hub.is_out_of_reach(error):  # the config came from the cache
                    return None
                raise
            every = [file.rfilename for file in files]
            names = list(utils.filter_repo_objects(every, ignore_patterns=hub.IGNORED))
            ignored = [name for name in every if name not in names]
            sizes = {file.rfilename: file.size for file in files if file.size is not None}
            digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
            remote = Remote(hub_id, commit, config.parent, names, ignored, sizes, digests, tell=tell)
            remote.known = _kept(kept, commit) if kept is not None else {}
            remote.fetch([INDEX, *dialects.files_beside()])
        return remote

    def is_here(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads those of these files that there are and that are not here."""
        import huggingface_hub as api

        def one(name: str) -> None:
            with hub.refusals(self.hub_id, self.commit, found=True):
                api.hf_hub_download(self.hub_id, name, revision=self.commit)

        missing = [name for name in names if name in self.names and not self.is_here(name)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(one, missing):
                pass

    def take_pickles(self) -> None:
        """Downloads pickles with weights, where there are no safetensors files: their headers take the whole file."""
        if not any(name.endswith(".safetensors") and "/" not in name for name in self.names):
            found = [name for name in self.ignored if pickles.READ.fullmatch(name)]
            self.names += found
            self.ignored = [name for name in self.ignored if name not in found]
            self.fetch([*found, pickles.INDEX])

    def beside(self) -> list[str]:
        """Returns the files beside the weights that are small and not hidden."""
        return [name for name in self.names if not self._is_left(name)]

    def _is_left(self, name: str) -> bool:
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        return hidden or name.endswith(".safetensors") or self.sizes.get(name, 0) > SMALL

    def headers(self, files: Iterable[str]) -> dict[str, Known]:
        """Returns size and headers of weight files that are not here, read by range."""
        files = list(files)
        if missing := [file for file in files if file not in self.names]:
            raise ModelError(
                "is in the index but not on the hub",
                where=f"{self.hub_id}/{missing[0]}",
                kind="E-MODEL-INCOMPLETE",
            )
        missing = [file for file in files if file not in self.known]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self.known |= zip(missing, pool.map(self._headers, missing), strict=True)
        return {file: self.known[file] for file in files}

    def _headers(self, file: str) -> Known:
        where = f"{self.hub_id}/{file}"
        with hub.refusals(self.hub_id, self.commit, found=True):
            start, size = self._read(file, 0, 8)
            content, _ = self._read(file, 8, header_length(start, size, where))
        return size, parse_headers(content, size, file, where)

    def _read(self, file: str, start: int, count: int) -> tuple[bytes, int]:
        """Returns bytes of a file, and the size of all of it. A hub without ranges is read up to there."""

        def read() -> tuple[bytes, int]:
            found = bytearray()
            with hub.opened(self.hub_id, self.commit, file, start, count) as response:
                size = hub.total_size(response)
                skipped = 0 if response.status_code == hub.PARTIAL else start
                for chunk in response.iter_raw():  # as it comes, for pieces of a size are lost where it breaks
                    found += chunk
                    if len(found) >= skipped + count:
                        break
            return bytes(found[skipped : skipped + count]), size

        return hub.patiently(read, f"{self.hub_id}/{file}", self.tell)

    def bring(self, file: str, folder: Path, stop: threading.Event) -> Path:
        """Downloads a weight file into a folder and returns its place. What an earlier try left is gone on from.

        stop   ends it

        Raises HubError, ResourceError.
        """
        target = folder / file
        part = target.with_name(target.name + PART)
        if target.is_file():  # an earlier run had all of it
            return target
        with disk_errors(folder):
            part.parent.mkdir(parents=True, exist_ok=True)
        patience = hub.Patience(f"{self.hub_id}/{file}", self.tell, stop)
        with hub.refusals(self.hub_id, self.commit, found=True):
            while not self._is_whole(file, part):
                try:
                    self._go_on(file, part, patience)
                except QuarkError:
                    raise
                except Exception as error:
                    patience.after(error)
        with disk_errors(folder):
            part.replace(target)
        return target

    def _is_whole(self, file: str, part: Path) -> bool:
        """True when all of a file is there. One that is not as the hub has it is removed, which is an error."""
        size = self.known[file][0]
        if not part.is_file() or part.stat().st_size < size:
            return False
        digest = self.digests.get(file)
        with disk_errors(part), part.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest() if digest is not None else None
        if found == digest and part.stat().st_size == size:
            return True
        part.unlink()
        what = "the downloaded file is not the one that the hub lists"
        raise HubError(
            what,
            where=f"{self.hub_id}/{file}",
            hint="run the same command again to download it again",
            kind="E-HUB-DOWNLOAD",
        )

    def _go_on(self, file: str, part: Path, patience: hub.Patience) -> None:
        """Asks for the bytes that are missing, and writes them as they come."""
        size, start = self.known[file][0], part.stat().st_size if part.is_file() else 0
        with hub.opened(self.hub_id, self.commit, file, start) as response:
            mode = "ab" if response.status_code == hub.PARTIAL else "wb"
            if hub.total_size(response) != size:
                raise HubError("its size on the hub changed", where=f"{self.hub_id}/{file}", kind="E-HUB-DOWNLOAD")
            with disk_errors(part):
                stream = part.open(mode, buffering=0)
            with stream:
                for chunk in response.iter_raw():  # as it comes, for pieces of a size are lost where it breaks
                    piece = memoryview(chunk)
                    if patience.stop.is_set():
                        raise HubError(
                            "the download was given up", where=f"{self.hub_id}/{file}", kind="E-HUB-DOWNLOAD"
                        )
                    with disk_errors(part, size - start):
                        while piece:
                            piece = piece[stream.write(piece) :]
                    patience.worked()
                with disk_errors(part):
                    os.fsync(stream.fileno())
        if part.stat().st_size < size:
            raise ConnectionError("the file ended early")


def keep(remote: Remote, path: Path) -> None:
    """Writes sizes and headers of the weight files of a commit. Raises ResourceError."""
    known = remote.known.items()
    files = {file: [size, [list(vars(header).values()) for header in headers]] for file, (size, headers) in known}
    atomic_write_json(path, {"commit": remote.commit, "files": files})


def _kept(path: Path, commit: str) -> dict[str, Known]:
    """Returns what `keep` wrote, if it was of this commit."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["commit"] != commit:
            return {}
        return {file: (size, [_header(*row) for row in rows]) for file, (size, rows) in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _header(name: str, dtype: str, shape: list[int], file: str, start: int, end: int) -> Header:
    return Header(name, dtype, tuple(shape), file, start, end)
