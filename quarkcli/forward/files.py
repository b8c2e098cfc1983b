"""Reads the rows of calibration files as they are written. Torch-free.

A file that is not what its name says is an error that says what it is. A row that cannot be read becomes `Broken`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from quarkcli.errors import AccessError, DataError, first_line

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch

EXAMPLE = (
    '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "...", "response": "..."}'
)
# Suffix -> how a file is read; `.gz` may follow.
KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_GZIP = b"\x1f\x8b"
# First bytes -> what a file is that holds no text.
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": "zstandard-compressed",
    b"BZh91AY&SY": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"%PDF-": "a PDF",
}
_PACKED = {".zst", ".bz2", ".xz", ".zip", ".7z", ".tar"}
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|changelog|dataset_infos?|dataset_dict|state)\.", re.IGNORECASE)
CHATS = ("messages", "conversations", "conversation")  # columns with a conversation
COLUMNS = {*CHATS, "text", "prompt"}  # an object with one of them is a row
_ROWS_IN = ("data", "rows", "train", "examples")  # keys of a whole file under which its rows lie
_WHOLE = 1 << 30  # bytes of a file that is read at once to see whether it is one JSON value
_BUFFER, _BUFFER_BYTES = 10_000, 1 << 28  # rows that are shuffled together, and their size
_BATCH = 1000  # rows of a parquet file that are read together


@dataclass(frozen=True)
class Broken:
    """Stands for a row that cannot be read."""

    reason: str


@dataclass(frozen=True)
class Row:
    """A row's value (or `Broken`), its place, and about how many bytes it takes."""

    value: Any
    place: str
    size: int = 0


def local(source: str) -> Path | None:
    """Returns the file or folder that a source names; None for the name of a hub data set. Raises AccessError."""
    if not source:
        hint = "use --calib-data FILE, for example"
        raise AccessError("the name of the calibration data is empty", hint=hint, kind="E-DATA-NOT-FOUND")
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - does not raise where there is no home
    if path.exists():
        return path
    if kind(path) is not None or path.suffix in _PACKED or source.startswith((".", "/", "~")):
        raise AccessError("there is no such calibration file", where=source, kind="E-DATA-NOT-FOUND")
    return None


def find(path: Path) -> list[Path]:
    """Returns the files of a folder that hold data, or the file itself. Raises DataError when there is none."""
    if not path.is_dir():
        if kind(path) is None:
            ends = path.suffixes[-2:] if path.suffix == ".gz" else [path.suffix]
            hint = f"use {', '.join(KINDS)}" if _PACKED.isdisjoint(ends) else "unpack it first"
            what = f"has the unknown file type '{''.join(ends)}'"
            raise DataError(what, where=str(path), hint=hint, kind="E-DATA-FILE")
        if not path.is_file():
            raise DataError(
                "is not a regular file", where=str(path), hint="write the rows to a file first", kind="E-DATA-FILE"
            )
        if path.stat().st_size == 0:
            raise DataError(
                "the calibration file is empty",
                where=str(path),
                hint=f"write each line like this: {EXAMPLE}",
                kind="E-DATA-FILE",
            )
        return [path]
    if path.resolve() == Path(path.resolve().anchor):
        hint = "give the directory that holds the rows"
        raise DataError("is the whole file system", where=str(path), hint=hint, kind="E-DATA-FILE")
    files = sorted(_inside(path))
    if not files:
        raise DataError(f"holds no {', '.join(KINDS)} file", where=str(path), kind="E-DATA-FILE")
    return [file for file in files if not _ABOUT.match(file.name)] or files


def _inside(path: Path) -> Iterator[Path]:
    """Yields the files of a folder that have a type of ours, but for hidden ones. What cannot be opened is not seen."""
    for root, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name[0] != "."]
        found = (Path(root, name) for name in names if name[0] != ".")
        yield from (file for file in found if kind(file) is not None and os.path.isfile(file))  # noqa: PTH113 - no error


def kind(path: Path) -> str | None:
    """Returns text, json or parquet; None for a name that says none of them."""
    return KINDS.get((Path(path.stem) if path.suffix == ".gz" else path).suffix.lower())


