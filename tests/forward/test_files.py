"""Files of calibration data as people have them: encodings, packings, broken lines, what is no text at all."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quarkcli.errors import AccessError, DataError, QuarkError
from quarkcli.forward import data, files
from quarkcli.job import preflight
from quarkcli.model.tokenizer import Tokenizer
from tests import runs
from tests.forward.test_data import TEMPLATE

WORDS = "the river runs past the mill and the miller counts his sacks "
ROWS = [{"text": WORDS}] * 6
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return Tokenizer(runs.tokenizer(TEMPLATE))


def load(path: Path, tokens: Tokenizer, **options: Any) -> data.CalibrationData:
    return data.load(str(path), tokens, **{"samples": 4, "seqlen": 32, "seed": 0, **options})


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "remark"),
    [
        ("a.jsonl", LINES, ""),
        ("a.jsonl", "\ufeff" + LINES, ""),
        ("a.jsonl", LINES.replace("\n", "\r\n"), ""),
        ("A.JSONL", LINES, ""),
        ("a.jsonl", "\n\n" + LINES.replace("\n", "\n\n"), ""),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16"),
        ("a.jsonl", LINES.encode("utf-16-le"), "UTF-16-LE"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), ""),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), ""),
        ("a.json", json.dumps(ROWS), ""),
        ("a.json", json.dumps(ROWS, indent=2), ""),
        ("a.json", json.dumps({"data": ROWS, "version": 1}), ""),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=2), ""),
        ("a.json", json.dumps([WORDS] * 6), ""),
    ],
)
def test_rows_however_they_are_written(
    name: str, content: str | bytes, remark: str, tokens: Tokenizer, tmp_path: Path
) -> None:
    expected = load(put(tmp_path / "plain.jsonl", LINES), tokens).digest
    found = load(put(tmp_path / name, content), tokens)
    assert found.digest == expected
    assert found.notes == ([f"{tmp_path / name} is read as {remark}"] if remark else [])
    assert not found.skipped


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_text_in_other_encodings(encoding: str, tokens: Tokenizer, tmp_path: Path) -> None:
    plain = load(put(tmp_path / "plain.txt", WORDS * 4), tokens)
    found = load(put(tmp_path / "a.txt", (WORDS * 4).encode(encoding)), tokens)
    assert found.digest == plain.digest
    assert bool(found.notes) == (not encoding.startswith("utf-8"))  # it is unusual, so it is said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", random.Random(0).randbytes(9000), "holds"),
        ("a.txt", gzip.compress(random.Random(0).randbytes(9000), mtime=0), "holds"),
        ("a.txt", b"\0" * 9000, "holds"),
        ("a.txt", (WORDS + "café").encode("latin-1"), "the byte 0xe9 is not UTF-8"),
        ("a.txt", (WORDS * 4).encode("utf-16") + b"x", "its first bytes look like UTF-16"),
        ("a.txt", b"\x28\xb5\x2f\xfd" + bytes(90), "is zstandard-compressed"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd" + bytes(90), "is zstandard-compressed"),
        ("a.jsonl", b"PAR1" + bytes(90), "is a parquet file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(90), "has the unknown file type '.zst'"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "has the unknown file type '.tar.gz'"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "gzip data is damaged"),
        ("a.jsonl", b"\0" * 9000, "no row can be used: 1 x not JSON (such as line 1)"),
        ("a.jsonl", "null\n" * 9, "no row can be used: 9 x the row is null"),
        ("a.json", "[]", "no row can be used: 1 x no message holds any text"),
        ("a.parquet", random.Random(0).randbytes(900), "cannot be read as parquet"),
    ],
)
def test_what_holds_no_text_says_what_it_is(
    name: str, content: str | bytes, message: str, tokens: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        load(put(tmp_path / name, content), tokens)
    assert message in str(error.value)
    assert error.value.where == str(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut off', "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
        ('{"text": "caf\xe9"}', "not UTF-8"),
        ('{"text": "\\ud800"}', "text is not text"),
        ('{"text": "a\\u0000"}', "text holds NUL characters"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_one_bad_line_is_skipped_and_counted(
    line: str, reason: str, last: bool, tokens: Tokenizer, tmp_path: Path
) -> None:
    content = LINES + line if last else line + "\n" + LINES
    found = load(put(tmp_path / "a.jsonl", content.encode("latin-1")), tokens)
    assert found.notes == [f"1 rows skipped: 1 x {reason} (such as line {7 if last else 1})"]
    assert found.skipped == {reason: 1}
    assert found.digest == load(put(tmp_path / "plain.jsonl", LINES), tokens).digest
    with pytest.raises(DataError, match=rf"asked for; 1 rows skipped: 1 x {reason}"):
        load(tmp_path / "a.jsonl", tokens, samples=99)


@pytest.mark.parametrize("key", ["data", "rows", "train", "examples"])
def test_a_row_with_a_list_beside_its_text_is_a_row(key: str, tokens: Tokenizer, tmp_path: Path) -> None:
    beside = {key: [{"text": "never"}, {"text": "never"}]}
    rows = [{"text": WORDS, **beside}] * 6
    expected = load(put(tmp_path / "plain.jsonl", LINES), tokens).digest
    for name, content in (("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), ("a.json", json.dumps(rows))):
        assert load(put(tmp_path / name, content), tokens).digest == expected
    own = put(tmp_path / "own.jsonl", "".join(json.dumps({"body": WORDS, **beside}) + "\n" for _ in rows))
    assert load(own, tokens, column="body").digest == expected
    talk = json.dumps({"messages": [{"role": "user", "content": "hello"}], **beside})
    found = load(put(tmp_path / "b.jsonl", talk), tokens, samples=1)
    assert tokens._inner.decode(found.tokens[0]) == "<user>hello\n"
    around = put(tmp_path / "c.json", json.dumps({key: [{key: WORDS}] * 6}))
    assert load(around, tokens, column=key).digest == expected  # the object holds no text of that name, its rows do


def test_parquet(tokens: Tokenizer, tmp_path: Path) -> None:
    def table(rows: list[Any]) -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    started = time.monotonic()
    assert load(table(ROWS), tokens).digest == load(put(tmp_path / "plain.jsonl", LINES), tokens).digest
    assert load(table([{"text": WORDS}, {"text": None}] * 5), tokens).skipped == {"text is null": 5}
    call = {"function": {"name": "f", "arguments": "{}"}}
    talk = [{"role": "user", "content": WORDS, "tool_calls": None}, {"role": "assistant", "tool_calls": [call]}]
    found = load(table([{"messages": talk}] * 4), tokens, seqlen=99)
    assert tokens._inner.decode(found.tokens[0][found.mask[0]]) == f"<user>{WORDS}\n<assistant>\n"
    with pytest.raises(DataError, match="5 x text is a list"):
        load(table([{"text": [WORDS]}] * 5), tokens)
    whole = bytearray(table(ROWS).read_bytes())
    whole[8:60] = os.urandom(52)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load(put(tmp_path / "b.parquet", bytes(whole)), tokens)
    assert time.monotonic() - started < 4  # no waiting inside a library


@pytest.mark.parametrize(
    "kind", [pyarrow.timestamp("ms"), pyarrow.timestamp("us", "UTC"), pyarrow.date32(), pyarrow.duration("s")]
)
def test_dates_that_python_does_not_know(kind: pyarrow.DataType, tokens: Tokenizer, tmp_path: Path) -> None:
    late = pyarrow.array([2**31 - 1] * 6, pyarrow.int32())
    late = late if pyarrow.types.is_date32(kind) else pyarrow.array([2**60] * 6)
    table = pyarrow.table({"made": late.cast(kind), "text": [WORDS] * 6})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    assert load(path, tokens).digest == load(put(tmp_path / "plain.jsonl", LINES), tokens).digest
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load(path, tokens, column="made")
    with pytest.raises(DataError, match="no column 'body'; columns are made, text"):
        load(path, tokens, column="body")


def test_dates_inside_lists_that_python_does_not_know(tokens: Tokenizer, tmp_path: Path) -> None:
    """The column is not read, or only its texts are; the file was refused whole."""
    made = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("at", pyarrow.timestamp("s"))])
    message = {"role": "user", "content": WORDS, "at": 300_000_000_000}
    dates = pyarrow.array([[300_000_000_000_000]] * 6, pyarrow.large_list(pyarrow.timestamp("ms")))
    kinds = {"dates": dates, "said": pyarrow.array([[message]] * 6, pyarrow.list_(made))}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [WORDS] * 6, **kinds}), path)
    assert load(path, tokens).digest == load(put(tmp_path / "plain.jsonl", LINES), tokens).digest


def test_a_folder_of_all_kinds(tokens: Tokenizer, tmp_path: Path) -> None:
    put(tmp_path / "README.md", "about this data " * 99)  # about the data, as hubs have it
    put(tmp_path / "a.jsonl", json.dumps({"text": WORDS}) + "\n")
    put(tmp_path / "b.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}\n')
    put(tmp_path / "c.txt", random.Random(0).randbytes(900))
    put(tmp_path / "d.csv", "text\nnever")
    (tmp_path / ".cache").mkdir()
    put(tmp_path / ".cache" / "e.txt", "hidden " * 99)
    found = load(tmp_path, tokens, samples=2)
    assert found.mask is not None
    texts = [tokens._inner.decode(row[mask]) for row, mask in zip(found.tokens, found.mask, strict=True)]
    assert texts == [WORDS[:32], "<user>hello\n"]
    assert len(found.skipped) == 1 and "c.txt" in found.notes[0]
    with pytest.raises(DataError, match="the whole file system"):
        files.find(Path("/"))
    (tmp_path / "alone").mkdir()
    put(tmp_path / "alone" / "README.md", WORDS)
    assert load(tmp_path / "alone", tokens, samples=1).tokens.shape == (1, 32)


def test_the_files_of_a_folder_take_turns(tokens: Tokenizer, tmp_path: Path) -> None:
    """Rows come from all files alike, wherever reading stops; a seed chooses among those of each file."""
    names = ("code", "math", "prose")
    for name in names:
        talks = [{"messages": [{"role": "user", "content": f"{name} {number}"}]} for number in range(50)]
        put(tmp_path / f"{name}.jsonl", "".join(json.dumps(talk) + "\n" for talk in talks))

    def read(seed: int) -> list[str]:
        found = load(tmp_path, tokens, samples=30, seed=seed)
        assert found.mask is not None
        return [tokens._inner.decode(row[mask]) for row, mask in zip(found.tokens, found.mask, strict=True)]

    texts = read(0)
    assert texts == read(0) != read(1)
    for shown in (texts, read(1)):
        assert [sum(f">{name} " in text for text in shown) for name in names] == [10, 10, 10]
    (tmp_path / "code.jsonl").write_text('{"messages": [{"role": "user", "content": "code 0"}]}\n')
    assert [sum(f">{name} " in text for text in read(0)) for name in names] == [1, 15, 14]


def test_texts_of_a_folder_share_what_is_read(
    tokens: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_budget", lambda source, tokens: 640)
    for name in "abc":
        put(tmp_path / f"{name}.txt", name * 2000)
    found = load(tmp_path, tokens, samples=18)
    letters = tokens._inner.decode(found.tokens.flatten())
    assert all(letters.count(name) > 150 for name in "abc")
    put(tmp_path / "a.txt", "a" * 40)
    put(tmp_path / "b.txt", "b" * 40)  # what these leave is read of the third
    letters = tokens._inner.decode(load(tmp_path, tokens, samples=18).tokens.flatten())
    assert letters.count("a") + letters.count("b") <= 80 and letters.count("c") >= 400


def test_of_many_files_some_are_read_at_a_time(
    tokens: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones are spread over the names; when one ends, another takes its place."""
    monkeypatch.setattr(data, "TOGETHER", 2)
    for number in range(5):
        rows = [{"messages": [{"role": "user", "content": f"{number}{row}"}]} for row in range(2)]
        put(tmp_path / f"{number}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def files_of(samples: int) -> list[str]:
        found = load(tmp_path, tokens, samples=samples)
        return [tokens._inner.decode(row)[len("<user>")] for row in found.tokens]

    assert files_of(4) == ["0", "3", "0", "3"]
    assert sorted(files_of(10)) == sorted("01234" * 2)
    opened: list[int] = []

    def source(name: int) -> Iterator[files.Row]:
        opened.append(name)
        yield from (files.Row(name, "") for _ in range(2))

    turns = files.in_turn((source(number) for number in range(4)), 2)
    assert [next(turns).value for _ in range(4)] == [0, 1, 0, 1] and opened == [0, 1]
    assert [row.value for row in turns] == [2, 3, 2, 3]


def test_pipes_are_refused_instead_of_waited_for(tokens: Tokenizer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        load(tmp_path / "a.jsonl", tokens)


@pytest.mark.parametrize("name", ["a.jsonl", "a.md", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_missing_file_is_no_hub_data_set(name: str, tokens: Tokenizer) -> None:
    with pytest.raises(AccessError, match="no such calibration file"):
        load(Path(name), tokens)


def test_a_place_in_the_home_folder(tokens: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell opens ~ of a flag; in a recipe and behind --set nothing does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = load(put(tmp_path / "a.jsonl", LINES), tokens).digest
    assert load(Path("~/a.jsonl"), tokens).digest == expected
    preflight._check_data("~/a.jsonl")
    with pytest.raises(AccessError, match="no such calibration file"):
        load(Path("~/absent"), tokens)


def test_large_rows_do_not_take_long(tokens: Tokenizer, tmp_path: Path) -> None:
    """Of a conversation of megabytes one row is kept."""
    long = {"messages": [{"role": "user", "content": WORDS * 40_000}]}
    path = put(tmp_path / "a.jsonl", (json.dumps(long) + "\n") * 4)
    started = time.monotonic()
    found = load(path, tokens)
    assert time.monotonic() - started < 5
    assert tokens._inner.decode(found.tokens[0]) == f"<user>{WORDS}"[:32]


def test_giving_up_on_rows_without_end(tokens: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PATIENCE", 5)
    path = put(tmp_path / "a.jsonl", '{"words": "x"}\n' * 9)
    with pytest.raises(DataError, match="no row can be used: 5 x none of the columns words is known"):
        load(path, tokens)


def test_shuffling_keeps_every_row_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BUFFER", 10)
    rows = [files.Row(number, "") for number in range(35)]
    one, again, other = ([row.value for row in files.shuffled(rows, seed)] for seed in (0, 0, 1))
    assert one == again != other
    assert sorted(one) == sorted(other) == list(range(35))
    assert max(one[:5]) < 10  # no more than the buffer is held
    monkeypatch.setattr(files, "_BUFFER_BYTES", 3)
    shared = [row.value for row in files.shuffled(rows, 0, together=5)]
    assert sorted(shared) == list(range(35)) and shared[0] < 2  # files that are read together share the buffer
    large = [row.value for row in files.shuffled([files.Row(number, "", 1) for number in range(9)], 0)]
    assert sorted(large) == list(range(9)) and large[0] < 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tokens: Tokenizer, tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", WORDS)
    path.chmod(0)
    with pytest.raises(AccessError, match="cannot be read"):
        load(path, tokens)


@pytest.mark.parametrize("seed", range(40))
def test_mutated_files_end_in_rows_or_in_a_plain_error(seed: int, tokens: Tokenizer, tmp_path: Path) -> None:
    chosen = random.Random(seed)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    name, content = chosen.choice(
        [
            ("a.jsonl", LINES.encode()),
            ("a.json", json.dumps(ROWS, indent=1).encode()),
            ("a.txt", (WORDS * 4).encode("utf-16")),
            ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
            ("a.parquet", (tmp_path / "p.parquet").read_bytes()),
        ]
    )
    mutated = bytearray(content)
    for _ in range(chosen.choice([1, 3, 20])):
        mutated[chosen.randrange(len(mutated))] = chosen.randrange(256)
    try:
        found = load(put(tmp_path / name, bytes(mutated)), tokens)
    except QuarkError as error:
        assert error.code in (5, 7)
    else:
        assert found.tokens.shape == (4, 32)
