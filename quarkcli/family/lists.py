"""Finds the lists of blocks among tensor names, and chooses the language model's. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.config import block_count, hidden_size
from quarkcli.family.schema import HeaderLike

# Words in a path that say which tower a list belongs to.
TOWER_WORDS = {
    "vision": {"vision", "visual", "image", "video", "vit", "siglip", "clip", "img", "pixel", "qformer", "resampler"},
    "audio": {"audio", "speech", "whisper", "conformer", "acoustic", "vocoder", "codec", "talker", "voice"},
}
_LANGUAGE = {"language", "text", "llm", "lang", "thinker", "decoder"}
_DESCRIBE = "write a family file that names the blocks; see 'Adding a model family' in docs/models.md"
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def words(path: str) -> set[str]:
    """Returns the words of a module path.

    The words are its steps, split at underscores, without numbers at their ends.
    """
    return {word.rstrip("0123456789") for word in re.split(r"[._]", path.lower())}


def tower(name: str) -> str | None:
    """Returns the role of the tower that a name lies in, `vision` or `audio`; None for all others.

    The last step that names a tower wins.

    `thinker.audio_tower.layers` is audio, `clip.text_model.layers` is text.
    """
    for step in reversed(name.split(".")):
        found = words(step)
        role = next((role for role, own in TOWER_WORDS.items() if found & own), None)
        if role is not None or found & _LANGUAGE:
            return role
    return None


@dataclass
class BlockList:
    """A numbered list of modules that hold matrices.

    widths   every size that a tensor of one of its blocks has
    """

    path: str
    numbers: set[int] = field(default_factory=set)
    matrices: int = 0
    widths: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.path} ({len(self.numbers)} blocks)"

    @property
    def steps(self) -> set[str]:
        return set(self.path.split("."))


def block_lists(headers: Mapping[str, HeaderLike]) -> list[BlockList]:
    """Returns every list of blocks, by first appearance. A list of single matrices is none, where there are others."""
    found: dict[str, BlockList] = {}
    for name, header in headers.items():
        match = _NUMBERED.match(name)
        if match:
            own = found.setdefault(match[1], BlockList(match[1]))
            own.numbers.add(int(match[2]))
            own.matrices += len(header.shape) >= 2
            own.widths.update(header.shape)
    lists = [own for own in found.values() if own.matrices]
    return [own for own in lists if own.matrices > len(own.numbers)] or lists


def language_blocks(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> str:
    """Returns the path of the list of blocks that is the language model.

    Towers lose; what is left must fit the config's count and hidden size; then words such as `language_model` win.
    Raises ModelError when none fits, when several do, and for encoder-decoders, whose two stacks are not one list.
    """
    lists = block_lists(headers)
    if not lists:
        raise ModelError(
            "the tensor names hold no numbered decoder blocks",
            hint="describe the family in a YAML file: 'quark models infer MODEL' begins one",
            kind="E-MODEL-FAMILY",
        )
    text = [own for own in lists if tower(own.path) is None] or lists
    _refuse_two_stacks(config, text)
    fitting = [own for own in text if _fits(own, config)]
    exact = [own for own in fitting if len(own.numbers) == block_count(config)]
    told = [own for own in exact or fitting if words(own.path) & _LANGUAGE]
    best = told or exact or fitting
    if len(best) == 1:
        return best[0].path
    count, hidden = block_count(config), hidden_size(config)
    said = f"{count if count is not None else 'any number of'} blocks of width {hidden or 'unknown'}"
    if best:
        what = f"{_joined(best)} all fit config.json ({said}), and it is unknown which one is the language model"
    else:
        what = f"no list of blocks fits config.json, which has {said}; the files have {_joined(lists)}"
    raise ModelError(what, where="tensor names", hint=_DESCRIBE, kind="E-MODEL-FAMILY")


def found_lists(headers: Mapping[str, HeaderLike]) -> str:
    """Returns a hint that names the block lists in the files."""
    lists = block_lists(headers)
    return f"the files have {_joined(lists)}" if lists else "the files have no numbered blocks"


def _fits(own: BlockList, config: Mapping[str, Any]) -> bool:
    count, hidden = block_count(config), hidden_size(config)
    return (count is None or own.numbers >= set(range(count))) and (hidden is None or hidden in own.widths)


def _refuse_two_stacks(config: Mapping[str, Any], lists: list[BlockList]) -> None:
    """Refuses a model of an encoder and a decoder: quantizing one of them would be half of the work."""
    hidden = hidden_size(config)
    wide = [own for own in lists if config.get("is_encoder_decoder") or hidden is None or hidden in own.widths]
    encoders = [own for own in wide if "encoder" in own.steps and "decoder" not in own.steps]
    decoders = [own for own in wide if "decoder" in own.steps]
    if encoders and decoders:
        raise ModelError(
            f"the model is an encoder-decoder ({_joined([*encoders, *decoders])}), and quark works only on models "
            "with one list of blocks",
            where="tensor names",
            hint="use a decoder-only model; " + _DESCRIBE,
            kind="E-MODEL-FAMILY",
        )


def _joined(lists: Iterable[BlockList]) -> str:
    texts = [str(own) for own in lists]
    return ", ".join(texts[:-1]) + f" and {texts[-1]}" if len(texts) > 1 else texts[0]
