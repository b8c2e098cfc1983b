"""Keeps the finished parts of an unfinished output, and its hidden states: `<output>.partial/.quark-state/`.

    lock                 held (flock) while a process works here; holds its pid
    fingerprint.json     everything that must be equal for a run to be continued
    journal.json         names of the finished parts, notes, a checksum; rewritten at once
    record-*.json        the record of a finished part, written once: a journal with all of them would grow with every
                         part, and so would the time for the next one
    hidden-{a,b}.safetensors   used in turn: the one that journal.json names last is never written to
    hidden-{a,b}-003.safetensors, journal-003.json   the same of rank 3, where several work; the first rank takes over
                         what the journals of others say
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
from quarkcli.disk.state import checksum, compare, damaged, is_sound, load, plain, sha256
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
from quarkcli.errors import UsageError

if TYPE_CHECKING:
    import torch

Resume = Literal["auto", "never", "require"]

SCHEMA = "quark/journal/3"
_HIDDEN = ("hidden-a", "hidden-b")


class Journal:
    """The journal of one output directory; made by `open`, usable as a context manager.

    A part's record is any JSON object. Its `files`, when present, is a list of objects with `file` (name relative
    to the partial directory) and `size` in bytes, as `WrittenFile.record()` gives.
    """

    def __init__(self, partial: Path, lock: int | None, made: list[Path], rank: int = 0) -> None:
        self._suffix = f"-{rank:03d}" if rank else ""  # of the files that each rank has of its own
        self._partial = partial
        self._state = partial / STATE
        self._lock = lock
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
                hint = "leave --resume require out"
                raise UsageError(
                    "there is no unfinished run to resume", where=str(partial), hint=hint, kind="E-RESUME-NONE"
                )
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
        compare(self._partial, load(path), plain(fingerprint))
        self._load_parts()
        self.absorb()
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

    def finish(
        self,
        part: str,
        record: dict[str, Any],
        hidden: dict[str, torch.Tensor] | None = None,
        stored: list[dict[str, Any]] | None = None,
    ) -> None:
        """Records a part whose files are durable already, with what the next part needs. Raises ResourceError.

        stored   hidden states of all ranks, which are written already; see `write_hidden`
        """
        if any(own["name"] == part for own in self._parts):
            raise ValueError(f"part {part!r} is finished already")
        states = self.write_hidden(hidden) if hidden is not None else None
        if stored:
            states = {**stored[0], "others": stored[1:]}
        self._store(
            [*self._parts, {"name": part, "record": self._write_record(part, record), "hidden": states}], self._notes
        )

    def hidden(self) -> dict[str, torch.Tensor] | None:
        """Returns the hidden states of the last finished part, None when it had none.

        Raises ConfigError when they are damaged.
        """
        return self.hidden_of(0) if self.ranks_with_hidden else None

    @property
    def ranks_with_hidden(self) -> int:
        """Returns how many ranks have hidden states of the last finished part."""
        named = self._parts[-1]["hidden"] if self._parts else None
        return 0 if named is None else 1 + len(named.get("others", ()))

    def hidden_of(self, number: int) -> dict[str, torch.Tensor]:
        """Returns the hidden states of one of the ranks that have some."""
        named = self._parts[-1]["hidden"]
        return self._read_hidden([named, *named.get("others", ())][number])

    def _read_hidden(self, named: dict[str, Any]) -> dict[str, torch.Tensor]:
        path = self._state / named["file"]
        try:
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != named["sha256"]:
                    raise damaged(path)
            return read_tensors(path, read_headers(path, path.name))
        except OSError as error:
            raise damaged(path) from error

    def write_hidden(self, hidden: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Writes hidden states beside those of the last part. Returns what `finish` takes as `stored`."""
        last = self._parts[-1]["hidden"] if self._parts else None
        taken = last is not None and last["file"].startswith(_HIDDEN[0])
        file = f"{_HIDDEN[taken]}{self._suffix}.safetensors"
        return {"file": file, "sha256": write_tensors(self._state / file, hidden).sha256}

    # -- several ranks -------------------------------------------------------------------------------------------

    @property
    def state(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any]]:
        """Returns all that the journal knows, for another rank's to `follow`."""
        return self._parts, self._records, self._notes

    def follow(self, state: tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any]]) -> None:
        """Takes over all that the first rank's journal knows."""
        self._parts, self._records, self._notes = list(state[0]), dict(state[1]), dict(state[2])

    @property
    def latest(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Returns the last finished part, its record, and the notes, for another rank's to `learn`."""
        part = self._parts[-1]
        return part, self._records[part["name"]], self._notes

    def learn(self, latest: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Takes over what the first rank's journal knows of one more part."""
        part, record, notes = latest
        self._parts, self._notes = [*self._parts, part], dict(notes)
        self._records[part["name"]] = record

    def absorb(self) -> None:
        """Takes over the parts that other ranks finished, and removes their journals."""
        paths = sorted(self._state.glob("journal-*.json"))
        parts = list(self._parts)
        for path in paths:
            theirs, _ = self._loaded(path)
            known = {part["name"] for part in parts}
            parts += [part for part in theirs if part["name"] not in known]
        if paths:
            self._store(parts, self._notes)
            for path in paths:
                path.unlink()

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
            for path in self._state.glob("hidden-*"):
                path.unlink()
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
        if path.is_file():  # else killed before the first part
            self._parts, self._notes = self._loaded(path)

    def _loaded(self, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Returns the parts and notes of a journal, and takes over the records of its parts."""
        stored = load(path)
        try:
            if stored["schema"] != SCHEMA or stored["sha256"] != checksum(stored["parts"], stored["notes"]):
                raise damaged(path)
            parts = [{key: part[key] for key in ("name", "record", "hidden")} for part in stored["parts"]]
            self._records |= {part["name"]: self._read_record(part["record"]) for part in parts}
            return parts, dict(stored["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path) from error

    def _store(self, parts: list[dict[str, Any]], notes: dict[str, Any]) -> None:
        """Stores the state, disk first: what memory says is never ahead of what a restart would find."""
        parts, notes = plain(parts), plain(notes)
        stored = {"schema": SCHEMA, "sha256": checksum(parts, notes), "parts": parts, "notes": notes}
        atomic_write_json(self._state / f"journal{self._suffix}.json", stored)
        self._parts, self._notes = parts, notes

    def _write_record(self, part: str, record: dict[str, Any]) -> dict[str, str]:
        text = json.dumps(record)
        file = f"record-{sha256(part.encode())[:16]}.json"
        atomic_write_text(self._state / file, text)
        self._records[part] = json.loads(text)  # as a restart finds it
        return {"file": file, "sha256": sha256(text.encode())}

    def _read_record(self, stored: dict[str, str]) -> dict[str, Any]:
        path = self._state / stored["file"]
        record = load(path)
        if sha256(path.read_bytes()) != stored["sha256"]:
            raise damaged(path)
        return record

    def _has_files(self, part: dict[str, Any]) -> bool:
        return all(
            is_sound(self._partial / file["file"], file) for file in self._records[part["name"]].get("files", [])
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
