"""The loss table says what `quark eval` says, keeps its rows, and writes them into a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from tests import runs
from tests.bench import page, table
from tests.bench.compositions import INPUTS, compositions, members, parsed

NUMBERS = {"kl": "kl", "perplexity": "perplexity", "source_perplexity": "baseline_perplexity", "top1": "top1_agreement"}


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs.build("llama", tmp_path / "llama")
    text = str(runs.text_file(tmp_path / "text.txt", 8_000))
    other = tmp_path / "other.txt"
    other.write_text(runs.topics(0, 4)[:4000])
    results = tmp_path / "losses.json"
    words = [
        str(source), "--calib", text, "--text", text, "--tokens", "512", "--other", str(other), "--other-tokens", "300",
        "--window", "64", "--samples", "8", "--seqlen", "64", "--schemes", "int4_wo_128,nvfp4",
        "--rows", f" (rtn|{INPUTS}|gptq(:signed=on)?) seed", "--results", str(results),
        "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    table.main(words)
    assert "llama int4_wo_128 gptq seed 1 KL in domain" in capsys.readouterr().out
    found = json.loads(results.read_text())
    for scheme in ("int4_wo_128", "nvfp4"):
        made = runs.run(
            source, tmp_path / scheme, scheme=scheme, **runs.data(Path(text), 8, 64), seed=1, allow_short=True
        )
        mine = found[f"llama {scheme} rtn seed 1"]
        assert mine["bits"] == made.report["size"]["effective_bits"]
        for name, file, tokens in ((table.IN, text, 512), (table.OUT, str(other), 300)):
            judge = evaluate(
                str(made.folder), baseline=str(source), text=file, window=64, max_tokens=tokens, tell=silent
            )
            assert mine["losses"][name] == pytest.approx({ours: judge[his] for ours, his in NUMBERS.items()}, rel=1e-6)
    weights = evaluate(
        str(tmp_path / "nvfp4"),
        baseline=str(source),
        text=text,
        window=64,
        max_tokens=512,
        weights_only=True,
        tell=silent,
    )
    alone, both = (found[f"llama nvfp4 {steps} seed 1"]["losses"][table.IN]["kl"] for steps in (INPUTS, "rtn"))
    assert sum("signed=on" in key for key in found) == 1
    assert 0 < alone < both < 2 * (alone + weights["kl"])

    before = results.read_text()
    table.main(words)
    assert (results.read_text(), capsys.readouterr().out) == (before, "")

    written = tmp_path / "page.md"
    written.write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    table.main(["--results", str(results), "--page", str(written)])
    lines = written.read_text().splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("above", "below", False)
    share = found["llama nvfp4 gptq seed 1"]["losses"][table.IN]["kl"] / both
    assert any(line.startswith("| nvfp4 + gptq |") and f"| {share:.3f} |" in line for line in lines)


def test_compositions_come_from_the_registry() -> None:
    assert parsed("awq+gptq:signed=on:damp=0.05") == [("awq", {}), ("gptq", {"signed": "on", "damp": 0.05})]
    for inputs in (False, True):
        rows = compositions(integers=False, inputs=inputs)
        assert set(members()) <= set(rows)
        assert all(name in members() for row in rows if row != INPUTS for name, _ in parsed(row))
        assert (INPUTS in rows) == inputs
    rows = compositions(integers=True, inputs=False)
    assert [row for row in rows if "gptq" in row][:2] == ["gptq", "gptq:signed=on"]
