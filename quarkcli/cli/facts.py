"""Gathers facts of schemes and recipes without a model: bits, need of data, loaders. Torch-free."""

from __future__ import annotations

from functools import cache as cache_
from pathlib import Path
from typing import Any

from quarkcli import algorithms, servers
from quarkcli.dialects._kinds import kinds_of
from quarkcli.dialects.base import Writer
from quarkcli.errors import QuarkError
from quarkcli.family import Part, WeightView
from quarkcli.job import asked, rates
from quarkcli.plan.model import ATTENTION_KINDS, TARGET_KINDS, Attention, Decision, Plan, Site, Step, Target
from quarkcli.recipe import catalog, schema
from quarkcli.recipe.attributes import native, to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.recipe import Recipe
from quarkcli.servers._kernels import row as kernels_row
from quarkcli.spec import TensorSpec

_SHAPE = (4096, 4096)  # of the weight for which bits are quoted; per-tensor scales vanish at this size
_STORED = ("weight", "bias")  # slots that are known before the model runs


def scheme(kind: catalog.Kind, name: str, path: Path) -> dict[str, Any]:
    """Returns the facts of a weight, KV cache or attention scheme. Raises ConfigError when its file is wrong.

    bits      per value of a large weight, scales included; of the first of the slots for the others
    slots     slot kind -> its spec in native words
    dialects  dialect that can hold it -> what loads that; asked with one large linear layer
    servers   server that loads it -> in which dialects, on which generations of GPUs it runs it in which way, in which
              of the dialects it does not there, and where its source says so
    """
    from quarkcli import dialects

    model, specs = _read(kind, path)
    plan = _plan(specs) if kind == "schemes" else _attention_plan(specs)
    writers = [writer for writer in dialects.writers() if not writer.refusals(plan)]
    return {
        "name": name,
        "kind": catalog.SCHEMES[kind],
        "aliases": getattr(model, "aliases", []),
        "summary": model.summary,
        "bits": round(next(iter(specs.values())).bits_per_value(*_SHAPE), 3),
        "slots": {slot: spec_to_yaml(spec) for slot, spec in specs.items()},
        "described": {slot: spec.describe() for slot, spec in specs.items()},
        "needs_data": _waits(specs),
        "dialects": {writer.name: sorted(writer.loaders(plan)) for writer in writers},
        "servers": _servers(plan, writers, _kinds(kind, specs)),
        "hardware": getattr(model, "hardware", ""),
    }


def _servers(plan: Plan, writers: list[Writer], kinds: tuple[str, str] | None) -> dict[str, Any]:
    found = {}
    for member in servers.servers():
        loading = [writer for writer in writers if not member.refusals(servers.planned(plan, writer))]
        gpus, barred = _runs(member, loading, kinds)
        if not loading or (kinds and not gpus):
            continue  # it refuses the files, or has nothing that runs them
        row = kernels_row(member.kernels, kinds) if kinds else None
        found[member.name] = {
            "title": member.title,
            "dialects": [writer.name for writer in loading],
            "gpus": gpus,
            "not_in": barred,
            "read_in": row.read_in if row is not None else "",
        }
    return found


