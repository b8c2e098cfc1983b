"""What of an unfinished output is done, and the carry to go on with: `<output>.partial/state/`.

    lock                 held (flock) while a process works here; holds its pid
    fingerprint.json     everything that must be equal for a run to be continued
    journal.json         finished parts with their records, notes; rewritten at once
    carry-{a,b}.safetensors   used in turn: the one that journal.json names last is never written to

At the end `state/` stands aside as `<output>.partial.state` until the output has its name, so that a kill in between
is gone on from as well.

The order of a finished part is: shards durable, carry durable, journal. A kill between any two leaves the state
before the part, and files that no record names, which the next `open` removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from quarkcli.errors import ConfigError, QuarkError, ResourceError, UsageError
from quarkcli.source import read_headers, read_tensors
from quarkcli.writer import MANIFEST, STAGING, atomic_write_json, disk_errors, sync_folder, write_tensors

if TYPE_CHECKING:
    import torch

Resume = Literal["auto", "never", "require"]

SCHEMA = "quark/journal/1"
_CARRIES = ("carry-a.safetensors", "carry-b.safetensors")
_ABSENT = "(absent)"
_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 80
# file systems without locks (some network ones): working unlocked beats not working
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Journal:
    """The journal of one output directory; made by `open`, usable as a context manager.

    A part's record is any JSON object. Its `files`, when present, is a list of objects with `file` (name relative
    to the partial directory) and `size` in bytes, as `WrittenFile.record()` gives.
    """

    def __init__(self, partial: Path, lock: int) -> None:
        self._partial = partial
        self._state = partial / "state"
        self._lock: int | None = lock
        self._parts: list[dict[str, Any]] = []  # name, record, carry ({file, sha256} or None)
        self._notes: dict[str, Any] = {}

    @staticmethod
    def open(partial: Path, fingerprint: dict[str, Any], *, resume: Resume = "auto") -> Journal:
        """Create the partial directory or go on in it.

        fingerprint   JSON-able, may be nested; a difference to the stored one is an error
        resume        auto: go on when there is something; never: wipe it first; require: there must be something

        Raises ConfigError (other fingerprint, damaged state), UsageError (nothing to resume, or a directory that
        is not ours), ResourceError (another process works here, not writable).
        """
        _bring_back(partial)
        started = (partial / "state" / "fingerprint.json").is_file()
        if resume == "require" and not started:
            raise UsageError("there is no unfinished run to resume", where=str(partial), hint="drop --resume require")
        if resume != "never" and not started:
            _check_empty(partial)
        with disk_errors(partial):
            (partial / "state").mkdir(parents=True, exist_ok=True)
            journal = Journal(partial, _acquire(partial / "state" / "lock"))
        try:
            journal._start(fingerprint, wipe=resume == "never")
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Part name -> record, in the order they were finished."""
        return {part["name"]: part["record"] for part in self._parts}

    @property
    def notes(self) -> dict[str, Any]:
        """Small facts kept over restarts (a copy); set with `note`."""
        return dict(self._notes)

    def note(self, key: str, value: Any) -> None:
        """Keep a small JSON value durably. Raises ResourceError."""
        self._store(self._parts, {**self._notes, key: value})

    def finish(self, part: str, record: dict[str, Any], carry: dict[str, torch.Tensor] | None = None) -> None:
        """Record a part whose files are durable already, with what the next part needs. Raises ResourceError."""
        if part in self.finished:
            raise ValueError(f"part {part!r} is finished already")
        stored = self._write_carry(carry) if carry is not None else None
        self._store([*self._parts, {"name": part, "record": _plain(record), "carry": stored}], self._notes)

    def carry(self) -> dict[str, torch.Tensor] | None:
        """The carry of the last finished part, None when it had none. Raises ConfigError when it is damaged."""
        named = self._parts[-1]["carry"] if self._parts else None
        if named is None:
            return None
        path = self._state / named["file"]
        try:
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != named["sha256"]:
                    raise _damaged(path)
            return read_tensors(path, read_headers(path, path.name))
        except OSError as error:
            raise _damaged(path) from error

    def verify(self) -> list[str]:
        """Forget the first part with a missing or wrong-sized file and all after it; returns their names.

        When the part before has lost its carry to a later one, nothing can go on from there: all are forgotten.
        Raises ResourceError.
        """
        sound = next((i for i, part in enumerate(self._parts) if not self._has_files(part)), len(self._parts))
        if sound == len(self._parts):
            return []
        if sound and self._carry_is_overwritten(sound):
            sound = 0
        dropped = [part["name"] for part in self._parts[sound:]]
        self._store(self._parts[:sound], self._notes)
        self._remove_strays()
        return dropped

    def close(self) -> None:
        """Release the lock; the state stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def set_aside(self) -> None:
        """Move `state/` out of the directory that is about to be published, in one rename; `open` finds it there."""
        aside = _aside(self._partial)
        with disk_errors(self._state):
            for name in _CARRIES:
                (self._state / name).unlink(missing_ok=True)
            _remove(aside)
            self._state.rename(aside)
            sync_folder(self._partial)

    def discard_state(self) -> None:
        """Remove the state, wherever it is, and release the lock: the very last step."""
        if self._state.exists():
            self.set_aside()
        with disk_errors(self._state):
            _remove(_aside(self._partial))
        self.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, fingerprint: dict[str, Any], *, wipe: bool) -> None:
        path = self._state / "fingerprint.json"
        if wipe or not path.is_file():
            self._wipe()  # also what a kill left of an earlier wipe: an old journal must not meet a new fingerprint
            sync_folder(self._partial.parent)
            atomic_write_json(path, fingerprint)
            return
        _compare(self._partial, _load(path), _plain(fingerprint))
        self._load_parts()
        self._remove_strays()

    def _load_parts(self) -> None:
        path = self._state / "journal.json"
        if not path.is_file():  # killed before the first part
            return
        stored = _load(path)
        try:
            if stored["schema"] != SCHEMA:
                raise _damaged(path)
            self._parts = [{key: part[key] for key in ("name", "record", "carry")} for part in stored["parts"]]
            self._notes = dict(stored["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path) from error

    def _store(self, parts: list[dict[str, Any]], notes: dict[str, Any]) -> None:
        """Disk first: what memory says is never ahead of what a restart would find."""
        atomic_write_json(self._state / "journal.json", {"schema": SCHEMA, "parts": parts, "notes": notes})
        self._parts, self._notes = parts, _plain(notes)

    def _write_carry(self, carry: dict[str, torch.Tensor]) -> dict[str, str]:
        last = self._parts[-1]["carry"] if self._parts else None
        file = _CARRIES[1] if last and last["file"] == _CARRIES[0] else _CARRIES[0]
        return {"file": file, "sha256": write_tensors(self._state / file, carry).sha256}

    def _has_files(self, part: dict[str, Any]) -> bool:
        return all(_size(self._partial / file["file"]) == file["size"] for file in part["record"].get("files", []))

    def _carry_is_overwritten(self, count: int) -> bool:
        """True when a part after the first `count` wrote to the file that holds the carry of the last of them."""
        last = self._parts[count - 1]["carry"]
        later = [part["carry"]["file"] for part in self._parts[count:] if part["carry"]]
        return last is not None and last["file"] in later

    def _wipe(self) -> None:
        """Remove everything but the lock, which is ours by now."""
        with disk_errors(self._partial):
            # the fingerprint goes first: without it, what a kill leaves of the rest is not taken for a journal
            (self._state / "fingerprint.json").unlink(missing_ok=True)
            for path in [*self._state.iterdir(), *self._partial.iterdir()]:
                if path not in (self._state, self._state / "lock"):
                    _remove(path)

    def _remove_strays(self) -> None:
        """Remove what a kill left: temporary files, and shards that no record names."""
        listed = {file["file"] for part in self._parts for file in part["record"].get("files", [])}
        with disk_errors(self._partial):
            shards = [
                path for path in self._partial.rglob("model-*.safetensors*") if self._relative(path) not in listed
            ]
            for path in [*shards, *self._partial.rglob(f"{STAGING}*")]:
                _remove(path)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._partial).as_posix()


def _aside(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.state")


def _bring_back(partial: Path) -> None:
    """Undo `set_aside` of a run that ended before its directory had its final name."""
    aside, state = _aside(partial), partial / "state"
    if state.exists() or not (partial / MANIFEST).is_file() or not (aside / "fingerprint.json").is_file():
        return
    with disk_errors(partial):
        lock = _acquire(aside / "lock")
        try:
            aside.rename(state)
        finally:
            os.close(lock)


def _acquire(path: Path) -> int:
    """An open descriptor that holds the lock; the kernel releases it when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise ResourceError("another process just finished it", where=str(path.parent.parent), hint="run again")
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
    hint = "wait for it, stop it, or choose another output with -o"
    return ResourceError(f"another process (pid {pid}) is working here", where=str(path.parent.parent), hint=hint)


