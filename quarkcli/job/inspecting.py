"""Describes a model from config and headers: its parts, roles, dtypes, experts and quantization."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from quarkcli import dialects, family
from quarkcli.disk import embedded
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.origin import open_weights
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike, Layout

SCHEMA = "quark/inspect/1"


def facts(source: Source) -> dict[str, Any]:
    """Returns what `quark inspect --json` shows."""
    checkpoint = _checkpoint(source)
    headers: Mapping[str, HeaderLike] = checkpoint.headers if checkpoint is not None else source.headers
    layout = family.lay_out(*family.for_checkpoint(source.config, headers), source.config, headers)
    return {
        "schema": SCHEMA,
        "name": source.name,
        "path": embedded.place(source),
        "commit": source.commit,
        "architectures": source.config.get("architectures"),
        "model_type": source.config.get("model_type"),
        "family": layout.family,
        "inferred": layout.inferred,
        "parameters": sum(math.prod(header.shape) for header in headers.values()),
        "bytes": sum(source.files.values()),
        "files": len(source.files),
        "dtypes": _dtypes(source),
        "parts": [{"name": p.name, "kind": p.kind, "tensors": len(p.tensors)} for p in layout.parts],
        "roles": dict(Counter(weight.role for weight in layout.weights.values())),
        "experts": _experts(layout),
        "other_tensors": sorted(name for name, role in layout.tensor_roles.items() if role == "other"),
        "tied_head": layout.tied_head,
        "quantization": _quantization(source, checkpoint),
    }


def codes(source: Source) -> str:
    """Returns what is wrong with a model that holds codes, where config.json does not say so; "" for any other."""
    try:
        family.check_codes(source.headers)
    except ModelError as error:
        return f"it {error.what}"
    return ""


def _checkpoint(source: Source) -> Checkpoint | None:
    """Returns the checkpoint in source form, where it is quantized in a way that is read here."""
    config = family.quantization(source.config)
    if not config:
        return None
    if not dialects.matching(config, source.headers):
        return None
    return Checkpoint(source)


def _dtypes(source: Source) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for header in source.headers.values():
        row = found.setdefault(header.dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += header.nbytes
    return found


def _experts(layout: Layout) -> dict[str, Any] | None:
    experts = [weight for weight in layout.weights.values() if weight.expert is not None]
    per_layer = Counter(prefix for prefix, _ in {weight.expert for weight in experts if weight.expert is not None})
    if not experts:
        return None
    fused = any(weight.view.expert is not None for weight in experts)
    return {"layers": len(per_layer), "per_layer": max(per_layer.values()), "fused": fused}


def _quantization(source: Source, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    config = family.quantization(source.config)
    if not config:
        return None
    method = config.get("quant_method", "unknown")
    if checkpoint is None or checkpoint.reader is None:
        return {"method": method, "dialect": None, "modules": {}, "caches": 0, "online": {}, "source": None}
    specs = Counter(
        f"weights {stored.weight.describe()} | inputs {stored.input.describe() if stored.input else 'unquantized'}"
        for stored in checkpoint.view.targets.values()
    )
    caches = len(checkpoint.view.attention)
    online = checkpoint.view.online
    return {
        "method": method,
        "dialect": checkpoint.reader.name,
        "modules": dict(specs),
        "caches": caches,
        "online": online,
        "source": _as_source(source),
    }


def _as_source(source: Source) -> str:
    """Returns how a job would read it, or why none can."""
    try:
        origin = open_weights(source)[1]
    except ModelError as error:
        return f"none that quark can read: {error}"
    assert origin is not None
    return f"{origin.stored()}, decoded layer by layer"
