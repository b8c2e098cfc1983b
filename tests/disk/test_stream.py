"""The order in which weight files come and go, on files that nobody downloads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quarkcli.disk.stream import Stream
from quarkcli.errors import HubError, QuarkError


class Place:
    """A folder into which files come. `most`: the largest number of them at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.came: list[str] = []
        self.most = 0
        self.before: Callable[[str], None] = lambda file: None

    def get(self, file: str) -> Path:
        self.before(file)
        path = self.folder / file
        path.write_bytes(b"")
        self.came.append(file)
        self.most = max(self.most, len(self.there()))
        return path

    def there(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


USES = {
    "embed": {"1": {"a"}},
    "block 0": {"1": {"b"}, "2": {"c"}},
    "block 1": {"2": {"d"}, "3": {"e"}, "4": {"f"}, "5": {"g"}},
    "tail": {"5": {"h"}, "6": {"i"}},
}


def read(stream: Stream, part: str) -> None:
    """Reads a part's tensors in the order of its files."""
    with stream.reading(part):
        for file, tensors in USES[part].items():
            with stream.using(file, tensors) as path:
                assert path.is_file()


def test_two_at_a_time_in_the_order_of_use(place):
    """Also where a part lies in more files than that."""
    with Stream(USES, place.get, drops=True) as stream:
        for part in USES:
            read(stream, part)
    assert place.came == list("123456") and place.most <= 2 and place.there() == []


def test_the_next_comes_while_this_one_is_read(place):
    """And no other before this one is gone."""
    with Stream(USES, place.get, drops=True) as stream:
        with stream.reading("embed"), stream.using("1", {"a"}):
            until(lambda: place.there() == ["1", "2"])
            time.sleep(0.05)
            assert place.there() == ["1", "2"]
        with stream.reading("block 0"):
            with stream.using("1", {"b"}):
                pass
            with stream.using("2", {"c"}):
                until(lambda: place.there() == ["2", "3"])


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_files_that_stay(place):
    with Stream(USES, place.get, drops=False) as stream:
        for part in USES:
            read(stream, part)
    assert place.came == list("123456") == place.there()


def test_files_are_held_until_the_work_is_done(place):
    with Stream(USES, place.get, drops=True, holds=True) as stream:
        for part, files in USES.items():
            read(stream, part)
            for file, tensors in files.items():
                with stream.using(file, tensors) as path:
                    assert path.is_file()
            stream.done(part)
    assert place.came == list("123456") and place.there() == []


def test_a_file_out_of_turn_stays_until_its_own_part(place):
    with Stream(USES, place.get, drops=True) as stream:
        with stream.using("6", {"i"}):
            pass
        for part in USES:
            read(stream, part)
    assert sorted(place.came) == list("123456") and place.most <= 3


def test_one_that_is_gone_comes_again(place):
    with Stream(USES, place.get, drops=True) as stream:
        for part in USES:
            read(stream, part)
        with stream.using("1", {"a"}) as path:
            assert path.is_file()
    assert place.came == [*"1234561"]


def test_a_reader_beside(place):
    """What another thread reads of a file does not count as the part's, and keeps the file as long as it lasts."""
    inside, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with stream.using("1", {"b"}) as path:
            inside.set()
            assert go_on.wait(10)
            assert path.is_file()

    with Stream(USES, place.get, drops=True) as stream:
        beside = threading.Thread(target=other)
        beside.start()
        assert inside.wait(10)
        read(stream, "embed")
        read(stream, "block 0")
        assert "1" in place.there()
        go_on.set()
        beside.join()
        read(stream, "block 1")
        assert "1" not in place.there()
    assert place.came.count("1") == 1


def test_a_download_that_fails(place):
    """It is an error where the file is needed, and not before; asked for again, it is tried again."""
    tries: list[str] = []

    def before(file: str) -> None:
        tries.append(file)
        if file == "2" and tries.count(file) == 1:
            raise HubError("refused")

    place.before = before
    with Stream(USES, place.get, drops=True) as stream:
        read(stream, "embed")
        with pytest.raises(QuarkError, match="refused"):
            read(stream, "block 0")
        read(stream, "block 0")


def test_who_waits_is_let_go(place):
    """A download that hangs keeps nobody from ending."""
    hangs = threading.Event()
    place.before = lambda file: print(hangs.wait(10))
    failed: list[Exception] = []

    def wait() -> None:
        try:
            read(stream, "embed")
        except QuarkError as error:
            failed.append(error)

    with Stream(USES, place.get, drops=True) as stream:
        waiting = threading.Thread(target=wait)
        waiting.start()
        stream.close()
        waiting.join(5)
        assert not waiting.is_alive() and "given up" in str(failed[0])
        hangs.set()