def text(path: Path) -> str:
    """Returns all of a text file. Raises DataError when it holds no text."""
    return next(texts(path, -1, 1))


def texts(path: Path, limit: int, count: int) -> Iterator[str]:
    """Yields the first `count` pieces of a text file, of `limit` characters each, or all pieces if there are fewer.

    Raises DataError when it holds no text.
    """
    with _opened(path) as handle:
        for number in range(count):
            found = handle.read(limit)
            if number and not found.strip():
                return
            reason = unfit(found)
            if reason is not None:
                advice = "give a text file; iconv -f ENCODING -t UTF-8 converts one in another encoding"
                hint = advice if found.strip() else ""
                raise DataError(f"the file {reason}", where=str(path), hint=hint, kind="E-DATA-FILE")
            yield found


def unfit(text: str) -> str | None:
    """Returns the reason a text cannot be turned into tokens, as the end of a sentence; None when it can."""
    if not text.strip():
        return "holds no text"
    if "\0" in text:
        return f"holds NUL characters, the first at character {text.index(chr(0)) + 1}"
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return None
    code = ord(found[0])
    what = f"the byte 0x{code - 0xDC00:02x} is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
    return f"is not text at character {found.start() + 1}: {what}"


def rows(path: Path, seed: int, column: str | None = None, together: int = 1) -> Iterator[Row]:
    """Yields the rows of a JSON or parquet file, shuffled within a buffer. Raises DataError when it is no such file.

    column     the column that was asked for
    together   files that are read at the same time; all of them hold as many rows in memory as one alone
    """
    found = _parquet(path, column, together) if kind(path) == "parquet" else _json(path, column)
    yield from shuffled(found, seed, together)


def in_turn(sources: Iterable[Iterator[Row]], together: int) -> Iterator[Row]:
    """Yields a row of each source, then the next row of each. When one of `together` ends, another takes its place."""
    waiting = iter(sources)
    reading = deque(islice(waiting, together))
    while reading:
        source = reading.popleft()
        row = next(source, None)
        if row is None:
            reading.extendleft(islice(waiting, 1))
        else:
            yield row
            reading.append(source)


def shuffled(rows: Iterable[Row], seed: int, together: int = 1) -> Iterator[Row]:
    """Yields rows in a seeded order. Whenever the buffer is full it is shuffled and half of it is given out."""
    import numpy

    random = numpy.random.default_rng(seed)
    buffer: list[Row] = []
    size = 0
    for row in rows:
        buffer.append(row)
        size += row.size
        if len(buffer) >= _BUFFER // together or size >= _BUFFER_BYTES // together:
            order = random.permutation(len(buffer))
            cut = len(buffer) - len(buffer) // 2
            yield from (buffer[index] for index in order[:cut])
            buffer = [buffer[index] for index in order[cut:]]
            size = sum(row.size for row in buffer)
    yield from (buffer[index] for index in random.permutation(len(buffer)))


