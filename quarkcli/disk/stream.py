"""Downloads weight files of a model one after the other: the next comes while quark works on this one.

Each is dropped after its last use, so that two are on the disk at a time, beside those that were asked for out of turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from quarkcli.errors import HubError
from quarkcli.events import Listener, Working, silent

Uses = Mapping[str, Mapping[str, set[str]]]  # part, in order -> file -> tensors
AT_ONCE = 2


class Stream:
    """The files that parts to do need, in the order of their first use.

    get    downloads a file and returns its place
    drops  files are removed after their last use
    holds  a part's files are needed until the work on it is done, not only until they are read
    tell   hears what is waited for
    """

    def __init__(
        self, uses: Uses, get: Callable[[str], Path], *, drops: bool, holds: bool = False, tell: Listener = silent
    ) -> None:
        self.get = get
        self.drops = drops
        self.holds = holds
        self.tell = tell
        self.stop = threading.Event()
        self._uses = uses
        self._left: dict[str, set[tuple[str, str]]] = {}  # file -> (part, tensor), files in order of first use
        for part, files in uses.items():
            for file, tensors in files.items():
                self._left.setdefault(file, set()).update((part, tensor) for tensor in tensors)
        self._there: dict[str, Path] = {}
        self._failed: dict[str, Exception] = {}
        self._asked: list[str] = []  # out of turn, because somebody waits
        self._open: dict[str, int] = {}
        self._reading: tuple[int, str] | None = None  # thread, part
        self._changed = threading.Condition()
        # A daemon, for a download that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="download", daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._thread.join(1.0)

    def close(self) -> None:
        """Ends the download that is going on, and the waiting for it."""
        self.stop.set()
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Marks what this thread reads inside as this part's; what it has read in full, is not waited for again."""
        with self._changed:
            self._reading = threading.get_ident(), part
        try:
            yield
        finally:
            with self._changed:
                self._reading = None
        if not self.holds:
            self.done(part)

    def done(self, part: str) -> None:
        """Notes that this part needs its files no more, and drops those that no other part needs."""
        with self._changed:
            for file in self._uses.get(part, {}):
                self._left[file] = {use for use in self._left[file] if use[0] != part}
            self._drop()
            self._changed.notify_all()

    @contextmanager
    def using(self, file: str, tensors: set[str]) -> Iterator[Path]:
        """Yields the place of a file, waited for, from which these tensors are read."""
        if file not in self._there:
            self.tell(Working(f"waiting for the download of {file}"))
        with self._changed:
            self._open[file] = self._open.get(file, 0) + 1
            self._drop()
            if file not in self._there:
                self._asked.append(file)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.stop.is_set() or file in self._there or file in self._failed)
            path, error = self._there.get(file), self._failed.pop(file, None)
        try:
            if path is None:
                raise error or HubError("the download was given up", where=file, kind="E-HUB-DOWNLOAD")
            yield path
        finally:
            with self._changed:
                self._open[file] -= 1
                if self._reading is not None and self._reading[0] == threading.get_ident() and not self.holds:
                    part = self._reading[1]
                    self._left.get(file, set()).difference_update((part, tensor) for tensor in tensors)

    def _drop(self) -> None:
        """Removes the files that nobody needs or reads; a file that was asked for out of turn stays until then."""
        spent = [file for file in self._there if not self._left.get(file) and not self._open.get(file)]
        for file in spent:
            path = self._there.pop(file)
            if self.drops:
                path.unlink(missing_ok=True)

    def _next(self) -> str | None:
        """Returns the file to download now: one that somebody waits for, else one of the next that are needed."""
        self._asked = [file for file in self._asked if file not in self._there and file not in self._failed]
        spent = sum(not self._left.get(file) for file in self._there) if self.drops else 0
        ahead = [file for file, uses in self._left.items() if uses][: max(AT_ONCE - spent, 0)]
        missing = [file for file in ahead if file not in self._there and file not in self._failed]
        return next(iter([*self._asked, *missing]), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.stop.is_set() or self._next() is not None)
                if self.stop.is_set():
                    return
                file = self._next()
                assert file is not None
            try:
                found: Path | Exception = self.get(file)
            except Exception as error:
                found = error
            with self._changed:
                if isinstance(found, Path):
                    self._there[file] = found
                else:
                    self._failed[file] = found
                self._changed.notify_all()
