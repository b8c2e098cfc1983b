"""Tokenizers, compared with the tokenizers library on the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from quarkcli.errors import DataError, ModelError, UsageError
from quarkcli.model.tokenizer import load_tokenizer

TEXT = "A tokenizer turns text into numbers. Numbers are what a model reads; text is what people read."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
)
TALK = [{"role": "user", "content": "what is text"}, {"role": "assistant", "content": "numbers"}]


def write(folder: Path, template: str | None = None, single: str = "<s> $A", bos: bool = True) -> Library:
    """A byte-level BPE that, asked for special tokens, puts <s> in front, as Llama's does, or makes `single`."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT] * 4, trainer)
    library.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config |= {"bos_token": "<s>"} if bos else {}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return library


def test_encode_adds_no_special_tokens(tmp_path: Path) -> None:
    library = write(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == library.encode(TEXT, add_special_tokens=False).ids
    assert library.encode(TEXT).ids[0] == 0  # it would, if asked
    assert tokenizer.encode("") == []
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (0, 1, library.get_vocab_size())


@pytest.mark.parametrize(
    ("single", "bos", "auto", "on"),
    [
        ("<s> $A", True, [0], [0]),
        ("<s> $A </s>", True, [0], [0]),
        ("$A </s>", True, [], [0]),
        ("$A", True, [], [0]),
        ("</s> <s> $A", True, [1, 0], [1, 0]),
        ("<s> $A", False, [0], [0]),  # the tokenizer does it, whatever its config calls it
        ("$A </s>", False, [], None),
    ],
)
def test_what_a_row_begins_with(single: str, bos: bool, auto: list[int], on: list[int] | None, tmp_path: Path) -> None:
    write(tmp_path, single=single, bos=bos)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.prefix("auto"), tokenizer.prefix("off")) == (auto, [])
    if on is None:
        with pytest.raises(UsageError, match="no BOS token"):
            tokenizer.prefix("on")
    else:
        assert tokenizer.prefix("on") == on


def test_a_conversation_begins_as_its_template_says(tmp_path: Path) -> None:
    library = write(tmp_path, TEMPLATE)
    tokenizer = load_tokenizer(tmp_path)
    with_bos = tokenizer.chat(TALK)[0]
    plain = library.encode("[user] what is text[assistant] numbers", add_special_tokens=False).ids
    assert [tokenizer.begun(with_bos, bos) for bos in ("auto", "on", "off")] == [with_bos, with_bos, plain]
    assert [tokenizer.begun(plain, bos) for bos in ("auto", "on", "off")] == [plain, with_bos, plain]


def test_chat_is_one_application_of_the_template(tmp_path: Path) -> None:
    library = write(tmp_path, TEMPLATE)
    ids, mask = load_tokenizer(tmp_path).chat(TALK)
    expected = library.encode("<s>[user] what is text[assistant] numbers", add_special_tokens=False).ids
    assert ids == expected
    assert ids.count(0) == 1
    assert mask is not None
    assert len(mask) == len(ids)
    written = [token for token, mine in zip(ids, mask, strict=True) if mine]
    assert library.decode(written).strip() == "numbers"  # the space before belongs to the first token


def test_chat_passes_tools(tmp_path: Path) -> None:
    library = write(tmp_path, TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    ids, mask = load_tokenizer(tmp_path).chat(TALK, tools=[tool, tool])
    assert library.decode(ids).endswith("2 tools")
    assert mask is None


def test_chat_without_template_is_a_data_error(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(tmp_path).chat(TALK)


def test_template_that_refuses_is_a_data_error(tmp_path: Path) -> None:
    write(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        load_tokenizer(tmp_path).chat(TALK)


def test_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer files") as error:
        load_tokenizer(tmp_path)
    assert "no calibration data" in error.value.hint


def test_damaged_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_value_of_config_json_is_not_the_tokenizers_fault(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2.5}))
    with pytest.raises(ModelError, match=r"cannot read it.*num_attention_heads") as error:
        load_tokenizer(tmp_path)
    assert error.value.where.endswith("config.json") and error.value.kind == "E-CLASS-UNKNOWN"


def test_own_code_is_refused_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    config = {"tokenizer_class": "StrangeTokenizer", "auto_map": {"AutoTokenizer": ["strange.StrangeTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange"}))
    with pytest.raises(ModelError) as error:
        load_tokenizer(tmp_path)
    assert "--trust-remote-code" in error.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_max_length", "1000"), ("model_max_length", [1]), ("chat_template", 5), ("tokenizer_class", 5)],
)
def test_odd_types_in_its_config_name_the_key(key: str, value: object, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=f"{key} is .*but must be") as error:
        load_tokenizer(tmp_path)
    assert error.value.where == str(path)
