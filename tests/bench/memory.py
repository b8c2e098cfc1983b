"""Peak memory must follow one block: 48 equal blocks against 12, data-free and with gptq, dense and with experts.

    python -m tests.bench.memory [--hidden 1024] [--inter 4096]

Each run is a process of its own; its peak resident size is read from the operating system.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.writer import write_index

CHILD = """
import json, sys, time
from pathlib import Path
from quarkcli.job.run import Options, run
from quarkcli.memory import peak_rss
started = time.perf_counter()
model, out, scheme, algorithm = sys.argv[1:5]
run(Options(model=model, scheme=scheme, algorithm=algorithm or None, output=Path(out), calib_data="builtin",
            calib_samples=16, calib_seqlen=128, device="cpu"))
print(json.dumps({"rss": peak_rss(), "seconds": time.perf_counter() - started}))
"""


def build(folder: Path, blocks: int, hidden: int, inter: int, experts: int = 0) -> int:
    """A Llama, or a Qwen3-MoE, of equal random blocks, one shard each; returns the bytes of one block."""
    config = json.loads((EMBEDDED / "config.json").read_text())
    heads = hidden // 64
    config |= {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64,
    }  # fmt: skip
    if experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
            "num_experts_per_tok": 4, "moe_intermediate_size": inter, "norm_topk_prob": True,
        }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    weight_map: dict[str, str] = {}
    total = 0

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
        nonlocal total
        tensors = {
            k: torch.randn(s).mul_(0.02).bfloat16() if len(s) > 1 else torch.ones(s).bfloat16()
            for k, s in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        size = sum(t.nbytes for t in tensors.values())
        total += size
        return size

    vocabulary = config["vocab_size"]
    outside = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    shard("outside.safetensors", outside)
    block = 0
    for index in range(blocks):
        at = f"model.layers.{index}."
        shapes: dict[str, tuple[int, ...]] = {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        for mlp in [f"{at}mlp.experts.{expert}." for expert in range(experts)] or [f"{at}mlp."]:
            shapes |= {f"{mlp}{p}_proj.weight": (inter, hidden) for p in ("gate", "up")}
            shapes[f"{mlp}down_proj.weight"] = (hidden, inter)
        if experts:
            shapes[f"{at}mlp.gate.weight"] = (experts, hidden)
            shapes |= {f"{at}self_attn.{p}_norm.weight": (64,) for p in "qk"}
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        block = shard(f"block-{index}.safetensors", shapes)
    write_index(folder, weight_map, total)
    return block


def peak(model: Path, out: Path, scheme: str, algorithm: str) -> tuple[int, float]:
    run = [sys.executable, "-c", CHILD, str(model), str(out), scheme, algorithm]
    result = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    return result["rss"], result["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inter", type=int, default=4096)
    args = parser.parse_args()
    print("| run | block | 12 blocks | 48 blocks | ratio | seconds, 12 and 48 |")
    print("|---|---|---|---|---|---|")
    dense, experts = (args.hidden, args.inter, 0), (512, 256, 32)
    rows = [("mxfp4", "", dense), ("int4_wo_128", "gptq", dense), ("int4_wo_128", "gptq", experts)]
    with tempfile.TemporaryDirectory() as folder:
        for number, (scheme, algorithm, shape) in enumerate(rows):
            root = Path(folder) / str(number)
            root.mkdir()
            sizes = {blocks: build(root / f"m{blocks}", blocks, *shape) for blocks in (12, 48)}
            results = {b: peak(root / f"m{b}", root / f"o{b}", scheme, algorithm) for b in (12, 48)}
            (few, few_seconds), (many, many_seconds) = results[12], results[48]
            kind = f"{scheme} {algorithm}" + f", {shape[2]} experts" * bool(shape[2])
            print(
                f"| {kind} | {sizes[12] / 1e6:.0f} MB | {few / 1e6:.0f} MB | {many / 1e6:.0f} MB "
                f"| {many / few:.3f} | {few_seconds:.0f}, {many_seconds:.0f} |",
                flush=True,
            )
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
