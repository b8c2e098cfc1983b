"""Writes report.html: one page that shows a run, or two side by side. It needs no script, no font, no network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quarkcli.reporting.page import figures, scale
from quarkcli.reporting.page.elements import Element, document, element

STYLE = Path(__file__).resolve().parents[2] / "assets" / "report.css"
Report = Mapping[str, Any]

_LOSS = (figures.errors, figures.blocks, figures.drift, figures.worst_tokens)
_DATA = (figures.outliers, figures.experts)
_SIZE = (figures.roles, figures.kept, figures.rules)
_COST = (figures.phases, figures.part_times, figures.part_memory)


def page(report: Report) -> str:
    """Returns the page of a run."""
    title = f"{report['model']['name']}, {report['recipe']['name']}"
    return document(
        title,
        style(),
        element("header", heading(report), lead(report)),
        element("dl", *tiles(report), class_="tiles"),
        *(noted(report)),
        *(section(name, [one(report) for one in own]) for name, own in _SECTIONS.items()),
        element("h2", "About this run"),
        about(report),
        element("footer", f"Written by quark {report['quark_version']}. The numbers are those of report.json."),
    )


_SECTIONS = {"Loss of accuracy": _LOSS, "Sizes": _SIZE, "Calibration": _DATA, "Time and memory": _COST}


def style() -> str:
    """Returns the style sheet."""
    return STYLE.read_text(encoding="utf-8")


def section(title: str, found: list[Element | None]) -> Element | None:
    """Returns a heading with its charts; None where there are none."""
    own = [one for one in found if one is not None]
    if not own:
        return None
    narrow = [one for one in own if one.get("class") != "wide"]
    if len(narrow) % 2:
        narrow[-1].set("class", "wide")
    return element("section", element("h2", title), element("div", *own, class_="grid"))


def heading(report: Report) -> Element:
    """Returns the name of the model and what became of it."""
    return element("h1", report["model"]["name"], " ", element("small", f"→ {report['recipe']['name']}"))


def lead(report: Report) -> Element:
    """Returns what was done, in a line."""
    steps = ", ".join(report["algorithms"]) or "no algorithm"
    data = report["calibration"]
    rows = f"{data['rows']:,} rows of {data['seqlen']:,} tokens from {data['source']}" if data else "no data"
    day, _, time = report["run"]["started"].partition("T")
    return element("p", f"{report['dialect']['name']}; {steps}; {rows}; {day} {time}", class_="lead")


def tiles(report: Report) -> list[Element]:
    """Returns the figures that count."""
    size, state, found = report["size"], report["state"], list[Element]()
    after = size["output_bytes"] if state["finished"] else size["planned_bytes"]
    share = f"{after / size['source_bytes']:.0%} of the original, " if size["source_bytes"] else ""
    planned = "" if state["finished"] else ", as planned"
    more = f"{share}{size['effective_bits']:.3g} bits per quantized weight{planned}"
    found.append(_tile("Size", f"{scale.size(size['source_bytes'])} → {scale.size(after)}", more))
    scores = report["evaluation"]
    if scores:
        agreed = f"nats per token (0: no loss); same top token for {scores['top1_agreement']:.1%}"
        found.append(_tile("KL divergence", scale.short(scores["kl"]), agreed))
        before, now = scale.short(scores["baseline_perplexity"]), scale.short(scores["perplexity"])
        found.append(_tile("Perplexity", f"{before} → {now}", f"{scores['perplexity_increase']:+.2%}"))
    found.append(_error(report["loss"]))
    count = report["threads"] if report["device"] == "cpu" else None
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    found.append(_tile("Time", scale.seconds(report["seconds"]), f"on {report['device']}{threads}"))
    gpu = f"GPU {scale.size(report['peak_gpu_bytes'])}" if report["peak_gpu_bytes"] else "of this process"
    found.append(_tile("Peak memory", scale.size(report["peak_rss_bytes"]), gpu))
    return found


def _error(loss: Mapping[str, Any]) -> Element:
    errors, name = loss["output_errors"], "Output error of blocks"
    if not errors:
        errors, name = loss["weight_errors"], "Weight error"
    if not errors:
        return _tile(name, "–", "nothing is quantized yet")
    worst = max(errors, key=lambda key: errors[key])
    mean = sum(errors.values()) / len(errors)
    return _tile(name, scale.short(mean), f"on average; worst {scale.short(errors[worst])} in {worst}")


def _tile(name: str, value: str, more: str) -> Element:
    return element(
        "div", element("dt", name), element("dd", value, class_="value"), element("dd", more, class_="more"),
        class_="tile",
    )  # fmt: skip


def noted(report: Report) -> list[Element]:
    """Returns boxes: that a run has not finished, warnings, where algorithms fell back."""
    state, found = report["state"], list[Element]()
    if not state["finished"]:
        text = f"This run has not finished: {state['parts']} of {state['of']} parts of the model are done."
        found.append(element("div", element("h3", text), class_="notes warn"))
    warnings, fallbacks = report["warnings"], _fallbacks(report)
    if warnings:
        found.append(_box("Warnings", warnings, "notes warn"))
    if fallbacks:
        found.append(_box("Fallbacks", fallbacks, "notes warn"))
    if not warnings and not fallbacks:
        found.append(element("div", element("p", "No warnings, no fallbacks."), class_="notes"))
    return found


def _box(title: str, texts: list[str], class_: str, most: int = 20) -> Element:
    more = [f"and {len(texts) - most:,} more, in report.json"] if len(texts) > most else []
    items = (element("li", text) for text in [*texts[:most], *more])
    return element("div", element("h3", f"{title} ({len(texts):,})"), element("ul", *items), class_=class_)


def _fallbacks(report: Report) -> list[str]:
    """Returns where something else was done than an algorithm would have done."""
    found = [f"{name}: {why}" for name, why in report["skipped"].items()]
    for solver, row in report["outcomes"]["solvers"].items():
        found += [f"{name}: rounded to nearest, because that loses less than {solver}" for name in row["nearest"]]
    dead = report["dead_inputs"]
    found += [f"{name}: {count:,} inputs were always zero in calibration" for name, count in dead["weights"].items()]
    return found + [f"{name}: always zero in calibration" for name in dead["activations"]]


def about(report: Report) -> Element:
    """Returns the circumstances."""
    run, model = report["run"], report["model"]
    host = run["host"]
    machine = f"{host['name']}, {host['system']}, {host['cores']} cores, {scale.size(host['memory_bytes'])}"
    many = f"; {host['ranks']} processes together" if host["ranks"] > 1 else ""
    rows: list[tuple[str, str | Element]] = [
        ("Model", model["path"] + (f" at commit {model['commit']}" if model["commit"] else "")),
        ("Family", model["family"]),
        ("Dialect", f"{report['dialect']['name']} ({report['dialect']['reason']})"),
        ("Command", element("code", shlex.join(run["command"])) if run["command"] else "from Python"),
        ("Started, ended", f"{run['started']}, {run['ended']}"),
        ("Machine", machine + many),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        *(("Checked", text) for text in report["checks"]),
    ]
    pairs = (item for name, value in rows for item in (element("dt", name), element("dd", value)))
    return element("div", element("dl", *pairs), class_="facts")