def _runs(
    member: servers.Server, writers: list[Writer], kinds: tuple[str, str] | None
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns generation -> the way in which a server runs formats; and the dialects in which it does not, there."""
    gpus: dict[str, str] = {}
    barred: dict[str, list[str]] = {}
    for generation in rates.generations() if kinds else ():
        assert kinds is not None
        ways = {writer.name: member.way(kinds, generation, writer) for writer in writers}
        runs = [way for way in ways.values() if way is not None]
        if runs:
            gpus[generation] = runs[0]
            barred |= {generation: names} if (names := [name for name, way in ways.items() if way is None]) else {}
    return gpus, barred


def _kinds(kind: catalog.Kind, specs: dict[str, TensorSpec]) -> tuple[str, str] | None:
    """Returns the names by which servers know the formats of a scheme."""
    if kind != "schemes":
        return kind.replace("_", "-"), next(iter(specs.values())).element
    return kinds_of((specs["weight"], specs.get("input")))


def _read(kind: catalog.Kind, path: Path) -> tuple[Any, dict[str, TensorSpec]]:
    """Returns the contents of a scheme's file, and its spec by slot. Raises ConfigError when it is wrong."""
    forms: dict[catalog.Kind, Any] = {
        "schemes": schema.SchemeModel,
        "kv_cache": schema.CacheModel,
        "attention": schema.AttentionModel,
    }
    model: Any = schema.validate(forms[kind], catalog.document(path))
    cfgs = {slot: getattr(model, slot, None) for slot in (TARGET_KINDS if kind == "schemes" else ATTENTION_KINDS)}
    return model, {slot: native.to_spec(cfg) for slot, cfg in cfgs.items() if cfg is not None}


def _waits(specs: dict[str, TensorSpec]) -> bool:
    """True when a scale waits for data."""
    return any(spec.needs_amax for slot, spec in specs.items() if slot not in _STORED)


def recipe(found: Recipe) -> dict[str, Any]:
    """Returns the facts of a recipe. `needs_data` is false when some model might still need none."""
    weights = _specs(found, "weight")
    cache = _specs(found, "bmm_quantizer")
    read = [*_specs(found, "input"), *cache]
    data = any(spec.needs_amax for spec in read) or any(_steps_need(found, spec) for spec in weights)
    attention: list[tuple[catalog.Kind, str | None]] = [("kv_cache", found.kv_cache), ("attention", found.attention)]
    added = {kind: name for kind, name in attention if name not in (None, "none")}
    return {
        "name": found.name,
        "file": found.file,
        "purpose": found.description,
        "bits": sorted({round(spec.bits_per_value(*_SHAPE), 3) for spec in weights}),
        "needs_data": data or any(_waits(_find(kind, str(name))) for kind, name in added.items()),
        "hardware": _hardware(weights, _specs(found, "input")),
        "kv_cache": added.get("kv_cache") or ", ".join(sorted({spec.element for spec in cache})) or None,
        "attention": added.get("attention"),
        "algorithms": [name for name, _ in found.algorithms],
        "dialect": found.dialect or "auto",
    }


def _hardware(weights: list[TensorSpec], inputs: list[TensorSpec]) -> str:
    """Returns the hardware for the first weights and inputs, as the scheme of the same formats says; empty for none."""
    return _machines().get((_coded(weights), _coded(inputs)), "") if weights else ""


@cache_
def _machines() -> dict[tuple[Any, Any], str]:
    """Returns (weight, input) formats -> hardware, from every scheme file; the first of those alike."""
    found: dict[tuple[Any, Any], str] = {}
    for path in catalog.files("schemes").values():
        try:
            model = schema.validate(schema.SchemeModel, catalog.document(path))
            given = [native.to_spec(model.input)] if model.input is not None else []
            found.setdefault((_coded([native.to_spec(model.weight)]), _coded(given)), model.hardware)
        except QuarkError:  # a file of the user's; the list of schemes says what is wrong with it
            continue
    return found


def _coded(specs: list[TensorSpec]) -> tuple[Any, ...] | None:
    """Returns the facts that a kernel depends on: number format, scale format, how many values share a scale."""
    if not specs:
        return None
    spec = specs[0].codes
    return spec.element, spec.scale.dtype if spec.scale else None, spec.group_size


def _find(kind: catalog.Kind, name: str) -> dict[str, TensorSpec]:
    """Returns the specs of a cache or attention scheme, by slot."""
    return _read(kind, catalog.find(kind, name))[1]


def _specs(found: Recipe, kind: str) -> list[TensorSpec]:
    """Returns the specs that the recipe's entries give to slots of this kind."""
    entries = [entry for entry in found.entries if entry.enable and entry.cfg is not None]
    mine = [entry for entry in entries if kind in entry.quantizer_path or entry.quantizer_path.endswith("*")]
    return [to_spec(entry.cfg, weight=kind in _STORED) for entry in mine if entry.cfg is not None]


def _steps_need(found: Recipe, spec: TensorSpec) -> bool:
    """True when an algorithm of the recipe asks for statistics; asked with a plan of one weight."""
    plan = _plan({"weight": spec})
    plan.algorithms = [Step(*step) for step in found.algorithms]
    asked.advise(plan, [found.file] * len(plan.algorithms))
    listed = [(step.name, step.parameters) for step in plan.algorithms]
    return any(step.needs(plan) for step in algorithms.created(listed, found.file))


def one_linear(scheme_name: str) -> Plan:
    """Returns a plan of one large linear layer with a scheme."""
    return _plan(_find("schemes", scheme_name))


def _plan(specs: dict[str, TensorSpec]) -> Plan:
    """Returns a plan of one linear layer with these specs."""
    return _plan_of([_linear("linear", "linear", specs)], {})


def _attention_plan(specs: dict[str, TensorSpec]) -> Plan:
    """Returns a plan of one attention with these specs; its weights are not quantized."""
    slots = {kind: Decision(specs.get(kind), None) for kind in ATTENTION_KINDS}
    attention = Attention("attention", 0, "attention.k_proj", "attention.v_proj", slots)
    return _plan_of([_linear(f"attention.{role}_proj", role, {}) for role in "qkv"], {"attention": attention})


def _linear(name: str, role: str, specs: dict[str, TensorSpec]) -> Target:
    slots = {kind: Decision(specs.get(kind), None) for kind in TARGET_KINDS}
    bias = f"{name}.bias" if "bias" in specs else None
    return Target(
        name, WeightView(f"{name}.weight"), _SHAPE, "BF16", role, 0, f"{name}.input", name, None, bias, slots=slots
    )


def _plan_of(weights: list[Target], attention: dict[str, Attention]) -> Plan:
    part = Part(0, "block", "block", 0, tuple(weight.view.tensor for weight in weights))
    sites = {w.site: Site(w.site, 0, "linear", (w.name,)) for w in weights if w.site is not None}
    return Plan("", "", [], [part], {weight.name: weight for weight in weights}, attention, sites, {}, [], [])
