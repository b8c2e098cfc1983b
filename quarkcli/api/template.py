"""`LLMTemplate` of AMD Quark, with the families and schemes that every command uses. Torch-free.

    template = LLMTemplate.get("llama")
    config = template.get_config("fp8", kv_cache_scheme="fp8", layer_config={"*down_proj": "mxfp4"})
    quarkcli.quantize("demo", config=config, output="out")

`get_config` returns a native recipe as plain data, which you can also write to a YAML file. It follows Quark: a
scheme means linears only, the first of two layer patterns that match wins, `exclude_layers` replaces the template's
own list, and no exclusion reaches cache and attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

from quarkcli import algorithms, family
from quarkcli.api import run
from quarkcli.api.given import as_mapping, as_names, as_text, wrong
from quarkcli.errors import ConfigError, UsageError, near_misses
from quarkcli.recipe import catalog, steps
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import SLOTS, Entry, Origin
from quarkcli.recipe.normalize import path_text, refusal
from quarkcli.recipe.quark_config import LAYER_KEYS, class_name, is_groups, is_minimum, weight_slots, with_minimum
from quarkcli.recipe.recipe import attention_entries, cache_entries, exclusion_entries, scheme_entries
from quarkcli.recipe.schema import NATIVE

_LINEAR = "nn.Linear"
_NO_LINEARS = ("embedding", "norm", "conv")
_GATE_UP = ["gate_proj", "up_proj"]
_CACHE = ("k", "v")
_PROJECTIONS = {"k_proj": ("k",), "v_proj": ("v",)}
_STORED = ("weight", "bias")
_LEGACY = "_config"

Row = dict[str, Any]
AlgoConfig = Mapping[str, Any]


class LLMTemplate:
    """The roles of a model's layers: attention, gate and up, exclusions.

    model_type           name of the template
    kv_layers_name       patterns of the projections whose outputs the KV cache keeps
    q_layer_name         pattern, or patterns, of the query projections
    gate_up_layers_name  leaf names of gate and up, which share a scale
    exclude_layers_name  patterns of modules that stay as they are
    algorithm_configs    algorithm -> its parameters, in Quark's words or ours
    legacy               `<algorithm>_config=...`, the old form of `algorithm_configs`; warns

    Raises ConfigError for an unknown algorithm, and for `f2f_weight_converters`, because the family file splits fused
    tensors (`experts.fused`).
    """

    _registered: ClassVar[dict[str, LLMTemplate]] = {}

    def __init__(
        self,
        model_type: str,
        kv_layers_name: Sequence[str] | None = None,
        q_layer_name: str | Sequence[str] | None = None,
        gate_up_layers_name: Sequence[str] | None = None,
        exclude_layers_name: Sequence[str] = (),
        algorithm_configs: Mapping[str, AlgoConfig | None] | None = None,
        f2f_weight_converters: Sequence[Any] | None = None,
        **legacy: AlgoConfig | None,
    ) -> None:
        if f2f_weight_converters:
            hint = "write a family file that splits fused tensors, as 'quark models show qwen3_5_moe' does"
            raise wrong("weight converters are not supported", where="f2f_weight_converters", hint=hint)
        self.model_type = as_text(model_type, "model_type")
        self.kv_layers_name = None if kv_layers_name is None else as_names(kv_layers_name, "kv_layers_name")
        self.q_layer_name = q_layer_name
        gate_up = _GATE_UP if gate_up_layers_name is None else gate_up_layers_name
        self.gate_up_layers_name = as_names(gate_up, "gate_up_layers_name")
        self.exclude_layers_name = as_names(exclude_layers_name, "exclude_layers_name")
        self.algo_config: dict[str, AlgoConfig | None] = {}
        if legacy:
            self.algo_config |= _legacy(legacy)
            text = f"{', '.join(sorted(legacy))}: deprecated; use algorithm_configs={{'gptq': ...}}"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        for name, config in as_mapping(algorithm_configs, "algorithm_configs").items():
            self.algo_config[_known_algorithm(as_text(name, "the name of an algorithm"))] = config
        self._defaults: list[str] | None = None  # of a family: exclusions that a recipe has without naming them

    def __repr__(self) -> str:
        return f"LLMTemplate({self.model_type!r})"

    # -- the collection --------------------------------------------------------------------------------------------

    @classmethod
    def list_available(cls) -> list[str]:
        """Returns the names of all model families, and of the templates registered beside them."""
        known = [card.name for card in family.cards()]
        taken = {catalog.same(name) for name in known}
        return [*known, *(t.model_type for name, t in cls._registered.items() if name not in taken)]

    @classmethod
    def register_template(cls, template: LLMTemplate) -> None:
        """Adds a template until the process ends. Warns if its name is known already."""
        if not isinstance(template, LLMTemplate):
            raise wrong(f"a template is needed, not {template!r:.60}", hint="give LLMTemplate(model_type, ...)")
        if catalog.same(template.model_type) in cls._registered or _card(template.model_type) is not None:
            warnings.warn(f"template '{template.model_type}' exists already and is replaced", stacklevel=2)
        cls._registered[catalog.same(template.model_type)] = template

    @classmethod
    def get(cls, model_type: str) -> LLMTemplate:
        """Returns the template registered under a name, else that of the family with this name or `model_type`.

        Raises ConfigError for an unknown one.
        """
        name = catalog.same(as_text(model_type, "model_type", "give model.config.model_type"))
        found = cls._registered.get(name)
        if found is not None:
            return found
        card = _card(model_type)
        if card is None:
            close = near_misses(model_type, cls.list_available())
            hint = f"did you mean {', '.join(close)}? " if close else ""
            raise wrong(f"there is no template for '{model_type}'", hint=f"{hint}see LLMTemplate.list_available()")
        return _of_family(card)

    @classmethod
    def register_scheme(cls, scheme_name: str, config: Mapping[str, Any]) -> None:
        """Adds a scheme, as `quarkcli.register_scheme` does.

        config   `weight`, `input_tensors`, `output_tensors`, `bias` with Quark's SPECs, or a scheme in our words
        """
        parts = as_mapping(config, "config").items()
        given = {LAYER_KEYS.get(key, key): value for key, value in parts if value is not None}
        for kind in [kind for kind in LAYER_KEYS.values() if kind in given]:
            given[kind] = spec_to_yaml(to_spec(given[kind], weight=kind in _STORED))
        run.register_scheme(scheme_name, given)

    @classmethod
    def unregister_scheme(cls, scheme_name: str) -> None:
        """Removes a registered scheme. Raises UsageError for any other."""
        run.unregister_scheme(scheme_name)

    @classmethod
    def get_supported_schemes(cls) -> list[str]:
        """Returns the names of all schemes, aliases included."""
        return sorted(catalog.names("schemes"))

    # -- the config ------------------------------------------------------------------------------------------------

    def get_config(
        self,
        scheme: str,
        algorithm: str | Sequence[str] | None = None,
        kv_cache_scheme: str | None = None,
        min_kv_scale: float = 0.0,
        attention_scheme: str | None = None,
        layer_config: Mapping[str, str] | None = None,
        layer_type_config: Mapping[type | str, str] | None = None,
        exclude_layers: Sequence[str] | None = None,
        algo_configs: Mapping[str, AlgoConfig] | None = None,
        shared_scale_groups: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, Any]:
        """Returns a recipe for `quarkcli.quantize(model, config=...)` and `make_plan`.

        scheme               of all linears
        algorithm            one or several names, in the order in which they run
        kv_cache_scheme      of the cache, for the modules of `kv_layers_name`
        min_kv_scale         no scale of keys and values is smaller, whichever scheme gives it
        attention_scheme     of queries (`q_layer_name`), keys, values and the softmax output; wins over the cache's
        layer_config         module pattern -> scheme; of two that match, the first wins
        layer_type_config    class of modules -> scheme; `layer_config` wins over it
        exclude_layers       module patterns, instead of `exclude_layers_name`; each must match something, but those of
                             the template's own; None: those
        algo_configs         algorithm -> parameters, instead of the template's
        shared_scale_groups  leaf names of weights that share a scale, these alone; [] lets nothing share; None: what
                             servers fuse, that is q, k, v and gate, up

        Raises UsageError for unknown schemes, ConfigError for what the template cannot tell.
        """
        share = self._share(shared_scale_groups)
        excluded = self.exclude_layers_name if exclude_layers is None else as_names(exclude_layers, "exclude_layers")
        by_family = self._defaults is not None and sorted(excluded) == sorted(self._defaults)
        rows: list[Row] = [{"quantizer_path": "*", "enable": False, "required": False}]
        rows += _scheme_rows(scheme, "*", _LINEAR)
        for kind, name in as_mapping(layer_type_config, "layer_type_config").items():
            rows += _scheme_rows(name, "*", class_name(getattr(kind, "__name__", str(kind))))
        for pattern, name in reversed(as_mapping(layer_config, "layer_config").items()):
            rows += _scheme_rows(name, pattern, None)
        for pattern in () if by_family else excluded:
            made = exclusion_entries(pattern, Origin("exclude_layers"), user=False, required=False)
            must = pattern not in self.exclude_layers_name
            rows += [_row(entry, required=must and entry is made[0]) for entry in made]
        rows += self._attention_rows(kv_cache_scheme, attention_scheme, min_kv_scale)
        quantize: dict[str, Any] = {"quant_cfg": rows}
        if algorithm:
            quantize["algorithm"] = self._steps(algorithm, as_mapping(algo_configs, "algo_configs"))
        return {
            "schema": NATIVE,
            "metadata": {"name": scheme, "description": f"LLMTemplate('{self.model_type}'), scheme {scheme}"},
            "exclusions": "default" if by_family else "none",
            "quantize": quantize,
            **share,
        }

    def _attention_rows(self, cache: str | None, attention: str | None, minimum: float) -> list[Row]:
        """Returns the entries of the cache, then those of attention, whose k and v win, as with the flags."""
        if not is_minimum(minimum):
            raise wrong(f"min_kv_scale must be a number from 0 on, not {minimum!r}")
        first = cache_entries(cache, Origin("kv_cache_scheme")) if cache is not None else []
        last = attention_entries(attention, Origin("attention_scheme")) if attention is not None else []
        wanted = {entry.quantizer_path: entry.cfg for entry in first}
        if any(wanted.get(entry.quantizer_path, entry.cfg) != entry.cfg for entry in last):
            text = f"attention_scheme {attention} decides the KV cache, not kv_cache_scheme {cache}"
            warnings.warn(text, stacklevel=3)
        if minimum and not any(_kind(entry) in _CACHE for entry in (*first, *last)):
            raise wrong("min_kv_scale works only with a KV cache", hint="give kv_cache_scheme='fp8'")
        return [row for entry in (*first, *last) for row in self._attention_row(_bounded(entry, float(minimum)))]

    def _attention_row(self, entry: Entry) -> list[Row]:
        """Returns `entry` for the attention modules whose projections the template names."""
        kind = _kind(entry)
        if kind in _CACHE:
            patterns, field = self.kv_layers_name, "kv_layers_name"
        elif kind == "q":
            q = self.q_layer_name
            patterns, field = ([q] if isinstance(q, str) else q), "q_layer_name"  # type: ignore[assignment]
        else:
            return [_row(entry, required=True)]
        if not patterns:
            raise wrong(f"the template does not say which projections make {kind}", where=self.model_type,
                         hint=f"give LLMTemplate(..., {field}=[...])")  # fmt: skip
        slots = dict.fromkeys(_attention_slot(p, kind) for p in patterns if kind == "q" or kind in _caches(p))
        return [_row(replace(entry, quantizer_path=slot), required=True) for slot in slots]

    def _steps(self, names: str | Sequence[str], given: Mapping[str, AlgoConfig]) -> list[Row]:
        """Returns `algorithm` of a recipe. Raises ConfigError for an algorithm or a parameter that is unknown here."""
        known = {_known_algorithm(name): given[name] for name in as_names(given, "algo_configs")}
        rows = []
        for name in [names] if isinstance(names, str) else as_names(names, "algorithm"):
            method = _known_algorithm(name)
            config = known[method] if method in known else self.algo_config.get(method)
            listed = _listed(method, as_mapping(config, f"config of {method}"))
            for one, parameters in listed:
                own = {key: value for key, value in parameters.items() if key != SLOTS}
                algorithms.create(one, own, "algorithm")
            rows += [{"method": one, **deepcopy(parameters)} for one, parameters in listed]
        return rows

    def _share(self, groups: Sequence[Sequence[str]] | None) -> dict[str, Any]:
        """Returns `share` of a recipe: nothing for scale groups that the family has anyway. Raises ConfigError."""
        if groups is None:
            return {}
        if not is_groups(groups):
            raise wrong(f"a list of lists of names is needed, not {groups!r:.60}", where="shared_scale_groups")
        q = [self.q_layer_name] if isinstance(self.q_layer_name, str) else list(self.q_layer_name or ())
        attention = {_leaf(pattern) for pattern in (*q, *(self.kv_layers_name or ()))}
        own = {frozenset(group) for group in (attention, self.gate_up_layers_name) if len(group) > 1}
        if groups and {frozenset(map(_leaf, group)) for group in groups} == own:
            return {}
        return {"share": [{"slots": weight_slots(group), "exact": True} for group in groups]}


# --- templates --------------------------------------------------------------------------------------------------------


def _card(model_type: str) -> family.Card | None:
    """Returns the family of this name, else the one for this `model_type`."""
    cards = family.cards()
    wanted = catalog.same(model_type)
    named = (card for card in cards if catalog.same(card.name) == wanted)
    typed = (card for card in reversed(cards) if model_type in card.model_types)
    return next(named, None) or next(typed, None)


def _of_family(card: family.Card) -> LLMTemplate:
    model = family.load(card.file)
    kv, q = None, None
    if model.attention is not None:
        kv = list(dict.fromkeys(f"*{_leaf(leaf)}" for leaf in (model.attention.k, model.attention.v)))
        q = f"*{_leaf(model.attention.q)}"
    experts = model.experts
    gate_up = [experts.gate, experts.up] if experts is not None and experts.gate else None
    patterns = [
        pattern.replace("{text}", "*")
        for table in (model.roles, model.exclude)
        for role in family.PROTECTED
        if role not in _NO_LINEARS
        for pattern in table.get(role, ())
    ]
    template = LLMTemplate(card.name, kv, q, gate_up, list(dict.fromkeys(patterns)))
    template._defaults = list(template.exclude_layers_name)
    return template


def _legacy(given: Mapping[str, AlgoConfig | None]) -> dict[str, AlgoConfig | None]:
    for key in given:
        if not key.endswith(_LEGACY):
            raise TypeError(f"LLMTemplate() got an unexpected keyword argument '{key}'")
    return {_known_algorithm(key.removesuffix(_LEGACY)): config for key, config in given.items()}


def _known_algorithm(name: str) -> str:
    """Returns our name of an algorithm of ours or of Quark's. Raises ConfigError for any other."""
    if name.replace("_", "-").lower() in algorithms.names():
        return catalog.same(name)
    read = steps.from_quark({"name": name}, (name,))
    if read.problems:
        raise ConfigError(read.problems[0][1], kind="E-ATTRIBUTE-UNSUPPORTED")
    return read.steps[0][0]


