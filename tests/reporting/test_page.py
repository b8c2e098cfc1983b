"""report.html: a page that says what report.json says, whole without a script or a network."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from quarkcli.cli import main
from quarkcli.reporting.page import compared, page, scale
from quarkcli.reporting.page.elements import document, element
from tests.cli.conftest import quark  # noqa: F401
from tests.reporting.conftest import report_of

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Tree(HTMLParser):
    """Checks that tags close, and keeps tags, texts and attributes. `svg`: their sources."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.svg = [ET.fromstring(one) for one in re.findall(r"<svg .*?</svg>", text, re.DOTALL)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def tips(self, start: str) -> list[str]:
        """Titles inside the drawings that begin so."""
        found = (title.text or "" for drawing in self.svg for title in drawing.iter("title"))
        return [text for text in found if text.startswith(start)]


def headings(tree: Tree, text: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", text)


@pytest.mark.parametrize("name", ["moe", "plain"])
def test_it_loads_and_runs_nothing(name: str, request: pytest.FixtureRequest) -> None:
    text = (request.getfixturevalue(name) / "quark" / "report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tree.tags}
    assert not [key for _, attrs in tree.tags for key in attrs if key.startswith("on") or key in ("src", "href")]
    assert "url(" not in text and "@import" not in text
    policy = [attrs["content"] for _, attrs in tree.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_it_says_what_the_report_says(moe: Path) -> None:
    report, text = report_of(moe), (moe / "quark" / "report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert headings(tree, text) == [
        *([f"Warnings ({len(report['warnings'])})"] if report["warnings"] else []),
        "Output error by layer and projection", "Output error of each block", "Drift over the blocks", "Worst tokens",
        "Bytes and bits by role", "Kept in source precision", "Rules that decided", "Outliers of activations",
        "Tokens per expert", "Time by phase", "Time by part", "Memory by part",
    ]  # fmt: skip
    cells = {tuple(row) for row in tree.rows}
    for row in report["tensors"]:
        if row["output_error"] is not None:
            numbers = (scale.short(row["output_error"]), scale.short(row["bits"]), scale.size(row["bytes"]))
            assert (row["name"], *numbers, row["format"]) in cells
    own = [row for row in report["tensors"] if ".experts." in row["name"] and row["name"].endswith("gate_proj")]
    mean = sum(row["output_error"] for row in own if row["layer"] == 1) / 4
    assert tree.tips("mlp.experts.*.gate_proj, layer 1: ") == [f"mlp.experts.*.gate_proj, layer 1: {scale.short(mean)}"]
    for row in report["sites"]:
        assert (row["name"], scale.short(row["outlier_ratio"]), scale.short(row["absmax"])) in {c[:3] for c in cells}
    for layer, counts in enumerate(report["experts"]["calibration_tokens"].values()):
        for expert, count in counts.items():
            assert f"{layer}, expert {expert}: {count:,}" in tree.tips(f"{layer}, expert")
    for layer, value in enumerate(report["evaluation"]["drift"]):
        assert (str(layer), scale.short(value)) in cells
    for token in report["evaluation"]["worst_tokens"]:
        assert any(row[0] == scale.short(token["kl"]) for row in tree.rows if row)
    for phase in report["run"]["phases"]:
        assert (phase["name"], f"{phase['seconds']:.3f}") in cells
    whole = "".join(tree.texts)
    for said in (f"{report['evaluation']['top1_agreement']:.1%}", scale.size(report["size"]["output_bytes"])):
        assert said in whole


def test_every_chart_has_a_title_a_unit_and_numbers_behind_it(moe: Path) -> None:
    text = (moe / "quark" / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) == 12
    for figure in figures:
        assert re.search(r"<h3>[^<]+</h3><p class=\"unit\">[^<]+</p>", figure)
        assert "<table>" in figure and ("<svg" not in figure or "<details>" in figure)


def test_nothing_that_a_model_names_is_markup(moe: Path) -> None:
    evil = "<script>alert(1)</script>\"&'\x00\x1b[31m\u202e\ud800"
    report = json.loads(json.dumps(report_of(moe)))

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poison(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        return value + evil if isinstance(value, str) and key not in ("fate",) else value

    bad = poison(report)
    bad["experts"]["calibration_tokens"] = {
        f"{name}{evil}": counts for name, counts in report["experts"]["calibration_tokens"].items()
    }
    bad["warnings"], bad["skipped"] = [evil], {evil: evil}
    for text in (page(bad), compared.page(comparison(evil), bad, bad)):
        assert "<script" not in text and "\x00" not in text and "\x1b" not in text and "\u202e" not in text
        assert "&lt;script&gt;" in text
        text.encode("utf-8")
        Tree(text)


def comparison(name: str) -> dict[str, Any]:
    row = {"a": name, "b": name, "equal_values": False, "equal_bit_for_bit": False, "equal_codes": False}
    return {
        "a": name, "b": name, "reference": "a", "identical": False, "compared": 1, "equal_bit_for_bit": 0,
        "equal_codes": 0, "sqnr_db": 20.0, "only_in_a": [name], "only_in_b": [],
        "shapes_differ": {name: {"a": [1], "b": [2]}}, "scales_differ": {name: {"a": 1.0, "b": None}}, "turned": [],
        "tensors": [{**row, "name": f"layers.0.{name}", "sqnr_db": 20.0, "largest_difference": 0.5}],
    }  # fmt: skip


def test_a_large_model_has_no_large_page(moe: Path) -> None:
    """94 layers of 128 experts: the page is grouped, says so, and stays below a megabyte."""
    report = copy.deepcopy(report_of(moe))
    (one, *_) = [row for row in report["tensors"] if row["expert"] == 0 and row["layer"] == 0]
    stem, _, leaf = one["name"].partition(".0.mlp.experts.0.")
    report["tensors"] = [
        {**one, "name": f"{stem}.{layer}.mlp.experts.{expert}.{leaf}", "part": f"{stem}.{layer}", "layer": layer,
         "expert": expert, "output_error": 0.01 + layer / 1000 + expert / 10000}
        for layer in range(94) for expert in range(128)
    ]  # fmt: skip
    counts = {str(expert): 1000 + expert for expert in range(128)}
    report["experts"]["calibration_tokens"] = {f"{stem}.{layer}.mlp.experts": counts for layer in range(94)}
    part = next(row for row in report["parts"] if row["layer"] == 0)
    report["parts"] = [{**part, "name": f"{stem}.{layer}", "layer": layer} for layer in range(94)]
    text = page(report)
    assert len(text) < 1_000_000
    tree = Tree(text)
    assert "A cell stands for 3 x 3 (layers x experts) and shows the fewest tokens among them." in "".join(tree.texts)
    assert len(tree.tips("0–2, expert ")) == 43 and tree.tips("0–2, expert 3–5") == ["0–2, expert 3–5: 1,003"]
    assert "11,972 more rows are in report.json." in "".join(tree.texts)
    assert len(tree.tips("mlp.experts.*.")) == 94


def test_a_page_of_a_run_under_way(plain: Path) -> None:
    report = report_of(plain)
    begun = report | {"state": {"finished": False, "parts": 0, "of": 6}, "checks": [], "warnings": ["careful"]}
    begun["parts"] = [{**row, "done": False, "seconds": None} for row in report["parts"]]
    begun["tensors"] = [{**row, "error": None} for row in report["tensors"]]
    begun["loss"] = report["loss"] | {"weight_errors": {}}
    text = "".join(Tree(page(begun)).texts)
    assert "This run has not finished: 0 of 6 parts of the model are done." in text
    assert "careful" in text and "as planned" in text and "Time by part" not in text


def test_the_command_writes_it(quark, moe: Path, plain: Path) -> None:  # noqa: F811
    answer = quark("report", str(plain), "--html")
    assert (answer.code, answer.out, Path("out.html").read_text(encoding="utf-8")) == (
        0, "out.html\n", (plain / "quark" / "report.html").read_text(encoding="utf-8"),
    )  # fmt: skip
    assert quark("report", str(moe), "--html", "a.html").out == "a.html\n"
    assert quark("report", str(moe), "a.html").code == 2
    assert quark("report", str(moe), "--html", "--json").code == 2
    assert quark("report", str(moe), "--html", "no/such/a.html").code == 2
    for where in ("out.html", "a.html"):
        Tree(Path(where).read_text(encoding="utf-8"))


def test_two_side_by_side(quark, plain: Path) -> None:  # noqa: F811
    assert quark("compare", "demo", str(plain), "--html", "c.html").code == 0
    found = json.loads(quark("compare", "demo", str(plain), "--json").out)
    text = Path("c.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert "The two runs" in text and f"{found['sqnr_db']:.2f} dB" in "".join(tree.texts)
    row = next(row for row in found["tensors"] if ".1.mlp.up_proj" in row["name"])
    distance = 10 ** (-row["sqnr_db"] / 20)
    assert tree.tips("mlp.up_proj, layer 1") == [f"mlp.up_proj, layer 1: {scale.short(distance)}"]
    report = report_of(plain)
    both = compared.page({**found, "a": "one", "b": "two"}, report, report)
    titles = headings(Tree(both), both)
    assert "A: weight error" in titles and "B: weight error" in titles and "Bytes by role" in titles
    assert main.main(["compare", str(plain), str(plain), "--html", "d.html", "-q"]) == 0
    assert "equal" in Path("d.html").read_text(encoding="utf-8")


def test_colours_and_ticks() -> None:
    even = scale.Colours([1.0, 2.0, 3.0])
    assert [even.step(value) for value in (1.0, 2.0, 3.0)] == [0, 5, 9] and not even.logarithmic
    wide = scale.Colours([0.001, 1.0])
    assert wide.logarithmic and wide.step(0.0316) == 4 and wide.bounds()[-1] == pytest.approx(1.0)
    assert scale.Colours([]).step(1.0) == scale.Colours([2.0, 2.0]).step(2.0) == 5
    for top in (0.07, 0.1, 1.0, 3.3, 87.0, 1.2e9):
        ticks = scale.nice(top)
        assert ticks[0] == 0 and ticks[-1] >= top and ticks[-1] <= 2 * top and 3 <= len(ticks) <= 5
    assert scale.ticks([str(at) for at in range(94)]) == list(range(0, 94, 16))
    assert [scale.seconds(value) for value in (0.0012, 5.5, 65, 7300)] == [
        "1.2 ms",
        "5.5 s",
        "1 min 05 s",
        "2 h 01 min",
    ]


def test_texts_are_escaped_when_written() -> None:
    text = document("<t>", "p { color: red }", element("p", "a<b", element("i", "&"), "c>d", title='"<'))
    assert '<p title="&quot;&lt;">a&lt;b<i>&amp;</i>c&gt;d</p>' in text and "<title>&lt;t&gt;</title>" in text
