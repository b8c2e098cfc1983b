"""Writes the model card of a checkpoint: README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quarkcli import __version__
from quarkcli.plan.model import Plan
from quarkcli.plan.online import sentences
from quarkcli.reporting import losses
from quarkcli.reporting.counts import modules_by_scheme

if TYPE_CHECKING:
    from quarkcli.dialects.base import Writer
    from quarkcli.job.options import Prepared

_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LICENCE = ("license", "license_name", "license_link")
_NO_BREAKS = 1 << 20  # the width up to which YAML keeps a text on its line


def card(prepared: Prepared, report: dict[str, Any]) -> str:
    """Returns README.md of the checkpoint: its contents, the way it was made and the way to serve it."""
    source = prepared.source
    base = source.hub_id or source.name
    calibration = report["calibration"]
    commit = f" at commit `{source.commit}`" if source.commit else ""
    front = {
        "base_model": base,
        "base_model_relation": "quantized",
        **licence(prepared.side_files.readme),
        "tags": ["quark", prepared.recipe.name, prepared.dialect.name],
    }
    lines = [
        "---",
        *yaml.safe_dump(front, sort_keys=False, allow_unicode=base.isprintable(), width=_NO_BREAKS).splitlines(),
        "---",
        "",
        f"# {source.name}, {prepared.recipe.name}",
        "",
        f"Quantized from `{base}`{commit} by quark {__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| quantized before | {text} |" for text in (report["source"] or {}).get("said", [])),
        f"| recipe | {prepared.recipe.name} |",
        f"| algorithms | {', '.join(report['algorithms'])} |",
        f"| checkpoint format | {prepared.dialect.name} ({prepared.dialect_reason}) |",
        *(f"| while it runs | {text} |" for text in sentences(prepared.plan.online)),
        f"| effective bits per quantized weight | {report['size']['effective_bits']} |",
        f"| size | {report['size']['source_bytes']:,} -> {report['size']['output_bytes']:,} bytes |",
        *(f"| {label} | {text} |" for label, text in losses.rows(report)),
        f"| calibration | {calibration['source']}, {calibration['rows']} x {calibration['seqlen']} tokens |"
        if calibration
        else "| calibration | none needed |",
        "",
        "The recipe with all its values, the report and the hashes of all files are in `quark/`.",
        "The licence of the original model applies.",
        "",
    ]
    if "vllm" in prepared.dialect.loaders(prepared.plan):
        lines += ["```", "vllm serve .", "```", ""]
    return "\n".join(map(_one_line, lines))


def licence(card: Path | None) -> dict[str, str]:
    """Returns what the front matter of a model card says of the licence; {} without one."""
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None else ""
    found = _FRONT.match(text)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        front = None
    front = front if isinstance(front, dict) else {}
    return {key: value for key in _LICENCE if isinstance(value := front.get(key), str)}


def card_of_conversion(
    facts: Mapping[str, Any], name: str, before: str, dialect: Writer, plan: Plan, card: Path | None
) -> str:
    """Returns README.md of a checkpoint that was converted.

    facts   what its manifest says of the model
    card    its own README.md
    """
    base = str(facts.get("hub_id") or facts.get("name") or name)
    front = {
        "base_model": base,
        "base_model_relation": "quantized",
        **licence(card),
        "tags": list(dict.fromkeys(["quark", dialect.name])),
    }
    schemes = (f"| {count} modules | {what.replace(' | ', '; ')} |" for what, count in modules_by_scheme(plan).items())
    lines = [
        "---",
        *yaml.safe_dump(front, sort_keys=False, allow_unicode=base.isprintable(), width=_NO_BREAKS).splitlines(),
        "---",
        "",
        f"# {name}, {dialect.name}",
        "",
        f"Quantized from `{base}`; converted from checkpoint format {before} to {dialect.name} by quark {__version__}.",
        "Codes and scales are unchanged.",
        "",
        "| | |",
        "|---|---|",
        *schemes,
        "",
        "The hashes of all files and the card of the converted checkpoint are in `quark/`.",
        "The licence of the original model applies.",
        "",
    ]
    if "vllm" in dialect.loaders(plan):
        lines += ["```", "vllm serve .", "```", ""]
    return "\n".join(map(_one_line, lines))


def _one_line(text: str) -> str:
    """Returns a name on one line.

    A name from anywhere must not end the line that it stands in, nor steer a terminal.
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)