def _check_empty(partial: Path) -> None:
    """A `.partial` without a journal is either being created or not ours: nothing of it is touched."""
    if partial.exists() and not partial.is_dir():
        raise UsageError("exists and is not a directory", where=str(partial), hint="move it away")
    if not partial.is_dir() or all(path.name == "state" for path in partial.iterdir()):
        return
    if (partial / MANIFEST).is_file():
        final = partial.with_name(partial.name.removesuffix(".partial"))
        raise UsageError("is finished and was only not renamed", where=str(partial), hint=f"rename it to {final}")
    hint = "move it away, or use --resume never to delete it"
    raise UsageError("is not empty, and no run that could be continued", where=str(partial), hint=hint)


def _compare(partial: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = _flatten(old), _flatten(new)
    differing = [key for key in {**now, **before} if now.get(key, _ABSENT) != before.get(key, _ABSENT)]
    if not differing:
        return
    lines = [f"  {key}: {_short(before, key)} -> {_short(now, key)}" for key in differing[:_SHOWN_KEYS]]
    if len(differing) > _SHOWN_KEYS:
        lines.append(f"  and {len(differing) - _SHOWN_KEYS} more")
    what = "the unfinished run there was started with other settings (old -> new):\n" + "\n".join(lines)
    hint = f"repeat the old settings, or delete {partial} or use --resume never to start again"
    raise ConfigError(what, where=str(partial), hint=hint)


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Dotted keys (`recipe.entries[3].enable`) -> JSON text; empty containers are values."""
    if isinstance(value, dict) and value:
        pairs = [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {key: json.dumps(value, ensure_ascii=False)}
    return {path: text for name, item in pairs for path, text in _flatten(item, name).items()}


def _short(flat: dict[str, str], key: str) -> str:
    text = flat.get(key, _ABSENT)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back (lists for tuples, text keys), so that memory and file never differ."""
    return json.loads(json.dumps(value))


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path) from error
    if not isinstance(value, dict):
        raise _damaged(path)
    return value


def _damaged(path: Path) -> ConfigError:
    hint = f"delete {path.parent.parent} or use --resume never to start again"
    return ConfigError("the state of the unfinished run is damaged", where=str(path), hint=hint)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
