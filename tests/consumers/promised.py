"""Checkpoints that transformers is said to load: written, loaded and measured.

python -m tests.consumers.promised     every pair whose library is installed, of the embedded model; the results
                                       go into docs/consumers.json
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quarkcli.evaluate.run import evaluate
from quarkcli.evaluate.windows import windows
from quarkcli.events import silent
from quarkcli.model.tokenizer import load_tokenizer
from tests import runs
from tests.consumers import record
from tests.consumers.loading import in_float32, load, log_probabilities, perplexity
from tests.consumers.record import DIFFERS, RUN, Run
from tests.docs.serving import SHORT, cells

SERVER = "transformers"
# Dialect -> the module and the package that transformers reads it with.
LIBRARIES = {"compressed-tensors": ("compressed_tensors", "compressed-tensors"), "quark": ("quark", "amd-quark")}
WINDOW, TOKENS = 128, 512
DATA = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 64}


def promised() -> list[tuple[str, str]]:
    """Read off the page, which is held to the writers: asking them takes seconds, in every process of the run."""
    known = {dialect for dialect, (module, _) in LIBRARIES.items() if find_spec(module)}
    return [key for key, words in cells().items() if SHORT[SERVER] in words and key[1] in known]


def page(path: Path) -> Path:
    path.write_text(runs.topics(-12, -1)[:4_000], encoding="utf-8")
    return path


def compared(source: Path | str, scheme: str, dialect: str, text: Path, output: Path) -> tuple[float, float, float]:
    """Our perplexity, transformers', and by what share they may differ: more where inputs are rounded, too."""
    made = runs.run(source, output, scheme=scheme, dialect=dialect, **DATA)
    rounds = any(target.input is not None for target in made.prepared.plan.quantized())
    return ours(made.folder, text), measured(made.folder, text, rounds), 0.01 if rounds else 0.001


def measured(folder: Path, text: Path, rounds: bool) -> float:
    """transformers' perplexity; it loads in float32 what it does not expand to bfloat16 whatever is asked for."""
    rows = windows(load_tokenizer(folder, False), str(text), WINDOW, TOKENS, "auto").tokens
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    model, wrong = load(folder, torch.float32, static=rounds and config["quant_method"] == "compressed-tensors")
    assert wrong == {"missing": set(), "unexpected": set(), "mismatched": set()}
    try:
        return perplexity(log_probabilities(model, rows), rows)
    except RuntimeError as error:
        assert "same dtype" in str(error)
    return perplexity(log_probabilities(in_float32(folder), rows), rows)


def ours(folder: Path, text: Path, **options: Any) -> float:
    setting = {"text": str(text), "window": WINDOW, "max_tokens": TOKENS, "device": "cpu", "tell": silent}
    result: float = evaluate(str(folder), **setting, **options)["perplexity"]
    return result


def main() -> int:
    found, wrong = [], 0
    with tempfile.TemporaryDirectory(prefix="quark-promised-") as temporary:
        text = page(Path(temporary) / "page.txt")
        for scheme, dialect in promised():
            ppl, theirs, close = compared("demo", scheme, dialect, text, Path(temporary) / f"{scheme}-{dialect}")
            releases = f"{version(SERVER)} with {LIBRARIES[dialect][1]} {version(LIBRARIES[dialect][1])}"
            today = datetime.date.today().isoformat()
            run = Run(
                "demo", scheme, dialect, "", SERVER, releases, today, TOKENS, RUN,
                round(-math.log(ppl), 5), round(-math.log(theirs), 5),
            )  # fmt: skip
            if abs(theirs / ppl - 1) > close:
                run, wrong = replace(run, outcome=DIFFERS, reason="the scores are not alike"), wrong + 1
            print(scheme, dialect, run.outcome, run.ours, run.theirs, flush=True)
            found.append(run)
    record.write(found)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
