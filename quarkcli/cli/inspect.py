"""`quark inspect`: shows a model directory or hub id, from config and headers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Debug, Json, Offline, Pickle, Revision

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

    Prints its architecture, its blocks and experts, the kinds of its tensors, and how it is quantized if it is. Reads
    only the config and the headers of the weight files.
    """
    output.start(json=json, debug=debug)
    from quarkcli.api import checkpoints

    found = checkpoints.inspect(
        model, revision=revision, offline=offline, allow_pickle=allow_pickle, listener=output.tell
    )
    if json:
        output.json_data(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    inferred = " (roles guessed from tensor names)" if found["inferred"] else ""
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
        rows.append(("other", f"{len(found['other_tensors'])} tensors that quark does not know, kept as they are"))
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
        return f"{found['method']}, which quark cannot read"
    modules = "; ".join(f"{count} x {what}" for what, count in found["modules"].items())
    caches = f"; {found['caches']} caches" if found["caches"] else ""
    online = "".join(f"; {text}" for text in sentences(found["online"]))
    return f"{found['dialect']}: {modules}{caches}{online}"
