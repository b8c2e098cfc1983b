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
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quarkcli.evaluation.run import evaluate
from quarkcli.evaluation.windows import windows
from quarkcli.events import silent
from quarkcli.model.tokenizer import load_tokenizer
from tests import runs
from tests.consumers import record
from tests.consumers.loading import in_float32, load, log_probabilities, perplexity
from tests.consumers.pairs import LEFT_OUT, source
from tests.consumers.record import DIFFERS, RUN, Run
from tests.docs.serving import SHORT, cells

SERVER = "transformers"
# Dialect -> the module and the package that transformers reads it with.
LIBRARIES = {"compressed-tensors": ("compressed_tensors", "compressed-tensors"), "quark": ("quark", "amd-quark")}
# (model, scheme, dialect) that it expands on a CPU by its own code, which wants accelerate. Inputs are left alone.
EXPANDED = [("llama", "fp8_block128", "fp8"), ("gpt_oss", "mxfp4_weight_only", "mxfp4")]
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


def expanded(folder: Path, text: Path) -> tuple[Any, float]:
    """The model as it is loaded without any more words, and its perplexity."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    rows = windows(load_tokenizer(folder, False), str(text), WINDOW, TOKENS, "auto").tokens
    return model, perplexity(log_probabilities(model.float().eval(), rows), rows)


def ours(folder: Path, text: Path, **options: Any) -> float:
    setting = {"text": str(text), "window": WINDOW, "max_tokens": TOKENS, "device": "cpu", "tell": silent}
    result: float = evaluate(str(folder), **setting, **options)["perplexity"]
    return result


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="quark-promised-") as temporary:
        found = list(measurements(Path(temporary)))
    record.write(found)
    for run in found:
        print(run.model, run.scheme, run.dialect, run.outcome, run.ours, run.theirs)
    return int(any(run.outcome == DIFFERS for run in found))


def measurements(folder: Path) -> Iterator[Run]:
    text = page(folder / "page.txt")
    for scheme, dialect in promised():
        ppl, theirs, close = compared("demo", scheme, dialect, text, folder / f"{scheme}-{dialect}")
        yield told("demo", scheme, dialect, LIBRARIES[dialect][1], ppl, theirs, close)
    for model, scheme, dialect in EXPANDED if find_spec("accelerate") else ():
        output = folder / f"{model}-{dialect}"
        runs.run(source(model, folder), output, scheme=scheme, dialect=dialect, exclude=LEFT_OUT.get(model, ()))
        yield told(
            model,
            scheme,
            dialect,
            "accelerate",
            ours(output, text, weights_only=True),
            expanded(output, text)[1],
            0.001,
        )


def told(model: str, scheme: str, dialect: str, package: str, ppl: float, theirs: float, close: float) -> Run:
    run = Run(
        model, scheme, dialect, "", SERVER, f"{version(SERVER)} with {package} {version(package)}",
        datetime.date.today().isoformat(), TOKENS, RUN, round(-math.log(ppl), 5), round(-math.log(theirs), 5),
    )  # fmt: skip
    wrong = abs(theirs / ppl - 1) > close
    return replace(run, outcome=DIFFERS, reason="the scores are not alike") if wrong else run


if __name__ == "__main__":
    sys.exit(main())
