"""Writes the tables of docs/serving.md and docs/serving/: what holds a scheme, what loads it, who tried it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quarkcli import dialects, servers
from quarkcli.cli import listings
from quarkcli.dialects.base import Writer
from quarkcli.job import rates
from quarkcli.job import run as job
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from tests.consumers import record
from tests.consumers.record import KERNEL, RUN, Run

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "serving.md"
FOLDER = DOCS / "serving"
HARDWARE = DOCS / "hardware.md"
START, END = "<!-- matrix: make docs -->", "<!-- end of matrix -->"
SHORT = {"vllm": "vLLM", "transformers": "tf", "sglang": "SGLang", "tensorrt-llm": "TRT"}
WAYS = {"fast": "fast", "weight-only": "weights", "emulated": "emul."}
STAGES = {"classes": "the config", "kernels": "the tensors", "forward": "the tensors, and preparing them"}
SIMULATED = "run, with products in torch for kernels that the build lacks"


class Notes:
    """Letters for kinds of runs; the legend tells what they are."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = {run.key: run for run in runs}
        kinds = dict.fromkeys(kind(run) for run in self.runs.values() if run.model == "demo" and not run.cache)
        self.letters = {text: chr(ord("a") + index) for index, text in enumerate(sorted(kinds))}

    def of(self, server: str, scheme: str, dialect: str) -> str:
        run = self.runs.get((server, "demo", scheme, dialect, ""))
        return "" if run is None else f"<sup>{self.letters[kind(run)]}</sup>"


def kind(run: Run) -> str:
    outcome = SIMULATED if run.outcome == RUN and run.standins else record.OUTCOMES[run.outcome]
    return f"{SHORT[run.consumer]}: {outcome}; {run.date}, {run.version}"


def cell(writer: Writer, plan: Plan, chosen: str, scheme: str, notes: Notes) -> str:
    if writer.refusals(plan):
        return "-"
    written = servers.planned(plan, writer)
    loading = [name for name in SHORT if not servers.server(name).refusals(written)]
    words = " ".join(SHORT[name] + notes.of(name, scheme, writer.name) for name in loading) or "held"
    return f"**{words}**" if writer.name == chosen else words


def matrix(notes: Notes) -> Iterator[str]:
    """The embedded model in every scheme; bold is what `--dialect auto` takes."""
    writers = dialects.writers()
    yield "| scheme | " + " | ".join(f"`{writer.name}`" for writer in writers) + " |"
    yield "|---" * (len(writers) + 1) + "|"
    for scheme in sorted(catalog.files("schemes")):
        prepared = job.prepare(job.Options(model="demo", scheme=scheme, device="cpu", calib_data="builtin"))
        cells = (cell(writer, prepared.plan, prepared.dialect.name, scheme, notes) for writer in writers)
        yield f"| `{scheme}` | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"- {letter}: {text}" for text, letter in notes.letters.items())
    yield "- no letter: by rule, not tried"


def table(runs: Iterable[Run]) -> Iterator[str]:
    """Every run of one consumer that has a score."""
    yield "| model | scheme | dialect | cache | quark | here | outcome |"
    yield "|---|---|---|---|---|---|---|"
    for run in runs:
        if run.theirs is not None:
            words = [record.OUTCOMES[run.outcome] if run.outcome != RUN else RUN, run.reason, *run.standins]
            names = f"{run.model} | `{run.scheme}` | `{run.dialect}` | {run.cache or '-'}"
            yield f"| {names} | {run.ours:.4f} | {run.theirs:.4f} | {'; '.join(filter(None, words))} |"


def stopped(runs: Iterable[Run]) -> Iterator[str]:
    """Those that lacked a kernel, by what they lacked."""
    found: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
    for run in runs:
        if run.theirs is None:
            dialects_ = found.setdefault((run.reason.replace("|", "\\|"), STAGES.get(run.stage, run.stage)), {})
            dialects_.setdefault(run.dialect, {}).setdefault(run.scheme, []).append(run.model)
    if found:
        yield from ("", f"{record.OUTCOMES[KERNEL].capitalize()}:", "")
        yield from ("| what stopped it | what went before | checkpoints |", "|---|---|---|")
    for (reason, stage), dialects_ in sorted(found.items()):
        texts = []
        for dialect, schemes in dialects_.items():
            models = dict.fromkeys(model for some in schemes.values() for model in some)
            texts.append(f"`{dialect}`: {', '.join(schemes)} ({', '.join(models)})")
        yield f"| {reason} | {stage} | {'; '.join(texts)} |"


def hardware() -> Iterator[str]:
    """Server -> how it runs every scheme on every generation of GPUs, and where its source says so."""
    schemes = {name: listings.of_file("schemes", path) or {} for name, path in catalog.files("schemes").items()}
    for server in (one for one in servers.servers() if any(row.weights or row.fast for row in one.kernels)):
        yield from (f"## {server.title}", "", f"From {server.kernels_from}.", "")
        yield "| scheme | " + " | ".join(rates.generations()) + " | dialects |"
        yield "|---" * (len(rates.generations()) + 2) + "|"
        for name in sorted(schemes):
            facts = schemes[name]["servers"].get(server.name)
            if facts is not None:
                runs = " | ".join(_run(facts, one) for one in rates.generations())
                yield f"| `{name}` | {runs} | {', '.join(facts['dialects'])} |"
        yield from ("", "Read in:", "")
        yield from dict.fromkeys(f"- `{row.weight}`, `{row.read}`: {row.read_in}" for row in server.kernels)
        rules = {
            writer.name: writer.classes[server.name] for writer in dialects.writers() if server.name in writer.classes
        }
        yield from (f"- dialect `{name}`: {rule.read_in}" for name, rule in rules.items())
        yield ""


def _run(facts: Mapping[str, Any], generation: str) -> str:
    way = facts["gpus"].get(generation)
    less = facts["not_in"].get(generation)
    return "-" if way is None else WAYS[way] + (f" (not {', '.join(less)})" if less else "")


def pages() -> Mapping[Path, list[str]]:
    """Page -> the lines of its generated part."""
    runs = record.read()
    found = {PAGE: list(matrix(Notes(runs))), HARDWARE: list(hardware())}
    for consumer in sorted({run.consumer for run in runs}):
        mine = [run for run in runs if run.consumer == consumer]
        dates, versions = ({getattr(run, name) for run in mine} for name in ("date", "version"))
        head = f"{', '.join(sorted(versions))}; {', '.join(sorted(dates))}; {len(mine)} checkpoints."
        found[FOLDER / f"{consumer}.md"] = [head, "", *table(mine), *stopped(mine)]
    return found


def cells() -> dict[tuple[str, str], str]:
    """(scheme, dialect) -> what the matrix of the page says, which the tests hold to the writers."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(("| scheme |", "| `"))]
    head, *rest = ([part.strip(" `") for part in row.strip("|").split("|")] for row in rows if row.count("|") > 4)
    return {(row[0], dialect): text for row in rest for dialect, text in zip(head[1:], row[1:], strict=True)}


def page(old: str, lines: Iterable[str]) -> str:
    """The page with its generated part replaced."""
    before, _, rest = old.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}"


if __name__ == "__main__":
    for path, lines in pages().items():
        path.write_text(page(path.read_text(encoding="utf-8"), lines), encoding="utf-8")
