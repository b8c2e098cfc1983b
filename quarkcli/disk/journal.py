"""The finished parts of an unfinished output, and its hidden states: `<output>.partial/.quark-state/`.

    lock                 held (flock) while a process works here; holds its pid
    fingerprint.json     everything that must be equal for a run to be continued
    journal.json         names of the finished parts, notes, a checksum; rewritten at once
    record-*.json        the record of a finished part, written once: a journal with all of them would grow with every
                         part, and so would the time for the next one
    hidden-{a,b}.safetensors   used in turn: the one that journal.json names last is never written to
    headers.json         headers of the weight files, where the model is on the hub
    download/            weight files of such a model, until their last use
    replaced.json        new places of outputs that are being replaced

At the end the folder stands aside as `<output>.partial.state` until the output has its name, so that a kill in between
is gone on from as well.

The order of a finished part is: shards durable, hidden states durable, record, journal. A kill between any two leaves
the state before the part, and files that no record names, which the next `open` removes.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from quarkcli.disk.headers import read_headers, read_tensors
from quarkcli.disk.place import (
    REPLACED,
    acquire,
    aside_path,
    bring_back,
    check_empty,
    make,
    refuse_links,
    replaced,
    unmake,
)
from quarkcli.disk.writer import (
    STATE,
    atomic_write_json,
    atomic_write_text,
    disk_errors,
    remove,
    remove_staging,
    sync_folder,
    write_tensors,
)
from quarkcli.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch

Resume = Literal["auto", "never", "require"]

SCHEMA = "quark/journal/3"
_HIDDEN = ("hidden-a.safetensors", "hidden-b.safetensors")
_ABSENT = "(absent)"
_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 80


class Journal:
    """The journal of one output directory; made by `open`, usable as a context manager.

    A part's record is any JSON object. Its `files`, when present, is a list of objects with `file` (name relative
    to the partial directory) and `size` in bytes, as `WrittenFile.record()` gives.
    """

    def __init__(self, partial: Path, lock: int, made: list[Path]) -> None:
        self._partial = partial
        self._state = partial / STATE
        self._lock: int | None = lock
        self._made = made  # folders that were not there before, innermost first
        self._kept = False
        self._parts: list[dict[str, Any]] = []  # name, record ({file, sha256}), hidden (the same, or None)
        self._records: dict[str, dict[str, Any]] = {}  # by name of the part
        self._notes: dict[str, Any] = {}

    @staticmethod
    def open(partial: Path, fingerprint: dict[str, Any], *, resume: Resume = "auto") -> Journal:
        """Does `lock`, then `start`."""
        journal = Journal.lock(partial, resume=resume)
        try:
            journal.start(fingerprint, resume=resume)
        except BaseException:
            journal.abandon()
            raise
        return journal

    @staticmethod
    def lock(partial: Path, *, resume: Resume = "auto") -> Journal:
        """Takes the place of an output, so that no other process works for it. Until `keep`, a failure leaves nothing.

        resume  as in `start`

        Raises UsageError (nothing to resume, a directory that is not ours, links), ResourceError (another process
        works here, not writable).
        """
        with disk_errors(partial):
            refuse_links(partial)
            bring_back(partial)
            started = (partial / STATE / "fingerprint.json").is_file()
            if resume == "require" and not started:
                hint = "drop --resume require"
                raise UsageError("there is no unfinished run to resume", where=str(partial), hint=hint)
            if resume != "never" and not started:
                check_empty(partial)
            made = make(partial / STATE)
            try:
                return Journal(partial, acquire(partial / STATE / "lock"), made)
            except BaseException:
                unmake(made)
                raise

    def start(self, fingerprint: dict[str, Any], *, resume: Resume = "auto") -> None:
        """Begins, or goes on with what is finished.

        fingerprint   JSON-able, may be nested; a difference to the stored one is an error
        resume        auto: go on when there is something; never: wipe it first; require: there must be something

        Raises ConfigError (other fingerprint, damaged state), ResourceError.
        """
        path = self._state / "fingerprint.json"
        if resume == "never" or not path.is_file():
            self._wipe()  # also what a kill left of an earlier wipe: an old journal must not meet a new fingerprint
            sync_folder(self._partial.parent)
            atomic_write_json(path, fingerprint)
            return
        _compare(self._partial, _load(path), _plain(fingerprint))
        self._load_parts()
        self._remove_strays()

    def keep(self) -> None:
        """Keeps the directory from here on, however the run ends."""
        self._kept = True

    def abandon(self) -> None:
        """Removes what `lock` made and everything in it, unless it is to be kept; releases the lock."""
        if not self._kept:
            with suppress(OSError):
                if self._partial in self._made:
                    remove(self._partial)
                elif self._state in self._made:
                    remove(self._state)
            unmake(self._made)
        self.close()

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Returns part name -> record, in the order they were finished."""
        return {part["name"]: self._records[part["name"]] for part in self._parts}

    @property
    def notes(self) -> dict[str, Any]:
        """Returns small facts kept over restarts (a copy); set with `note`."""
        return dict(self._notes)

    def note(self, key: str, value: Any) -> None:
        """Keeps a small JSON value durably. Raises ResourceError."""
        self._store(self._parts, {**self._notes, key: value})

    def finish(self, part: str, record: dict[str, Any], hidden: dict[str, torch.Tensor] | None = None) -> None:
        """Records a part whose files are durable already, with what the next part needs. Raises ResourceError."""
        if any(own["name"] == part for own in self._parts):
            raise ValueError(f"part {part!r} is finished already")
        states = self._write_hidden(hidden) if hidden is not None else None
        stored = self._write_record(part, record)
        self._store([*self._parts, {"name": part, "record": stored, "hidden": states}], self._notes)

    def hidden(self) -> dict[str, torch.Tensor] | None:
        """Returns the hidden states of the last finished part, None when it had none.

        Raises ConfigError when they are damaged.
        """
        named = self._parts[-1]["hidden"] if self._parts else None
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
        """Reads the files of finished parts once, and forgets the parts whose files are not as they were written.

        Where hidden states lead from part to part, all parts after a lost one are forgotten with it. When the part
        before has lost its hidden states to a later one, nothing can go on from there: all are forgotten. Returns the
        names of what was forgotten. Raises ResourceError.
        """
        with disk_errors(self._partial):
            lost = [index for index, part in enumerate(self._parts) if not self._has_files(part)]
        if not lost:
            return []
        if any(part["hidden"] for part in self._parts):
            first = 0 if lost[0] and self._hidden_is_overwritten(lost[0]) else lost[0]
            lost = list(range(first, len(self._parts)))
        dropped = [self._parts[index]["name"] for index in lost]
        self._store([part for part in self._parts if part["name"] not in dropped], self._notes)
        self._remove_strays()
        return dropped

    def close(self) -> None:
        """Releases the lock; the state stays."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            os.close(lock)

    def set_aside(self) -> None:
        """Moves the state out of the directory that is about to be published, in one rename; `lock` finds it there."""
        aside = aside_path(self._partial)
        with disk_errors(self._state):
            for name in _HIDDEN:
                (self._state / name).unlink(missing_ok=True)
            remove(aside)
            self._state.rename(aside)
            self._state = aside
            sync_folder(self._partial)

    def announce(self, old: Path) -> None:
        """Notes durably that the output that is being replaced moves to `old`, for a run after a kill to remove it."""
        atomic_write_json(self._state / REPLACED, [*self.replaced, str(old)])

    @property
    def replaced(self) -> list[str]:
        """Returns paths of what was replaced and may still be there."""
        return replaced(self._state)

    def discard_state(self) -> None:
        """Removes the state, wherever it is, and releases the lock: the very last step."""
        if self._state != aside_path(self._partial):
            self.set_aside()
        with disk_errors(self._state):
            remove(self._state)
        self.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        self.close()

    def _load_parts(self) -> None:
        path = self._state / "journal.json"
        if not path.is_file():  # killed before the first part
            return
        stored = _load(path)
        try:
            if stored["schema"] != SCHEMA or stored["sha256"] != _checksum(stored["parts"], stored["notes"]):
                raise _damaged(path)
            self._parts = [{key: part[key] for key in ("name", "record", "hidden")} for part in stored["parts"]]
            self._records = {part["name"]: self._read_record(part["record"]) for part in self._parts}
            self._notes = dict(stored["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path) from error

    def _store(self, parts: list[dict[str, Any]], notes: dict[str, Any]) -> None:
        """Stores the state, disk first: what memory says is never ahead of what a restart would find."""
        parts, notes = _plain(parts), _plain(notes)
        stored = {"schema": SCHEMA, "sha256": _checksum(parts, notes), "parts": parts, "notes": notes}
        atomic_write_json(self._state / "journal.json", stored)
        self._parts, self._notes = parts, notes

    def _write_record(self, part: str, record: dict[str, Any]) -> dict[str, str]:
        text = json.dumps(record)
        file = f"record-{_sha256(part.encode())[:16]}.json"
        atomic_write_text(self._state / file, text)
        self._records[part] = json.loads(text)  # as a restart finds it
        return {"file": file, "sha256": _sha256(text.encode())}

    def _read_record(self, stored: dict[str, str]) -> dict[str, Any]:
        path = self._state / stored["file"]
        record = _load(path)
        if _sha256(path.read_bytes()) != stored["sha256"]:
            raise _damaged(path)
        return record

    def _write_hidden(self, hidden: dict[str, torch.Tensor]) -> dict[str, str]:
        last = self._parts[-1]["hidden"] if self._parts else None
        file = _HIDDEN[1] if last and last["file"] == _HIDDEN[0] else _HIDDEN[0]
        return {"file": file, "sha256": write_tensors(self._state / file, hidden).sha256}

    def _has_files(self, part: dict[str, Any]) -> bool:
        return all(
            _is_sound(self._partial / file["file"], file) for file in self._records[part["name"]].get("files", [])
        )

    def _hidden_is_overwritten(self, count: int) -> bool:
        """True when a part after the first `count` wrote to the file with the hidden states of the last of them."""
        last = self._parts[count - 1]["hidden"]
        later = [part["hidden"]["file"] for part in self._parts[count:] if part["hidden"]]
        return last is not None and last["file"] in later

    def _wipe(self) -> None:
        """Removes everything but the lock, which is ours by now."""
        with disk_errors(self._partial):
            # the fingerprint goes first: without it, what a kill leaves of the rest is not taken for a journal
            (self._state / "fingerprint.json").unlink(missing_ok=True)
            ours = (self._state, self._state / "lock", self._state / REPLACED)
            for path in [*self._state.iterdir(), *self._partial.iterdir()]:
                if path not in ours:
                    remove(path)

    def _remove_strays(self) -> None:
        """Removes what a kill left: temporary files, and shards that no record names."""
        listed = {file["file"] for record in self.finished.values() for file in record.get("files", [])}
        with disk_errors(self._partial):
            shards = [
                path
                for path in self._partial.rglob("model-*.safetensors*")
                if self._relative(path) not in listed and not path.is_relative_to(self._state)
            ]
            for path in shards:
                remove(path)
        remove_staging(self._partial)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._partial).as_posix()


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
    """Returns dotted keys (`recipe.entries[3].enable`) -> JSON text; empty containers are values."""
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
    """Returns `value` as JSON gives it back (lists for tuples, text keys), so that memory and file never differ."""
    return json.loads(json.dumps(value))


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(value, dict):
        raise _damaged(path)
    return value


def _damaged(path: Path) -> ConfigError:
    hint = f"delete {path.parent.parent} or use --resume never to start again"
    return ConfigError("the state of the unfinished run is damaged", where=str(path), hint=hint)


def _checksum(parts: list[dict[str, Any]], notes: dict[str, Any]) -> str:
    return _sha256(json.dumps([parts, notes], sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_sound(path: Path, file: dict[str, Any]) -> bool:
    """True when a finished file has the size, and where that is known the hash, with which it was written."""
    if not path.is_file() or path.stat().st_size != file["size"]:
        return False
    if "sha256" not in file:
        return True
    with path.open("rb") as stream:
        return bool(hashlib.file_digest(stream, "sha256").hexdigest() == file["sha256"])
