"""docs/consumers.json: well-formed, of pairs that are promised, and nothing in it went wrong. And what judges a run."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quarkcli import dialects
from tests.consumers import record
from tests.consumers.pairs import DEMO, LEFT_OUT, MODELS, Pair, prepare, source
from tests.consumers.record import DIFFERS, FAILED, INPUTS, KERNEL, RUN
from tests.consumers.vllm import install
from tests.consumers.vllm.run import CLOSE, WORKER, explained, judged, main

RUNS = record.read()
PAIR = Pair("demo", "int8_dynamic", "quark")
ANSWER = {"folder": "", "stage": "run", "score": -4.5, "standins": [], "warnings": [], "scales": {}}


def test_rows_are_whole() -> None:
    assert RUNS and len({run.key for run in RUNS}) == len(RUNS)
    for run in RUNS:
        assert run.model in MODELS and run.version and run.tokens >= 30
        assert datetime.date.fromisoformat(run.date) <= datetime.date.today() + datetime.timedelta(days=1)
        assert run.outcome in (RUN, INPUTS, KERNEL), run
        if run.outcome == RUN:
            assert run.theirs is not None and abs(run.ours - run.theirs) <= CLOSE and not run.reason
        elif run.outcome == KERNEL:
            assert run.theirs is None and run.reason and run.stage
        else:
            assert explained([replace(run, outcome=DIFFERS)]) == [run]


def test_runs_of_other_models_and_of_caches_are_of_pairs_that_are_promised(tmp_path: Path) -> None:
    """A sample; those of the embedded model are held to the page, and the page to the writers."""
    others = [run for run in RUNS if run.model != DEMO or run.cache]
    assert {run.dialect for run in others} <= set(dialects.names())
    for run in others[::12]:
        plan = prepare(source(run.model, tmp_path), run.scheme, run.cache, LEFT_OUT.get(run.model, ())).plan
        assert run.consumer in dialects.writer(run.dialect).loaders(plan), run


def test_new_runs_replace_old_ones_of_the_same_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    first = judged(PAIR, ANSWER, -4.5, "1.0")
    other = judged(Pair("demo", "fp8", "quark"), ANSWER, -4.5, "1.0")
    record.write([first, other], path)
    again = judged(PAIR, {**ANSWER, "standins": ["a", "b"]}, -4.51, "2.0")
    record.write([again], path)
    assert record.read(path) == [other, again]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({}, RUN),
        ({"score": -4.5 - 2 * CLOSE}, DIFFERS),
        ({"stage": "classes", "error": "ValueError: Failed to find a kernel that can implement it"}, KERNEL),
        ({"stage": "weights", "error": "ValueError: no module or parameter named 'x'"}, FAILED),
        ({"stage": "crash", "error": "the process ended with -4"}, FAILED),
    ],
)
def test_what_is_said_of_an_answer(answer: dict, outcome: str) -> None:
    given = {name: value for name, value in {**ANSWER, **answer}.items() if "error" not in answer or name != "score"}
    run = judged(PAIR, given, -4.5, "0")
    assert run.outcome == outcome
    assert bool(run.reason) == (outcome != RUN)


def test_a_score_of_the_same_weights_with_other_inputs_is_told() -> None:
    runs = [
        judged(Pair("demo", scheme, "x"), {**ANSWER, "score": -4.7}, ours, "0")
        for scheme, ours in (("a", -4.7), ("b", -4.6))
    ]
    found = explained(runs)
    assert [run.outcome for run in found] == [RUN, INPUTS] and found[1].reason == "inputs as in a"
    assert explained([replace(runs[1], theirs=-4.5)])[0].outcome == DIFFERS


@pytest.mark.parametrize(
    ("answer", "told"),
    [("{**job, 'stage': 'run', 'score': -1.5}", "run, -1.5000"), ("os._exit(7)", "crash, the process ended with 7")],
)
def test_a_crash_ends_its_own_checkpoint_alone(answer: str, told: str, tmp_path: Path) -> None:
    """The worker with other words in the place of vLLM: every job has a result, and the warnings of its log."""
    code = f"""
import json, os, sys, types, pathlib
sys.path.insert(0, {str(WORKER.parent)!r})
sys.modules |= {{"vllm": types.ModuleType("vllm"), "standins": types.SimpleNamespace(install=lambda: None)}}
import worker
def attempt(job):
    print("(1) WARNING 11-28 12:00:00 [a.py:1] something", flush=True)
    return {answer}
worker.attempt = attempt
worker.main(pathlib.Path("jobs"), pathlib.Path("results"))
"""
    jobs = [{"folder": str(tmp_path / name), "tokens": [1], "first": 1} for name in ("one", "two")]
    (tmp_path / "jobs").write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"one: {told}", f"two: {told}"]
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [result["folder"] for result in results] == [job["folder"] for job in jobs]
    assert all(result["warnings"] == ["something"] and result["standins"] == [] for result in results)


def test_without_the_build_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["run", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="No such file"):
        main()
    assert "VLLM_PYTHON=" in install.HINT