# ---- text and JSON


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Opens a text file, whatever packs and encodes it. Raises DataError for a file that cannot be read as text."""
    try:
        packed = _start(path).startswith(_GZIP)
        with gzip.open(path, "rb") if packed else path.open("rb") as opened:
            raw: Any = opened
            encoding = json.detect_encoding(raw.read(4))  # by its mark, or by where the zeros are
            raw.seek(0)
            # Bytes that are not UTF-8 become single surrogates, so that they spoil one row and not the file.
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            yield io.TextIOWrapper(raw, encoding=encoding, errors=errors)
    except UnicodeError as error:
        guess = error.encoding.upper() if isinstance(error, UnicodeDecodeError) else "another encoding"
        what = f"is not text: its first bytes look like {guess}, but the rest does not"
        raise DataError(what, where=str(path), hint="give a text file in UTF-8", kind="E-DATA-FILE") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"its gzip data is damaged: {error}", where=str(path), hint="download it again", kind="E-DATA-FILE"
        ) from error
    except OSError as error:
        raise AccessError(f"cannot be read: {error.strerror or error}", where=str(path), kind="E-FILE-READ") from error


def encoding(path: Path) -> str:
    """Returns the encoding of a text file or a JSON file, by its first bytes. Raises DataError, AccessError."""
    with _opened(path) as handle:
        return handle.encoding


def _start(path: Path) -> bytes:
    with path.open("rb") as handle:
        start = handle.read(16)
    for mark, what in _FOREIGN.items():
        if start.startswith(mark):
            raise DataError(
                f"is {what}",
                where=str(path),
                hint="unpack or convert it first, or give it the right file extension",
                kind="E-DATA-FILE",
            )
    return start


def _json(path: Path, column: str | None) -> Iterator[Row]:
    whole = _whole(path)
    if whole is not None:
        yield from _expanded(whole, column, "row 1", path.stat().st_size)
        return
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _expanded(_parsed(line), column, f"line {number}", len(line))


def _whole(path: Path) -> Any:
    """Returns the value of a file that is one JSON value over several lines; None for any other."""
    with _opened(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        if not isinstance(_parsed(first), Broken) or first.lstrip()[:1] not in "[{" or path.stat().st_size > _WHOLE:
            return None
        value = _parsed(first + lines.read())
    return None if isinstance(value, Broken) else value


def _parsed(text: str) -> Any:
    if re.search("[\ud800-\udfff]", text):
        return Broken("not UTF-8")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Broken("not JSON")


def _expanded(value: Any, column: str | None, place: str, size: int) -> Iterator[Row]:
    """Yields the rows of one JSON value: those of a list or of `{"data": [...]}` that is no row, or itself."""
    if isinstance(value, dict) and not value.keys() & COLUMNS and (column not in value or _is_rows(value[column])):
        lists = [value[key] for key in _ROWS_IN if _is_rows(value.get(key))]
        value = lists[0] if lists else value
    if not _is_rows(value):
        yield Row(value, place, size)
        return
    for number, item in enumerate(value, 1):
        yield Row(item, f"row {number}", size // len(value))


def _is_rows(value: Any) -> bool:
    """True for a list, but not for the messages of one conversation."""
    if not isinstance(value, list) or not value:
        return False
    return not (isinstance(value[0], dict) and {"role", "from"} & value[0].keys())


# ---- parquet


def _parquet(path: Path, column: str | None, together: int) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            count = 0
            for batch in file.iter_batches(max(1, _BATCH // together)):
                size = batch.nbytes // max(1, batch.num_rows)
                for row in _read(_dateless(batch, column)):
                    count += 1
                    yield Row(row, f"row {count}", size)
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # arrow's own have none
            raise AccessError(f"cannot be read: {error.strerror}", where=str(path), kind="E-FILE-READ") from error
        raise DataError(
            f"cannot be read as parquet: {first_line(error)}", where=str(path), kind="E-DATA-FILE"
        ) from error


def _read(batch: RecordBatch) -> list[dict[str, Any]]:
    """Returns rows as Python values; dates inside lists and structs are text where Python does not know them all."""
    from pyarrow import types

    try:
        return cast("list[dict[str, Any]]", batch.to_pylist())
    except (ValueError, OverflowError):
        for index, field in enumerate(batch.schema):
            if not types.is_nested(field.type):
                continue
            batch = batch.set_column(index, field.name, batch.column(index).cast(_dates_as_text(field.type)))
        return cast("list[dict[str, Any]]", batch.to_pylist())


def _dates_as_text(kind: DataType) -> DataType:
    """Returns a type with text for the dates inside its lists and structs; any other as it is."""
    import pyarrow

    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind):
        inner = _dates_as_text(kind.value_type)
        return pyarrow.list_(inner) if types.is_list(kind) else pyarrow.large_list(inner)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_dates_as_text(field.type)) for field in kind])
    return pyarrow.string() if types.is_date(kind) or types.is_timestamp(kind) else kind


def _dateless(batch: RecordBatch, column: str | None) -> RecordBatch:
    """Returns rows without the dates and times of columns that nobody asked for: Python knows no year after 9999."""
    from pyarrow import nulls, types

    for index, field in enumerate(batch.schema):
        if types.is_temporal(field.type) and field.name != column:
            batch = batch.set_column(index, field.name, nulls(batch.num_rows))
    return batch
