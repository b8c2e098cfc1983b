"""Tiny source checkpoints with a tokenizer, in the families that quark describes, and runs of the job on them."""

from __future__ import annotations

import inspect
import json
import os
import signal
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quarkcli import algorithms
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.journal import Journal
from quarkcli.job import run as job
from quarkcli.plan.compose import Overrides
from tests import tiny

# Widths that groups of 128 divide, and no square expert matrix: a wrong orientation cannot hide.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "moe_intermediate_size": 256},
    "mixtral": {"head_dim": 64, "intermediate_size": 256},
    "gpt_oss": {"head_dim": 64, "intermediate_size": 256},
}
FUSED = "qwen3_moe_fused"
EOS, BOS = "<eos>", "<bos>"
VOCABULARY = 264
SCHEMES = ("nvfp4", "fp8", "mxfp4", "int4_wo_128")
CALIBRATED = {"nvfp4", "fp8"}

UNSERVED = "no server loads this plan"  # begins the warning that a plan is a simulation


@dataclass(frozen=True)
class Made:
    """A finished run: the output folder, the report, what the job knew before it started, and its source."""

    folder: Path
    report: dict[str, Any]
    prepared: job.Prepared
    source: Path


def tokenizer(chat_template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and an end mark; with `bos` a mark that it puts before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS)
    if bos:
        made.add_special_tokens({"bos_token": BOS})
        mark = [(BOS, made.bos_token_id)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=mark)
    made.chat_template = chat_template
    return made


def build(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A source of a family with tokenizer, side files and a README. `name`: a key of SIZES, or FUSED."""
    family = name.removesuffix("_fused")
    sizes = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, **SIZES.get(family, {}), **changes}
    checkpoint = tiny.build(family, folder, dtype, **sizes)
    if name == FUSED:
        checkpoint.rewrite(fused(checkpoint.tensors))
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("# where it comes from\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "licence.txt").write_bytes(b"as it is\r\n\xff")
    return folder


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen3-MoE as some tools store it: gate above up, experts stacked."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    prefixes = dict.fromkeys(name.partition(".experts.")[0] for name in tensors if ".experts." in name)
    for prefix in prefixes:
        count = sum(name.startswith(f"{prefix}.experts.") for name in tensors) // 3
        gates, ups, downs = (
            [tensors[f"{prefix}.experts.{index}.{leaf}_proj.weight"] for index in range(count)]
            for leaf in ("gate", "up", "down")
        )
        both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        out[f"{prefix}.experts.gate_up_proj"] = torch.stack(both)
        out[f"{prefix}.experts.down_proj"] = torch.stack(downs)
    return out


def text_file(path: Path, size: int = 12_000) -> Path:
    """Plain text: source of the standard library, from this interpreter. A run reads it whole, however few its rows."""
    path.write_text((inspect.getsource(textwrap) + inspect.getsource(json))[:size], encoding="utf-8")
    return path


def topics(start: int, stop: int) -> str:
    """Some of Python's reference topics, in order of their names."""
    from pydoc_data.topics import topics as all_topics

    return "\n".join(all_topics[name] for name in sorted(all_topics)[start:stop])


def data(text: Path, samples: int = 32, seqlen: int = 64) -> dict[str, Any]:
    """Calibration options."""
    return {"calib_data": str(text), "calib_samples": samples, "calib_seqlen": seqlen}


def quick(name: str) -> list[str]:
    """Settings with which an algorithm that takes many steps takes few, so that a run takes a second."""
    known = algorithms.create(name, {}).parameters
    return [f"{name}.{key}=4" for key in ("iters", "n_grid") if key in known]


def run(source: Path | str, output: Path, **options: Any) -> Made:
    """`quark quantize` without the command line; overrides by their own names. `source` may be "demo"."""
    own = {key: options.pop(key) for key in list(options) if key in Overrides.__dataclass_fields__}
    given = job.Options(
        model=str(source), output=output, overrides=Overrides(**own), **{"device": "cpu", "resume": "never", **options}
    )
    seen: list[job.Prepared] = []
    report = job.run(given, planned=seen.append)
    return Made(output, report, seen[0], EMBEDDED if source == "demo" else Path(source))


def warnings_but(begin: str, made: Made) -> list[str]:
    """The warnings of a report that do not begin so."""
    return [warning for warning in made.report["warnings"] if not warning.startswith(begin)]


def killed(parts: int, work: Callable[[], Any]) -> None:
    """Runs the job in a child, which is killed as soon as so many parts are in the journal."""
    child = os.fork()
    if not child:  # pragma: no cover
        finish, calls = Journal.finish, []

        def dying(self: Journal, *given: Any) -> None:
            finish(self, *given)
            calls.append(1)
            if len(calls) == parts:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.finish = dying  # type: ignore[method-assign]
        work()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def prepare(source: Path | str, **options: Any) -> job.Prepared:
    """Steps 1 to 4 of the same."""
    own = {key: options.pop(key) for key in list(options) if key in Overrides.__dataclass_fields__}
    return job.prepare(job.Options(model=str(source), overrides=Overrides(**own), **{"device": "cpu", **options}))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def same_files(one: Path, other: Path) -> bool:
    """The same tensors in two folders, bit for bit."""
    ours, theirs = read_all(one), read_all(other)
    return set(ours) == set(theirs) and all(same_bytes(ours[name], theirs[name]) for name in ours)
