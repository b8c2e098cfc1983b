"""Turns text into token numbers, with the tokenizer that lies beside the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from quarkcli.errors import DataError, ModelError, UsageError
from quarkcli.model.failures import described
from quarkcli.model.library import AutoTokenizer, one_day, quiet, transformers
from quarkcli.model.limits import Bounded, OutOfBounds

_PLAIN = "use calibration data with plain text"
HINT = "add the tokenizer's files; only a scheme that needs no calibration data, such as mxfp4, works without them"
# Any one of these says that the folder has a tokenizer.
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")


# Keys of tokenizer_config.json whose values are used as they are; null is none.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "model_max_length": ((int, float), "a number"),
    "chat_template": ((str, list, dict), "text, or templates by name"),
    "tokenizer_class": ((str,), "text"),
}
_PROBE = "A text."


@contextmanager
def _panics() -> Iterator[None]:
    """A panic of the library's Rust code, a pattern of tokenizer.json without end among them, as a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # it derives from BaseException and has no public place
            raise
        raise RuntimeError(str(error)) from error


class Tokenizer:
    """A transformers tokenizer, reduced to what calibration and evaluation need."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._bounded = Bounded(self._render)
        self._prefix = self._added_in_front()

    @property
    def bos(self) -> int | None:
        """Returns the token number that begins a text, or None."""
        return self._inner.bos_token_id

    @property
    def eos(self) -> int | None:
        """Returns the token number that ends a text, or None."""
        return self._inner.eos_token_id

    def prefix(self, bos: str = "auto") -> list[int]:
        """Returns token numbers that a row of text begins with.

        bos     auto: what the tokenizer itself puts before a text, which may be nothing; on: that, else the BOS
                token; off: nothing
        raises  UsageError: `on`, and there is no BOS token; another word
        """
        if bos not in {"auto", "on", "off"}:
            raise UsageError(f"unknown value '{bos}'", where="--bos", hint="use auto, on or off", kind="E-FLAG-VALUE")
        if bos == "off":
            return []
        if self._prefix or bos == "auto":
            return list(self._prefix)
        if self.bos is None:
            raise UsageError(
                "this tokenizer has no BOS token", where="--bos on", hint="use --bos auto", kind="E-FLAG-CONFLICT"
            )
        return [self.bos]

    def begun(self, ids: list[int], bos: str = "auto") -> list[int]:
        """Returns a conversation's token numbers with the beginning that `bos` asks for.

        auto leaves it to the chat template, as servers do; on and off put and take what is missing or there.
        """
        if bos == "auto":
            return ids
        wanted = self.prefix(bos)
        there = [some for some in (wanted, self._prefix, [self.bos]) if some and ids[: len(some)] == some]
        return wanted + ids[len(there[0]) if there else 0 :]

    def ordinary(self) -> list[int]:
        """Returns the numbers of all tokens that are text: no marks, none that was added."""
        marks = {*self._inner.all_special_ids, *self._inner.added_tokens_decoder}
        return [number for number in range(self._inner.vocab_size) if number not in marks]

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens, added ones included."""
        return len(self._inner)

    def _added_in_front(self) -> list[int]:
        """Returns the tokens that the tokenizer itself puts before a text, without those that it puts behind."""
        plain = self.encode(_PROBE)
        whole = self._encoded(_PROBE, special=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        return whole[:1] if whole and whole[0] == self.bos else []

    @property
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    def use_template(self, template: str) -> None:
        """Renders conversations by this template from now on."""
        self._inner.chat_template = template

    def encode(self, text: str) -> list[int]:
        """Returns token numbers of `text`; no special tokens are added.

        Raises ModelError when the tokenizer's code fails.
        """
        return self._encoded(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token numbers, special tokens by their names.

        Raises ModelError when the tokenizer's code fails.
        """
        with quiet():
            try:
                with _panics():
                    return str(self._inner.decode(list(ids), skip_special_tokens=False))
            except Exception as error:
                raise _failed("fails to turn token numbers into text", type(self._inner).__name__, error) from error

    def _encoded(self, text: str, special: bool) -> list[int]:
        with quiet():
            try:
                with _panics():
                    return list(self._inner.encode(text, add_special_tokens=special))
            except Exception as error:
                raise _failed("fails to turn a text into tokens", type(self._inner).__name__, error) from error

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[int] | None]:
        """Returns the token numbers of a conversation, and a mask of those the assistant wrote (None: unknown).

        One application of the chat template; special tokens come from the template alone, so none is doubled.

        raises  DataError when there is no template or it refuses the messages
        """
        if not self.has_chat_template:
            raise DataError(
                "the tokenizer has no chat template, so quark cannot turn conversations into tokens",
                hint=_PLAIN,
                kind="E-CHAT-TEMPLATE",
            )
        with quiet():
            try:
                return self._bounded([dict(message) for message in messages], [dict(tool) for tool in tools or ()])
            except OutOfBounds as error:
                what = f"the chat template of the tokenizer fails: {error}"
                raise ModelError(what, hint=_PLAIN, kind="E-TOKENIZER") from error
            except Exception as error:  # templates raise what they like, jinja's own errors included
                raise DataError(f"the chat template refuses a conversation: {error}", kind="E-CHAT-TEMPLATE") from error

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> tuple[list[int], list[int] | None]:
        marked = "{% generation %}" in str(self._inner.chat_template).replace("{%-", "{%").replace("-%}", "%}")
        with one_day(), _panics():
            made = self._inner.apply_chat_template(
                [self._as_template_takes(message) for message in messages],
                tools=tools or None,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=marked,
            )
        mask = made.get("assistant_masks") if marked else None
        return list(made["input_ids"]), list(mask) if mask is not None else None

    def _as_template_takes(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str) and content and self._wants_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)

    @cached_property
    def _wants_parts(self) -> bool:
        """True for a template that shows texts given as lists of parts and none that is given as it is."""
        return not self._shows(_PROBE) and self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        try:
            messages = [{"role": "user", "content": content}]
            return _PROBE in self._inner.apply_chat_template(messages, tokenize=False)
        except Exception:  # a template that refuses shows nothing
            return False


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Returns the tokenizer of a local folder; never uses the network, never asks.

    raises  ModelError: no tokenizer files, files that cannot be read, custom code without `trust_remote_code`
    """
    if not any((folder / name).exists() for name in FILES):
        raise ModelError(
            "there are no tokenizer files, so quark cannot turn text into tokens",
            where=str(folder),
            hint=HINT,
            kind="E-TOKENIZER",
        )
    _check_config(folder / "tokenizer_config.json")
    try:
        with quiet():
            inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                "the tokenizer comes with its own code, and needs to run it",
                where=str(folder),
                hint="read that code, then allow it with --trust-remote-code; a run without data needs no tokenizer",
                kind="E-CODE-TRUST",
            ) from error
        if type(error).__name__.startswith("StrictDataclass"):  # a value of config.json, which is read on the way
            raise ModelError(
                f"transformers {transformers.__version__} cannot read it: {described(error)}",
                where=str(folder / "config.json"),
                hint="correct this value",
                kind="E-CLASS-UNKNOWN",
            ) from error
        raise _failed("cannot be loaded", str(folder), error) from error
    return Tokenizer(inner)


def _failed(failing: str, where: str, error: Exception) -> ModelError:
    is_text = where.isprintable() or not isinstance(error, UnicodeEncodeError)
    return ModelError(
        f"the tokenizer {failing} (transformers {transformers.__version__}): {described(error)}",
        where=where,
        hint=HINT if is_text else "rename the directory: its path is not UTF-8, and the library cannot open it",
        kind="E-TOKENIZER",
    )


def _check_config(path: Path) -> None:
    """Refuses values that loading lets pass and use does not."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"is not valid JSON: {error}", where=str(path), hint=HINT, kind="E-TOKENIZER") from error
    if not isinstance(config, dict):
        raise ModelError("is not a JSON object", where=str(path), hint=HINT, kind="E-TOKENIZER")
    for key, (kinds, wanted) in _TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kinds):
            raise ModelError(
                f"{key} is {str(value)[:40]!r}, but must be {wanted}",
                where=str(path),
                hint=HINT,
                kind="E-TOKENIZER",
            )
