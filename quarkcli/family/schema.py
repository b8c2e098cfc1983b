"""A family file: what it may say, which one fits a checkpoint, and what is inferred when none does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from quarkcli.errors import ConfigError, ModelError, near_misses
from quarkcli.recipe import catalog
from quarkcli.recipe.schema import Strict, validate


class HeaderLike(Protocol):
    """What is read of a safetensors header."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class FusedModel(Strict):
    """A file tensor that holds one projection of all experts: [experts, out, in], or [experts, in, out] transposed."""

    targets: list[str]
    split: Literal["halves", "interleaved"] = "halves"
    transpose: bool = False


class ExpertsModel(Strict):
    """Routed experts: module path below the block, leaf names, and the fused tensors a file may have instead."""

    path: str
    gate: str | None = None
    up: str
    down: str
    fused: dict[str, FusedModel] = Field(default_factory=dict)


class AttentionModel(Strict):
    """Attention module below the block, and its projections below that."""

    module: str
    q: str
    k: str
    v: str


class FamilyModel(Strict):
    """A family file, `recipes/models/<name>.yaml`."""

    architectures: list[str] = Field(default_factory=list)
    model_types: list[str] = Field(default_factory=list)
    blocks: str
    embed: list[str]
    tail: list[str]
    roles: dict[str, list[str]]
    attention: AttentionModel | None = None
    sites: list[list[str]] = Field(default_factory=list)
    scale_groups: list[list[str]] = Field(default_factory=list)
    experts: ExpertsModel | None = None
    aliases: dict[str, str] = Field(default_factory=dict)


# Roles kept in source precision unless --unprotect names them, with the reason the plan shows.
PROTECTED = {
    "embedding": "a table that is looked up, not multiplied",
    "head": "small share of the bytes, large share of the loss",
    "router": "decides which expert runs",
    "norm": "one value per channel",
    "conv": "tiny",
    "vision": "not reached by text calibration",
    "audio": "not reached by text calibration",
    "projector": "not reached by text calibration",
    "mtp": "extra prediction layers that the model's own forward does not run",
}


def load(path: Path) -> FamilyModel:
    """A family file. Raises ConfigError with place."""
    return validate(FamilyModel, catalog.document(path))


def identify(config: Mapping[str, Any]) -> tuple[str, FamilyModel] | None:
    """The family whose architectures or model types name the config's, or None."""
    architecture = (config.get("architectures") or [None])[0]
    model_type = config.get("model_type")
    known = {name: load(path) for name, path in catalog.files("models").items()}
    for name, family in known.items():
        if architecture in family.architectures:
            return name, family
    for name, family in known.items():
        if model_type in family.model_types:
            return name, family
    return None


def for_checkpoint(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> tuple[str, FamilyModel, bool]:
    """(name, family, inferred) for a checkpoint."""
    found = identify(config)
    if found is not None:
        return (*found, False)
    return str(config.get("model_type") or "unknown"), infer(headers), True


def infer(headers: Mapping[str, HeaderLike]) -> FamilyModel:
    """A family guessed from names: the numbered path with the most matrices, and roles by the usual leaf names."""
    counts: dict[str, int] = {}
    for name, header in headers.items():
        found = re.match(r"(.*?)\.\d+\.", name)
        if found and len(header.shape) == 2:
            counts[found[1]] = counts.get(found[1], 0) + 1
    if not counts:
        raise ModelError("no numbered decoder blocks among the tensor names", hint="describe the family in YAML")
    blocks = max(counts, key=lambda path: counts[path])
    stem = blocks.rpartition(".")[0]
    outside = [name.removesuffix(".weight") for name in headers if not name.startswith(blocks + ".")]
    embed = [
        name for name in outside if "embed" in name.rsplit(".", 1)[-1] or name.endswith(("wte", "word_embeddings"))
    ]
    tail = [name for name in outside if name.endswith(("lm_head", "norm", "ln_f", "output")) and name not in embed]
    return FamilyModel(
        blocks=blocks,
        embed=embed or [f"{stem}.embed_tokens"],
        tail=tail,
        roles={
            "embedding": embed or ["*embed*"],
            "head": ["*lm_head", "output"],
            "norm": ["*norm*", "*.ln_*"],
            "router": ["*.gate", "*.router"],
            "conv": ["*conv*"],
            "vision": ["*visual*", "*vision*"],
            "audio": ["*audio*"],
            "mtp": ["mtp.*"],
        },
    )


def check_unprotect(roles: Iterable[str]) -> None:
    """Raises ConfigError for a role that is not protected."""
    for role in roles:
        if role not in PROTECTED:
            close = near_misses(role, PROTECTED)
            known = f"did you mean '{close[0]}'?" if close else f"roles: {', '.join(PROTECTED)}"
            raise ConfigError(f"unknown role '{role}'", where="--unprotect", hint=known)
