"""`quark inspect`: shows a model directory or hub id, from config and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Debug, Json, Offline, Pickle, Revision

if TYPE_CHECKING:
    from quarkcli.disk.checkpoint import Checkpoint
    from quarkcli.disk.source import Source
    from quarkcli.family import HeaderLike, Layout

SCHEMA = "quark/inspect/1"
EXAMPLES = apps.examples("quark inspect demo", "quark inspect out/demo-mxfp4 --json")


def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo'.")],
    revision: Revision = "main",
    offline: Offline = False,
    allow_pickle: Pickle = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model holds.

    Architecture, parts, roles, dtypes, experts, and whether and how it is already quantized; reads config and headers.
    """
    output.start(json=json, debug=debug)
    from quarkcli.disk.source import Source
    from quarkcli.job import idle
    from quarkcli.job import run as job

    source = Source.open(
        job.located(model), revision=revision, offline=offline, bare=True, allow_pickle=allow_pickle, tell=output.tell
    )
    found = _facts(source)
    for line in idle.of_model(source, revision=revision, allow_pickle=allow_pickle):
        output.note(f"warning: {line}")
    if json:
        output.json_data({"schema": SCHEMA, **found})
    else:
        _show(found)


def _facts(source: Source) -> dict[str, Any]:
    from quarkcli import family

    checkpoint = _checkpoint(source)
    headers: Mapping[str, HeaderLike] = checkpoint.headers if checkpoint is not None else source.headers
    layout = family.lay_out(*family.for_checkpoint(source.config, headers), source.config, headers)
    return {
        "name": source.name,
        "path": source.hub_id or str(source.folder),
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


def _checkpoint(source: Source) -> Checkpoint | None:
    """Returns the checkpoint in source form, where it is quantized in a way that is read here."""
    from quarkcli import dialects, family

    config = family.quantization(source.config)
    if not config:
        return None
    from quarkcli.disk.checkpoint import Checkpoint

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
    from quarkcli import family

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
    from quarkcli.disk.origin import open_weights
    from quarkcli.errors import ModelError

    try:
        origin = open_weights(source)[1]
    except ModelError as error:
        return f"none that a job can read: {error}"
    assert origin is not None
    return f"{origin.stored()}, dequantized while streaming"


def _show(found: dict[str, Any]) -> None:
    inferred = " (roles inferred from names)" if found["inferred"] else ""
    kinds = Counter(part["kind"] for part in found["parts"])
    rows = [
        ("model", found["path"] + (f" at {found['commit']}" if found["commit"] else "")),
        ("architecture", ", ".join(found["architectures"] or ["unknown"])),
        ("family", f"{found['family']}{inferred}"),
        ("parameters", f"{found['parameters']:,}"),
        ("size", f"{output.size(found['bytes'])} in {found['files']} files"),
        ("parts", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("weights", ", ".join(f"{count} {role}" for role, count in found["roles"].items())),
        ("experts", _experts_text(found["experts"])),
        ("tied head", found["tied_head"] or "no"),
        ("quantized", _quantized_text(found["quantization"])),
    ]
    if found["quantization"] and found["quantization"]["source"]:
        rows.append(("source", found["quantization"]["source"]))
    if found["other_tensors"]:
        rows.append(("other", f"{len(found['other_tensors'])} tensors outside the family, kept as they are"))
    for label, text in rows:
        output.data(f"{label:<14}{text}")
    output.data("")
    dtypes = [(dtype, row["tensors"], output.size(row["bytes"])) for dtype, row in found["dtypes"].items()]
    output.table(("DTYPE", "TENSORS", "SIZE"), dtypes)


def _experts_text(experts: dict[str, Any] | None) -> str:
    if experts is None:
        return "none"
    stored = "fused in one tensor" if experts["fused"] else "one by one"
    return f"{experts['per_layer']} in each of {experts['layers']} layers, stored {stored}"


def _quantized_text(found: dict[str, Any] | None) -> str:
    from quarkcli.plan.online import sentences

    if found is None:
        return "no"
    if found["dialect"] is None:
        return f"{found['method']}, which is not read here"
    modules = "; ".join(f"{count} x {what}" for what, count in found["modules"].items())
    caches = f"; {found['caches']} caches" if found["caches"] else ""
    online = "".join(f"; {text}" for text in sentences(found["online"]))
    return f"{found['dialect']}: {modules}{caches}{online}"
