"""Files, folders and the built-in text become rows of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import AccessError, DataError
from quarkcli.forward import data
from quarkcli.model.tokenizer import Tokenizer, load_tokenizer
from tests import runs

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
EOS = runs.tokenizer().eos_token_id
DEFAULTS: dict[str, Any] = {"samples": 4, "seqlen": 16, "seed": 0}


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    """One token per byte."""
    return Tokenizer(runs.tokenizer(TEMPLATE))


def load(source: Path | str, tokens: Tokenizer, **options: Any) -> data.CalibrationData:
    return data.load(str(source), tokens, **(DEFAULTS | options))


def text_of(tokens: Tokenizer, row: torch.Tensor) -> str:
    return tokens._inner.decode(row)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_text_is_packed_without_padding(suffix: str, tokens: Tokenizer, tmp_path: Path) -> None:
    text = runs.topics(0, 2)[:70]
    path = tmp_path / f"a{suffix}"
    path.write_text(text)
    found = load(path, tokens)
    assert found.tokens.dtype == torch.int64
    assert found.mask is None
    assert [text_of(tokens, row) for row in found.tokens] == [text[start : start + 16] for start in range(0, 64, 16)]
    assert (found.source, found.notes, found.token_count) == (str(path), [], 64)


def test_documents_are_joined_by_an_end_mark(tokens: Tokenizer, tmp_path: Path) -> None:
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("deep/c.txt", "third"), ("ignored.csv", "never")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = load(tmp_path, tokens, samples=1, seqlen=18)
    expected = [*tokens.encode("first"), EOS, *tokens.encode("second"), EOS, *tokens.encode("third")]
    assert found.tokens.tolist() == [expected]  # nothing follows the last document


def test_a_seeded_sample_of_the_windows(tokens: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(runs.topics(0, 4)[:1600])
    windows = [path.read_text()[start : start + 16] for start in range(0, 1600, 16)]
    one, again, other = (load(path, tokens, seed=seed) for seed in (1, 1, 2))
    assert one.digest == again.digest and torch.equal(one.tokens, again.tokens)
    assert one.digest != other.digest and not torch.equal(one.tokens, other.tokens)
    places = [windows.index(text_of(tokens, row)) for row in one.tokens]
    assert places == sorted(places) and len(set(places)) == 4


def test_rows_of_text(tokens: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"document number {index:03}", "other": index} for index in range(30)]
    found, again, other = (
        load(lines(tmp_path / "a.jsonl", rows), tokens, samples=29, seqlen=20, seed=seed) for seed in (0, 0, 1)
    )
    stream = found.tokens.reshape(-1).tolist()
    texts = [tokens._inner.decode(part) for part in split(stream)]
    assert set(texts[:-1]) < {row["text"] for row in rows}
    assert found.digest == again.digest != other.digest  # rows are shuffled by the seed
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert load(parquet, tokens, samples=29, seqlen=20).digest == found.digest


def split(stream: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        if token == EOS:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@pytest.mark.parametrize("answer", ["response", "completion"])
def test_conversations_are_rendered_once_cut_and_padded(answer: str, tokens: Tokenizer, tmp_path: Path) -> None:
    talks = [[("user", "hello"), ("assistant", "yes")], [("user", "a question of some length"), ("assistant", "no")]]
    messages = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    found = load(lines(tmp_path / "a.jsonl", messages), tokens, samples=2, seqlen=24)
    texts = sorted("".join(f"<{role}>{text}\n" for role, text in talk) for talk in talks)
    assert found.mask is not None and found.mask.dtype == torch.bool
    assert found.tokens.shape == found.mask.shape == (2, 24)
    kept = [text_of(tokens, row[mask]) for row, mask in zip(found.tokens, found.mask, strict=True)]
    assert sorted(kept) == [texts[0][:24], texts[1][:24]]
    assert found.mask.int().diff(dim=1).max() <= 0  # padding only on the right
    assert set(found.tokens[~found.mask].tolist()) <= {EOS}
    assert found.token_count == int(found.mask.sum()) == sum(min(24, len(text)) for text in texts)
    pairs = [{"prompt": talk[0][1], answer: talk[1][1]} for talk in talks]
    assert load(lines(tmp_path / "b.jsonl", pairs), tokens, samples=2, seqlen=24).digest == found.digest


@pytest.fixture(scope="module")
def begun() -> Tokenizer:
    """The same, with <s> before every text."""
    inner = runs.tokenizer("{{ bos_token }}" + TEMPLATE, bos=True)
    return Tokenizer(inner)


def test_every_row_begins_as_the_tokenizer_begins_a_text(begun: Tokenizer, tmp_path: Path) -> None:
    bos = begun.bos
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(ord("a") + index % 26) for index in range(60)))
    found, off = load(path, begun), load(path, begun, bos="off", samples=3)
    assert found.tokens.tolist() == [[bos, *begun.encode(path.read_text()[i : i + 15])] for i in range(0, 60, 15)]
    assert found.prefix == [bos] and off.prefix == []
    assert found.mask is None and found.token_count == 64  # the model reads BOS, so it counts
    assert [text_of(begun, row) for row in off.tokens] == [path.read_text()[i : i + 16] for i in range(0, 48, 16)]
    assert found.digest != load(path, begun, bos="off", samples=3).digest
    with pytest.raises(DataError, match="are too short"):
        load(path, begun, seqlen=1)


def test_a_conversation_has_one_bos(begun: Tokenizer, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    path = lines(tmp_path / "a.jsonl", rows)
    auto, on, off = (load(path, begun, samples=1, bos=bos).tokens[0].tolist() for bos in ("auto", "on", "off"))
    assert auto == on == [begun.bos, *off]
    assert begun.bos not in off


def test_conversations_need_a_template(tmp_path: Path) -> None:
    plain = Tokenizer(runs.tokenizer())
    path = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(DataError, match="no chat template"):
        load(path, plain)


def test_a_named_column(tokens: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"body": "b" * 80, "text": "t" * 80, "number": 5}])
    assert text_of(tokens, load(path, tokens, column="body").tokens[0]) == "b" * 16
    with pytest.raises(DataError, match="no column 'bodi'; columns are body, text, number"):
        load(path, tokens, column="bodi")
    talk = [{"role": "user", "content": "hello"}]
    found = load(lines(tmp_path / "b.jsonl", [{"talk": talk}]), tokens, column="talk", samples=1)
    assert text_of(tokens, found.tokens[0][found.mask[0]]) == "<user>hello\n"
    with pytest.raises(DataError, match="column 'number' holds neither text nor messages"):
        load(path, tokens, column="number")


def test_the_built_in_text(tokens: Tokenizer) -> None:
    from quarkcli.forward.defaults import builtin_texts

    found = load("builtin", tokens, seqlen=100, samples=3)
    stream = [token for text in builtin_texts(held_out=False) for token in [*tokens.encode(text), EOS]]
    windows = {tuple(stream[start : start + 100]) for start in range(0, len(stream), 100)}
    assert {tuple(row) for row in found.tokens.tolist()} < windows
    assert load("builtin", tokens, seqlen=100, samples=3).digest == found.digest
    assert len(stream) > 300_000


def test_too_few_rows(tokens: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 40)
    with pytest.raises(DataError, match="2 rows of 16 tokens, 4 asked for") as error:
        load(path, tokens)
    assert "--allow-short" in error.value.hint and error.value.where == str(path)
    for options in ({"allow_short": True}, {"asked": False}):
        found = load(path, tokens, **options)
        assert found.tokens.shape == (2, 16)
        assert found.notes == ["calibration uses 2 rows of 16 tokens, 4 wanted"]
    with pytest.raises(DataError, match="tokens, fewer than one window of"):
        load(path, tokens, seqlen=64, allow_short=True)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", " \n ", "holds no text"),
        ("a.jsonl", '{"text": ""}\n{"text": ""}\n', "2 x text holds no text"),
        ("a.jsonl", '{"words": "abc"}\n', "none of the columns words is known"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "a.jsonl"),
        ("a.jsonl", "not json at all\n", "1 x not JSON (such as line 1)"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.csv", "text\nabc\n", "has the unknown file type '.csv'"),
    ],
)
def test_files_without_usable_text(name: str, content: str, text: str, tokens: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        load(tmp_path / name, tokens)
    assert text in str(error.value)
    assert error.value.where == str(tmp_path / name)


def test_places_without_files(tokens: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="no such calibration file"):
        load(tmp_path / "absent.jsonl", tokens)
    with pytest.raises(AccessError, match="no such calibration file"):
        load("./absent", tokens)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.txt, \.md"):
        load(tmp_path / "empty", tokens)


def test_the_tokenizer_beside_a_model_is_the_same(tokens: Tokenizer, tmp_path: Path) -> None:
    runs.tokenizer(TEMPLATE).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("some text that is long enough" * 4)
    assert (
        load(tmp_path / "a.txt", load_tokenizer(tmp_path / "model")).digest == load(tmp_path / "a.txt", tokens).digest
    )


def test_the_built_in_text_is_the_same_everywhere_and_enough() -> None:
    """Its bytes, that no page is in both parts, and 512 rows of 512 tokens with the embedded model's tokenizer."""
    import gzip
    import hashlib

    from quarkcli.forward import defaults

    text = gzip.decompress(defaults.FILE.read_bytes())
    assert hashlib.sha256(text).hexdigest() == "7eb66df6acf21bdc1e3259199674545becb34758902f5ea74db564b45756347d"
    assert len(text) > 1_500_000
    assert "PSF is making Python available to Licensee" in defaults.FILE.with_name("LICENSE.txt").read_text()
    used, held = (set(defaults.builtin_texts(held_out=out)) for out in (False, True))
    assert not used & held
    assert len(used) > 3 * len(held) > 300
    found = data.load("builtin", load_tokenizer(EMBEDDED), samples=512, seqlen=512, seed=0, held=4096)
    assert found.tokens.shape == (512, 512)
    assert found.held is not None and found.held.numel() >= 4096
    assert found.notes == []
