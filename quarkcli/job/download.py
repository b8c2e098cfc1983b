"""Downloads what a plan needs of a model on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from quarkcli.algorithms.base import Assignment
from quarkcli.disk import remote as remotes
from quarkcli.disk import side_files as files_beside
from quarkcli.disk.outputs import nearest
from quarkcli.disk.source import Source
from quarkcli.disk.stream import AT_ONCE, Stream
from quarkcli.disk.writer import STATE, disk_errors, free_bytes, partial_path, remove
from quarkcli.errors import ResourceError
from quarkcli.events import Listener, Message, Working
from quarkcli.job import directories, preflight
from quarkcli.job.options import Download, Options, Prepared
from quarkcli.plan.model import Part

FOLDER = "download"  # of the journal's
_ASKED = "--keep-download is given"


def needed(options: Options, source: Source, steps: Iterable[Assignment], prepass: object) -> Download | None:
    """Returns what of the weights has to be downloaded; None where all of them are here."""
    sizes = sorted((size for file, size in source.files.items() if source.is_far(file)), reverse=True)
    if not sizes:
        return None
    kept = _ASKED if options.keep_download else ""
    if prepass or any(step.kind == "transform" for step in steps):
        kept = "transforms read weights more than once"
    return Download(len(sizes), sum(sizes), 0 if kept else sum(sizes[:AT_ONCE]), kept)


def idle(options: Options, source: Source, download: Download | None) -> list[str]:
    """Returns a line for `--keep-download` where it has no effect."""
    if not options.keep_download:
        return []
    if download is None:
        where = "the hub's cache holds the model already" if source.hub_id is not None else "the model is a directory"
        return [f"--keep-download is not used: {where}"]
    if download.kept == _ASKED:
        return []
    return [f"--keep-download changes nothing: the download is kept anyway, because {download.kept}"]


def check_room(prepared: Prepared) -> None:
    """Raises ResourceError when the hub's cache has no room for the weights that are kept there."""
    remote, download = prepared.source.remote, prepared.download
    if remote is None or download is None or not download.kept:
        return
    free = free_bytes(remote.folder)
    with disk_errors(prepared.output):
        one_disk = remote.folder.stat().st_dev == nearest(prepared.output).stat().st_dev
    need = download.bytes + (directories.together(prepared).disk_bytes if one_disk else 0)
    if need > free:
        what = f"{need:,} bytes needed for the download, {free:,} free"
        raise ResourceError(
            what, where=str(remote.folder), hint="free some space, or set HF_HOME to a larger disk", kind="E-DISK-FULL"
        )


def side_files(prepared: Prepared, tell: Listener) -> None:
    """Downloads the files beside the weights. Raises AccessError, ModelError, ResourceError."""
    source = prepared.source
    if source.remote is None:
        return
    tell(Working("downloading the files beside the weights"))
    source.whole_folder()
    found = files_beside.gather(source)
    for one in prepared.every:
        one.side_files = found
    preflight.check_tokenizer(source, prepared.side_files, prepared.calibration)
    for warning in prepared.side_files.warnings():
        tell(Message(warning, "warning"))


def keep_headers(prepared: Prepared, partial: Path) -> None:
    """Keeps the headers of all weight files with the journal: a run that goes on asks for no file that it has done."""
    remote = prepared.source.remote
    if remote is not None and remote.known:
        remotes.keep(remote, headers_path(partial))


def headers_path(partial: Path) -> Path:
    return partial / STATE / "headers.json"


@contextmanager
def streaming(prepared: Prepared, todo: Sequence[Part], tell: Listener) -> Iterator[Stream | None]:
    """Downloads the weight files of these parts while they are worked on; None where all are here."""
    source, remote = prepared.source, prepared.source.remote
    uses = {part.name: _uses(prepared, part) for part in todo}
    if remote is None or prepared.download is None or not any(uses.values()):
        yield None
        return
    folder = partial_path(prepared.output) / STATE / FOLDER
    stream: Stream

    def bring(file: str) -> Path:
        assert remote is not None
        if prepared.download is not None and prepared.download.kept:
            remote.fetch([file])
            return source.folder / file
        return remote.bring(file, folder, stream.stop)

    stream = Stream(uses, bring, drops=not prepared.download.kept, holds=bool(prepared.plan.carried), tell=tell)
    _tidy(folder, uses.values())
    remote.tell, remote.stream = tell, stream
    try:
        with stream:
            yield stream
    finally:
        remote.stream = None
        with suppress(OSError):
            folder.rmdir()


def _uses(prepared: Prepared, part: Part) -> dict[str, set[str]]:
    """Returns the files on the hub that a part lies in, with its tensors in each."""
    found: dict[str, set[str]] = {}
    for name in prepared.weights.stored(part.tensors):
        file = prepared.source.headers[name].file
        if prepared.source.is_far(file):
            found.setdefault(file, set()).add(name)
    return found


def _tidy(folder: Path, uses: Iterable[dict[str, set[str]]]) -> None:
    """Removes what an earlier run downloaded and this one does not need first."""
    first = list(dict.fromkeys(file for files in uses for file in files))[:AT_ONCE]
    with disk_errors(folder):
        for path in list(folder.rglob("*")) if folder.is_dir() else []:
            if path.is_file() and path.relative_to(folder).as_posix().removesuffix(remotes.PART) not in first:
                remove(path)
