"""Seconds of processor time that a plan for DeepSeek-V3's real shapes takes (headers only); the goal is under 5.

python -m tests.bench.plan

Then `quark plan --json` as people start it, a process of its own, on files that have headers and holes: DeepSeek-V3 in
16 bits, and a mixture of experts in the shape of Qwen3-30B-A3B (under 3 s). The goal for both is 1 MB and 300 MB.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from quarkcli.job import run as job
from quarkcli.job.options import Options
from quarkcli.plan.model import Plan
from tests.plan.test_scale import CONFIG, HEADERS, prepared, published

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "data-free": ("mxfp4", {}),
    "static inputs": ("nvfp4", {}),
    "patterns with numbers": ("mxfp4", {"exclude": ["*layers.3.*"], "layers": ["*layers.6?.*down_proj=fp8"]}),
}
# The whole of step 1 to 4 on the files as they were published, in fp8 with scales: 91,991 tensors.
PUBLISHED = {"fp8 source, data-free": "mxfp4", "fp8 source, static inputs": "nvfp4"}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936, "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
CHILD = """
import sys, time
from quarkcli.cli.main import main
code = main()
from quarkcli.memory import peak_rss
print(time.process_time(), peak_rss(), file=sys.stderr)
sys.exit(code)
"""
Shape = tuple[str, tuple[int, ...]]


def main() -> None:
    print("| plan of DeepSeek-V3 | best of 2, s | weights |\n|---|---|---|")
    for name, (scheme, flags) in CASES.items():
        _row(name, lambda scheme=scheme, flags=flags: prepared(scheme, **flags)[1])
    source = published(Path.cwd())
    for name, scheme in PUBLISHED.items():
        with mock.patch.object(job, "open_source", lambda *given: source):
            _row(name, lambda scheme=scheme: job.prepare(Options("", scheme=scheme, calib_data="builtin")).plan)
    print("\n| quark plan --json | processor s | peak MB | JSON kB |\n|---|---|---|---|")
    shapes = {name: header.shape for name, header in HEADERS.items()}
    models = {"DeepSeek-V3": (CONFIG, shapes.items()), "Qwen3-30B-A3B": (QWEN, qwen3_moe())}
    for model, (config, tensors) in models.items():
        with tempfile.TemporaryDirectory() as folder:
            hollow(Path(folder), config, tensors)
            for scheme in ("nvfp4", "mxfp4"):
                seconds, peak, size = min(_command(folder, scheme) for _ in range(2))
                print(f"| {model}, {scheme} | {seconds:.2f} | {peak / 1e6:.0f} | {size / 1e3:.0f} |", flush=True)


def qwen3_moe() -> Iterator[Shape]:
    """Yields the tensors of Qwen3-30B-A3B."""
    hidden, inner, vocabulary = 2048, 768, 151936
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for block in range(48):
        name = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{name}.{norm}.weight", (hidden,)
        for leaf, shape in {"q": (4096, hidden), "k": (512, hidden), "v": (512, hidden), "o": (hidden, 4096)}.items():
            yield f"{name}.self_attn.{leaf}_proj.weight", shape
        for leaf in "qk":
            yield f"{name}.self_attn.{leaf}_norm.weight", (128,)
        yield f"{name}.mlp.gate.weight", (128, hidden)
        for expert in range(128):
            for leaf in ("gate", "up"):
                yield f"{name}.mlp.experts.{expert}.{leaf}_proj.weight", (inner, hidden)
            yield f"{name}.mlp.experts.{expert}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def hollow(folder: Path, config: dict[str, Any], tensors: Iterable[Shape]) -> None:
    """Writes a model in bfloat16 whose one file has its size and takes no room: a hole stands behind its header."""
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    rows, end = {}, 0
    for name, shape in tensors:
        start, end = end, end + 2 * math.prod(shape)
        rows[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(rows).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def _command(model: str, scheme: str) -> tuple[float, int, int]:
    """Returns processor seconds and peak bytes of a command's process, and the bytes that it prints."""
    asked = ["plan", "--model", model, "--scheme", scheme, "--calib-data", "builtin", "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *asked], capture_output=True, check=True, env=environment)
    seconds, peak = done.stderr.splitlines()[-1].split()
    return float(seconds), int(peak), len(done.stdout)


def _row(name: str, make: Callable[[], Plan]) -> None:
    taken = []
    for _ in range(2):
        started = time.process_time()
        plan = make()
        taken.append(time.process_time() - started)
    print(f"| {name} | {min(taken):.2f} | {sum(1 for _ in plan.quantized()):,} |", flush=True)


if __name__ == "__main__":
    main()
