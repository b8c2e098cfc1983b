"""What every scheme costs on one small model, rounded to nearest: for `quark schemes show`.

python -m tests.bench.schemes      (three minutes; then make docs)
"""

from __future__ import annotations

import io
import json
import subprocess
import tempfile
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

from quarkcli.cli import main
from quarkcli.recipe import catalog

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "scheme_losses.json"
MODEL = "the embedded model, 1.8M parameters"


def measure(scheme: str, folder: Path) -> dict[str, float]:
    """Returns KL, perplexity and agreement of the embedded model on the text of `quark eval`, the same for all."""
    data = ("--calib-data", "builtin", "--calib-samples", "160", "--calib-seqlen", "256", "--no-eval")
    out = str(folder / scheme)
    answer("quantize", "--model", "demo", "--scheme", scheme, "-o", out, "--device", "cpu", *data)
    found = answer("eval", out, "--baseline", "demo", "--tokens", "8192", "--device", "cpu")
    return {
        "kl": round(found["kl"], 5), "perplexity": round(found["perplexity"], 3),
        "source_perplexity": round(found["baseline_perplexity"], 3), "top1": round(found["top1_agreement"], 4),
    }  # fmt: skip


def answer(*words: str) -> dict[str, Any]:
    """Returns the answer of a command."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main.main([*words, "--json", "-q"]) == 0, words
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def write() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for scheme in catalog.files("schemes"):
            rows[scheme] = measure(scheme, Path(folder))
            print(scheme, rows[scheme], flush=True)
    text = "8,192 tokens of the built-in text that calibration does not see, in windows of 256; calibrated on 160 x 256"
    facts = {"model": MODEL, "text": text, "commit": commit, "date": date.today().isoformat(), "rows": rows}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
