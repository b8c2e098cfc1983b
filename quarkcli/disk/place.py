"""Makes the place of an output: its lock, its folders; finds the leftovers of a killed run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from quarkcli.disk import manifest, outputs
from quarkcli.disk.writer import STATE, disk_errors, remove
from quarkcli.errors import QuarkError, ResourceError, UsageError, some

REPLACED = "replaced.json"
# file systems without locks (some network ones): working unlocked beats not working
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def aside_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.state")


def remove_stale(partial: Path) -> list[str]:
    """Removes the leftovers of a run that was killed once its output had its name: its state, the replaced output.

    Returns remarks about it. A folder that another process works with is left alone. Raises ResourceError.
    """
    aside, final = aside_path(partial), partial.with_name(partial.name.removesuffix(".partial"))
    with disk_errors(aside):
        if os.path.lexists(partial) or aside.is_symlink() or not (aside / "lock").is_file():
            return []
        try:
            lock = acquire(aside / "lock")
        except ResourceError:
            return []
        try:
            said = [line for old in replaced(aside) for line in dispose(Path(old), final)]
            remove(aside)
        finally:
            os.close(lock)
    return said


def earlier(final: Path) -> list[Path]:
    """Returns the folders that earlier runs moved aside from an output and left: they hold files that are not ours."""
    pattern = re.compile(rf"{re.escape(final.name)}\.old-\d+(-\d+)?")
    return sorted(path for path in final.parent.iterdir() if pattern.fullmatch(path.name))


def dispose(old: Path, final: Path) -> list[str]:
    """Removes what `final` replaced, but for what is not ours. Returns remarks about it. Raises OSError."""
    if old.is_symlink() or not old.is_dir():
        return [f"what was replaced is now in {old}"] if os.path.lexists(old) else []
    was_ours = bool(outputs.checkpoints(old))
    kept = manifest.remove_ours(old)
    if not kept:
        return []
    if not was_ours:
        return [f"what was in {final} is now in {old}"]
    return [f"{len(kept)} files in {final} differ from what quark wrote and are now in {old}: {some(kept)}"]


def replaced(state: Path) -> list[str]:
    """Returns the places to which replaced outputs were moved; only names that we give."""
    path = state / REPLACED
    final = state.parent if state.name == STATE else state
    final = final.with_name(final.name.removesuffix(".state").removesuffix(".partial"))
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else []
    except (ValueError, RecursionError):  # damaged: then nothing is ours to remove
        value = []
    names = value if isinstance(value, list) else []
    return [name for name in names if isinstance(name, str) and Path(name).name.startswith(f"{final.name}.old-")]


def make(folder: Path) -> list[Path]:
    """Makes a folder and those around it; returns the new ones, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except BaseException:
        unmake(missing)
        raise
    return missing


def unmake(folders: list[Path]) -> None:
    """Removes folders that are empty again."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def refuse_links(partial: Path) -> None:
    """Refuses links: nothing is written or removed through one, for whatever it leads to is not ours."""
    aside = aside_path(partial)
    linked = [path for path in (partial, aside) if path.is_symlink()]
    if not linked and partial.is_dir():
        linked = [path for path in (partial / STATE, partial / outputs.OURS, *partial.rglob("*")) if path.is_symlink()]
    if linked:
        hint = "remove the link; the run needs a directory of its own"
        raise UsageError(
            "is a link, not the directory of an unfinished run",
            where=str(linked[0]),
            hint=hint,
            kind="E-OUTPUT-PARTIAL",
        )


def bring_back(partial: Path) -> None:
    """Undoes `set_aside` of a run that ended before its directory had its final name."""
    aside, state = aside_path(partial), partial / STATE
    if state.exists() or not outputs.checkpoints(partial) or not (aside / "fingerprint.json").is_file():
        return
    lock = acquire(aside / "lock")
    try:
        aside.rename(state)
    finally:
        os.close(lock)


def acquire(path: Path) -> int:
    """Returns an open descriptor that holds the lock.

    The kernel releases it when the process ends, however it ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise ResourceError(
                "another process has just finished this output",
                where=str(path.parent.parent),
                hint="run the same command again",
                kind="E-OUTPUT-BUSY",
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        os.close(descriptor)
        raise _held(path) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    except QuarkError:
        os.close(descriptor)
        raise
    return descriptor


def _held(path: Path) -> ResourceError:
    pid = path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    mine = pid == str(os.getpid())  # whoever stops that process stops the notebook that asks
    who = "another run of this process" if mine else "another process"
    hint = "wait for it, or choose another -o" if mine else "wait for it, stop it, or choose another -o"
    what = f"{who} (pid {pid}) is working here"
    return ResourceError(what, where=str(path.parent.parent), hint=hint, kind="E-OUTPUT-BUSY")


def check_empty(partial: Path) -> None:
    """Refuses a `.partial` without a journal: it is either being created or not ours, and nothing of it is touched."""
    if partial.exists() and not partial.is_dir():
        raise UsageError(
            "exists and is not a directory",
            where=str(partial),
            hint="move it to another place",
            kind="E-OUTPUT-PARTIAL",
        )
    if not partial.is_dir() or all(path.name == STATE for path in partial.iterdir()):
        return
    if outputs.checkpoints(partial):
        final = partial.with_name(partial.name.removesuffix(".partial"))
        raise UsageError(
            "is a finished checkpoint that was not renamed",
            where=str(partial),
            hint=f"rename it to {final}",
            kind="E-OUTPUT-PARTIAL",
        )
    hint = "move it to another place, or use --resume never to delete it"
    raise UsageError(
        "is not empty and not a run that can be continued", where=str(partial), hint=hint, kind="E-OUTPUT-PARTIAL"
    )