def _listed(method: str, config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the steps of one config, which is in our words, or in Quark's: those have a `name`."""
    if "name" not in config:
        try:
            algorithms.create(method, dict(config), "algorithm")
        except ConfigError:  # not in our words, or not known at all
            return _from_quark(method, config)
        return [(method, dict(config))]
    return _from_quark(method, {key: value for key, value in config.items() if key != "name"})


def _from_quark(method: str, parameters: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns steps in our words from parameters in Quark's. Warns of those that have no meaning here."""
    read = steps.from_quark({"name": method, **parameters}, (method,))
    if read.problems:
        raise refusal(read.problems, path_text)
    if read.notes:
        warnings.warn("; ".join(text for _, text in read.notes), stacklevel=5)
    return read.steps


# --- rows -------------------------------------------------------------------------------------------------------------


def _scheme_rows(scheme: str, module: str, parent: str | None) -> list[Row]:
    """Returns the entries of a scheme; as one of them must match, the one for weights does."""
    made = scheme_entries(scheme, module, Origin(f"scheme {scheme}"), user=True)
    return [_row(replace(entry, parent_class=parent), required=entry is made[0]) for entry in made]


def _row(entry: Entry, *, required: bool) -> Row:
    row: Row = {"quantizer_path": entry.quantizer_path}
    if entry.parent_class is not None:
        row["parent_class"] = entry.parent_class
    if entry.cfg is not None:
        row["cfg"] = deepcopy(entry.cfg)
    return {**row, "enable": entry.enable, "required": required}


def _leaf(pattern: str) -> str:
    """Returns the part behind the last dot or star: `*language_model.*k_proj` -> `k_proj`."""
    return pattern.replace("*", ".").rpartition(".")[2]


def _caches(pattern: str) -> tuple[str, ...]:
    """Returns the halves of the cache that a projection fills; fused ones fill both."""
    return _PROJECTIONS.get(_leaf(pattern), _CACHE)


def _attention_slot(pattern: str, kind: str) -> str:
    """Returns the slot of a projection: `model.*.self_attn.k_proj` -> `model.*.self_attn.k_bmm_quantizer`."""
    return f"{pattern.removesuffix(_leaf(pattern))}{kind}_bmm_quantizer"


def _kind(entry: Entry) -> str:
    """Returns q, k, v or p: the operand of an entry's slot."""
    return entry.quantizer_path.removesuffix("_bmm_quantizer")[-1]


def _bounded(entry: Entry, minimum: float) -> Entry:
    """Returns an entry of k or v with a smallest scale; others, and with no minimum all, as they are."""
    if not minimum or _kind(entry) not in _CACHE:
        return entry
    if to_spec(entry.cfg or {}, weight=False).scale is None:
        raise UsageError("min_kv_scale has no effect: this KV cache scheme has no scale", kind="E-FLAG-CONFLICT")
    return replace(entry, cfg=with_minimum(entry.cfg, minimum))
