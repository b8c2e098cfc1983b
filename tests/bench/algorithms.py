"""Processor time and peak memory of the algorithms on random weights, in alternating runs.

    python -m tests.bench.algorithms [--base TREE] [--llm-compressor PYTHON] [--rounds 2] [--only NAMES]

--base   another working tree of this project (`git worktree add TREE COMMIT`): its gptq is run between the others
--llm-compressor
         the interpreter of an environment with llm-compressor: its GPTQ (groups of 128, its defaults, the checkpoint's
         dtype) is run between the others on as many random tokens, from import to written files as ours

Each run is a process of its own. What one round finds is only as good as the machine was idle: compare ratios of one
call. Shares of time are of gptq. Memory is counted from that of rtn, as a share of what the algorithms are granted (see
`granted`); with a scheme whose rtn observes activations (nvfp4) both sides hold the model's class and hidden states.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from tests.bench.compositions import members
from tests.bench.memory import build

ROOT = Path(__file__).parents[2]
RUNS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "gptq, refine off": "gptq, refine: 'off'",
    "awq": "awq",
    "gptaq": "gptaq",
    "qronos": "qronos",
}
BASE = "gptq of the base"
CHILD = """
import json, sys, time
from pathlib import Path
from quarkcli.job.run import Options, run
from quarkcli.memory import peak_rss
model, out, recipe = sys.argv[1:4]
started = time.perf_counter()
run(Options(model=model, output=Path(out), recipe=recipe, calib_data="builtin", calib_samples=32, calib_seqlen=256,
            device="cpu", overwrite=True, resume="never"))
print(json.dumps({"rss": peak_rss(), "wall": time.perf_counter() - started, "cpu": time.process_time()}))
"""
PEER = "gptq of llm-compressor"
PEER_CHILD = """
import json, resource, sys, time
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
started = time.perf_counter()
torch.manual_seed(0)
rows = torch.randint(4, 4000, (32, 256))
data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
data.set_format("torch")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
groups = {"g": QuantizationScheme(targets=["Linear"], weights=weights)}
oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]), dataset=data, max_seq_length=256,
        num_calibration_samples=32, recipe=[GPTQModifier(ignore=["lm_head"], config_groups=groups)])
model.save_pretrained(sys.argv[2], save_compressed=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"rss": peak, "wall": time.perf_counter() - started, "cpu": time.process_time()}))
"""
RECIPE = "schema: quark/recipe/1\nquantize:\n  scheme: %s\n  algorithm: [{method: %s}]\n"


def known(step: str) -> bool:
    """True when the registry has the algorithm of a step, and it has the parameter."""
    name, _, setting = step.partition(", ")
    member = members().get(name)
    return member is not None and (not setting or setting.split(":")[0] in member.parameters)


def measured(tree: Path, model: Path, recipe: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(model), str(out), str(recipe)]
    return finished(command, f"{recipe.stem} in {tree}", PYTHONPATH=str(tree))


def finished(command: list[str], what: str, **environment: str) -> dict[str, float]:
    """Returns the figures that a child prints last; it starts in a folder without packages of its own."""
    place = tempfile.gettempdir()
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=place)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def granted(hidden: int, inter: int) -> int:
    """Returns bytes: the widest second moment, its held-out twin, one factor, the float32 weights of the largest
    problem (gate and up), and a micro-batch of 2,048 tokens that enters and leaves a block's widest linear.
    """
    widest = max(hidden, inter)
    return 4 * (3 * widest * widest + 2 * hidden * inter + 2048 * (hidden + inter))


def table(found: dict[str, list[dict[str, float]]], allowed: int) -> Iterator[str]:
    """Yields the lines of the table: medians over rounds."""

    def value(name: str, what: str) -> float:
        return median(result[what] for result in found[name])

    yield "| run | processor s | of gptq | wall s | peak MB | above rtn | of what is granted |"
    yield "|---|---|---|---|---|---|---|"
    for name in found:
        share = f"{value(name, 'cpu') / value('gptq', 'cpu'):.2f}" if "gptq" in found else "-"
        above = value(name, "rss") - value("rtn", "rss") if "rtn" in found else 0.0
        yield (
            f"| {name} | {value(name, 'cpu'):.1f} | {share} | {value(name, 'wall'):.1f} "
            f"| {value(name, 'rss') / 1e6:.0f} | {above / 1e6:.0f} | {above / allowed:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--llm-compressor", dest="peer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", help="names of runs, with semicolons between")
    parser.add_argument("--scheme", default="int4_wo_128")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inter", type=int, default=3072)
    args = parser.parse_args()
    runs = [(ROOT, name, step) for name, step in RUNS.items() if known(step)]
    runs += [(args.base, BASE, "gptq")] if args.base else []
    runs = [run for run in runs if not args.only or run[1] in args.only.split(";")]
    found: dict[str, list[dict[str, float]]] = {name: [] for _, name, _ in runs}
    with tempfile.TemporaryDirectory(prefix="quark-bench-") as folder:
        root = Path(folder)
        torch.manual_seed(0)
        build(root / "model", args.blocks, args.hidden, args.inter)
        for _ in range(args.rounds):
            for tree, name, step in runs:
                recipe = root / "recipe.yaml"
                recipe.write_text(RECIPE % (args.scheme, step))
                found[name].append(measured(tree, root / "model", recipe, root / "out"))
                print(name, found[name][-1], file=sys.stderr, flush=True)
            if args.peer:
                command = [args.peer, "-c", PEER_CHILD, str(root / "model"), str(root / "peer")]
                found.setdefault(PEER, []).append(finished(command, PEER, PYTHONPATH=""))
                print(PEER, found[PEER][-1], file=sys.stderr, flush=True)
    print("\n".join(table(found, granted(args.hidden, args.inter))))


if __name__ == "__main__":
    main()
