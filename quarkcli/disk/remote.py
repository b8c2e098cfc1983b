"""A model on the hub of which only what is needed is here: small files whole, of weight files the headers."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from quarkcli import dialects
from quarkcli.disk import hub, pickles
from quarkcli.disk.headers import INDEX, Header, header_length, parse_headers
from quarkcli.errors import ModelError
from quarkcli.events import Listener, silent

CONFIG = "config.json"
SMALL = 64 * 2**20  # bytes; larger files beside the weights are not copied into a checkpoint
_AT_ONCE = 8  # requests


@dataclass
class Remote:
    """One commit of a model on the hub.

    folder   its snapshot in the hub's cache, which holds what was downloaded
    names    all its files, but weights of formats that are not read
    ignored  those
    sizes    bytes of files whose size is known
    """

    hub_id: str
    commit: str
    folder: Path
    names: list[str]
    ignored: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    tell: Listener = silent

    @staticmethod
    def open(hub_id: str, revision: str, tell: Listener = silent) -> Remote | None:
        """Returns a model with its config, its index, and the names of its files; None when the hub is out of reach.

        Raises AccessError, ModelError (no config.json), ResourceError.
        """
        import huggingface_hub as api
        from huggingface_hub import errors, utils

        with hub.refusals(hub_id, revision):
            try:
                config = Path(api.hf_hub_download(hub_id, CONFIG, revision=revision))
            except errors.RemoteEntryNotFoundError as error:
                what = "no config.json: this is not a Hugging Face model"
                raise ModelError(what, where=hub_id, hint=f"revision {revision} has none") from error
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
            remote = Remote(hub_id, commit, config.parent, names, ignored, sizes, tell)
            remote.fetch([INDEX, *dialects.files_beside()])
        return remote

    def is_here(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads those of these files that there are and that are not here."""
        import huggingface_hub as api

        def one(name: str) -> None:
            with hub.refusals(self.hub_id, self.commit):
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

    def headers(self, files: Iterable[str]) -> dict[str, tuple[int, list[Header]]]:
        """Returns size and headers of weight files that are not here, read by range."""
        files = list(files)
        if missing := [file for file in files if file not in self.names]:
            raise ModelError("the index names it, and the hub has no such file", where=f"{self.hub_id}/{missing[0]}")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(files, pool.map(self._headers, files), strict=True))

    def _headers(self, file: str) -> tuple[int, list[Header]]:
        where = f"{self.hub_id}/{file}"
        with hub.refusals(self.hub_id, self.commit):
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
                for chunk in response.iter_raw():
                    found += chunk
                    if len(found) >= skipped + count:
                        break
            return bytes(found[skipped : skipped + count]), size

        return hub.patiently(read, f"{self.hub_id}/{file}", self.tell)
