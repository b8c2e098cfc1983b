"""Lines of plans and reports that pages show, and losses that they repeat, are those of code and measurements."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any, cast

from quarkcli.cli import planview, summary
from quarkcli.disk.origin import Origin
from quarkcli.job.options import Download
from tests.docs import listings, readme
from tests.docs.commands import ROOT


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_what_a_plan_says_of_a_quantized_source() -> None:
    origin = Origin("fp8", {"a": "fp8_e4m3 tile 128x128"}, 2, "BF16", {"a": False}, 0)
    target = SimpleNamespace(weight="some spec", input=None)
    said = origin.lines(cast(Any, SimpleNamespace(targets={"a": target}, carried={"a": None})))
    block = re.search(r"^source {6}.*?(?=^```)", page("sources.md"), re.DOTALL | re.MULTILINE)
    assert block and readme.masked(block[0]) == readme.masked("source " + "\n".join(said))


def test_what_a_report_says_of_values_that_were_kept() -> None:
    ((label, text),) = summary._exact(dict.fromkeys(map(str, range(28)), 0))
    assert f"{label:12}{text}\n" in page("sources.md")


def test_what_a_plan_says_of_a_download() -> None:
    found = Download(files=3, bytes=2_500_000, at_once=1_710_000, kept="")
    ((label, text),) = planview.download(cast(Any, SimpleNamespace(download=found)))
    assert f"{label:12}{text}\n" in page("hub.md")


def test_the_losses_on_the_page_of_schemes_are_the_best_that_were_measured() -> None:
    measured = json.loads(listings.losses())["schemes"]
    rows = re.findall(r"^\| `(\w+)` \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \| (.*) \|$", page("choosing.md"), re.MULTILINE)
    assert len(rows) > 4
    for scheme, nearest, best, how in rows:
        lines = [line for line in measured[scheme] if line["model"] == listings.MODELS["smollm2"]]
        shown = [f"{kl:.3f}" for kl in (lines[0]["kl"], min(line["kl"] for line in lines))]
        assert [nearest, best] == shown, scheme
        steps = min(lines, key=lambda line: line["kl"])["steps"]
        named = re.findall(r"[a-z]+", steps.replace("rtn", ""))
        assert all(word in how for word in named), (scheme, steps)
