"""Turns a `cfg` in any vocabulary into a TensorSpec. Torch-free.

Which vocabulary it is shows in its words: `element` is our own, `dtype` a SPEC of AMD Quark, anything else attributes
of NVIDIA ModelOpt, whose `num_bits` may be left out (8). A list is a chain of two: ModelOpt quantizes with one after
the other and stores the first, Quark stores the last, or quantizes the scales of the first (`is_scale_quant`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.recipe.attributes import modelopt, native, quark
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.spec import TensorSpec

Cfg = Mapping[str, Any] | Sequence[Mapping[str, Any]]

_NATIVE, _QUARK, _MODELOPT = "element", "dtype", "num_bits"
# Words that tell a vocabulary even where its main one is missing.
_OWN = {
    _NATIVE: frozenset(native.KEYS),
    _QUARK: quark.WORDS,
    _MODELOPT: frozenset(modelopt.FIELDS),
}


def to_spec(cfg: Cfg, *, weight: bool) -> TensorSpec:
    """Returns the TensorSpec of a cfg. Raises ConfigError naming the field, without a place (the caller adds it).

    weight   of a weight or a bias, which are known before the model runs; else of an activation
    """
    spec = _read(cfg, weight)
    scales = [scale for stage in spec.stages if stage.scale for scale in (stage.scale, stage.scale.outermost)]
    if weight and any(scale.constant_amax is not None for scale in scales):
        raise ConfigError(
            "constant_amax works only for activations: the range of a weight is that of its values",
            hint="remove it, or write it for input, output or attention quantizers alone, as '*.input_quantizer'",
            kind="E-FORMAT-IMPOSSIBLE",
        )
    return spec


def _read(cfg: Cfg, weight: bool) -> TensorSpec:
    stages = [cfg] if isinstance(cfg, Mapping) else list(cfg) if isinstance(cfg, list | tuple) else []
    if not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise ConfigError(f"cfg must be a mapping or a list of mappings, not {cfg!r}", kind="E-ATTRIBUTE-VALUE")
    word = _vocabulary(stages)
    if word == _QUARK:
        return quark.to_spec(stages, weight=weight)
    if word == _NATIVE:
        if len(stages) > 1:
            raise ConfigError(
                "a chain (two quantizations, one after the other) is written with 'then'",
                hint="write cfg: {element: int4, ..., then: {...}}",
                kind="E-CHAIN",
            )
        return native.to_spec(stages[0])
    if len(stages) > 2:
        raise ConfigError(f"a chain has two stages, and this one has {len(stages)}", kind="E-CHAIN")
    spec, *after = [modelopt.to_spec(stage, weight=weight) for stage in stages]
    # What a native cfg may not say, no other vocabulary may.
    return native.to_spec(spec_to_yaml(replace(spec, then=after[0]) if after else spec))


def words_of(cfg: Cfg) -> frozenset[str]:
    """Returns the words of the vocabulary that a cfg is written in. Raises ConfigError for a mixture."""
    return _OWN[_vocabulary([cfg] if isinstance(cfg, Mapping) else cfg)]


def vocabularies() -> Iterable[frozenset[str]]:
    """Returns the words of every vocabulary."""
    return _OWN.values()


def check_names(stage: Mapping[str, Any]) -> None:
    """Raises ConfigError for an attribute that no vocabulary knows, without looking at any value."""
    known = set().union(*_OWN.values())
    for key in stage:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"unknown attribute '{key}'", hint=hint, kind="E-ATTRIBUTE-UNKNOWN")


def _vocabulary(stages: Sequence[Mapping[str, Any]]) -> str:
    """Returns the word that tells the vocabulary. Raises ConfigError for a mixture."""
    found = [word for word in _OWN if any(word in stage for stage in stages)]
    if len(found) > 1:
        raise ConfigError(
            f"'{found[0]}' and '{found[1]}' are words of different tools",
            hint="use the words of one tool",
            kind="E-VOCABULARY",
        )
    word = found[0] if found else _MODELOPT
    others = set().union(*(_OWN[other] for other in _OWN if other != word)) - _OWN[word]
    foreign = next((key for stage in stages for key in stage if key in others), None)
    if foreign is None:
        return word
    if found:
        raise ConfigError(
            f"'{foreign}' and '{word}' are words of different tools",
            hint="use the words of one tool",
            kind="E-VOCABULARY",
        )
    missing = next(other for other in (_NATIVE, _QUARK) if foreign in _OWN[other])
    raise ConfigError(
        f"'{foreign}' needs '{missing}' beside it", hint=f"add '{missing}', the number format", kind="E-VOCABULARY"
    )
