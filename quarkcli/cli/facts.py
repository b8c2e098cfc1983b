"""What can be said of schemes and recipes without a model: bits, whether data is needed. Torch-free."""

from __future__ import annotations

from typing import Any

from quarkcli import algorithms
from quarkcli.family import Part, WeightView
from quarkcli.plan.model import Decision, Plan, Target
from quarkcli.recipe import catalog, schema
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.attributes import native
from quarkcli.recipe.recipe import Recipe
from quarkcli.spec import TensorSpec

_SHAPE = (4096, 4096)  # of the weight for which bits are quoted; per-tensor scales vanish at this size


def scheme(name: str) -> dict[str, Any]:
    """Facts of a weight scheme. Raises ConfigError when its file is wrong."""
    model = recipes.scheme_model(name)
    weight = native.to_spec(model.weight)
    given = native.to_spec(model.input) if model.input is not None else None
    return {
        "name": name,
        "kind": "weights",
        "summary": model.summary,
        "bits": round(weight.bits_per_value(*_SHAPE), 3),
        "weight": weight.describe(),
        "input": given.describe() if given is not None else None,
        "needs_data": given is not None and given.needs_amax,
        "hardware": model.hardware,
    }


def cache(name: str) -> dict[str, Any]:
    """Facts of a KV cache scheme."""
    model = schema.validate(schema.CacheModel, catalog.document(catalog.find("kv_cache", name)))
    k, v = native.to_spec(model.k), native.to_spec(model.v)
    return {
        "name": name,
        "kind": "kv-cache",
        "summary": model.summary,
        "bits": float(k.format.bits),
        "k": k.describe(),
        "v": v.describe(),
        "needs_data": k.needs_amax or v.needs_amax,
    }


def recipe(found: Recipe) -> dict[str, Any]:
    """Facts of a recipe. `needs_data` is false when some model might still need none."""
    weights = _specs(found, "weight")
    data = any(spec.needs_amax for spec in _specs(found, "input")) or any(_steps_need(found, spec) for spec in weights)
    cached = found.kv_cache not in (None, "none")
    return {
        "name": found.name,
        "file": found.file,
        "purpose": found.description,
        "bits": sorted({round(spec.bits_per_value(*_SHAPE), 3) for spec in weights}),
        "needs_data": data or (cached and cache(str(found.kv_cache))["needs_data"]),
        "kv_cache": found.kv_cache if cached else None,
        "algorithms": [name for name, _ in found.algorithms],
        "dialect": found.dialect or "auto",
    }


def _specs(found: Recipe, kind: str) -> list[TensorSpec]:
    """Specs that the recipe's entries give to slots of this kind."""
    entries = [entry for entry in found.entries if entry.enable and entry.cfg is not None]
    mine = [entry for entry in entries if kind in entry.quantizer_path or entry.quantizer_path.endswith("*")]
    return [native.to_spec(entry.cfg) for entry in mine if entry.cfg is not None]


def _steps_need(found: Recipe, spec: TensorSpec) -> bool:
    """Whether an algorithm of the recipe asks for statistics; asked with a plan of one weight."""
    slots = {"weight": Decision(spec, None), "input": Decision(None, None)}
    view, part = WeightView("linear.weight"), Part(0, "block", "block", 0, ("linear.weight",))
    weight = Target("linear", view, _SHAPE, "BF16", "linear", 0, "linear.input", "linear", None, None, slots=slots)
    plan = Plan(found.name, "", [], [part], {"linear": weight}, {}, {}, {}, [], [])
    return any(step.needs(plan) for step in algorithms.pipeline(found.algorithms))


def yes(value: object) -> str:
    """For tables."""
    return "yes" if value else "no"
