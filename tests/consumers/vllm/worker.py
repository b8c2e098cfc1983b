"""Loads checkpoints one after the other and scores a prompt with each; runs in vLLM's environment.

  python worker.py JOBS RESULTS     JSON lines: {"folder", "tokens", "first", "cache", "inputs"} -> see `attempt`

vLLM is imported once; every checkpoint is loaded in a fork of that process, whose log is FOLDER.log.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
SECONDS = 240


def main(jobs: Path, results: Path) -> None:
    os.environ.update(SETTINGS)
    import standins
    import vllm  # noqa: F401  before the forks

    standins.install()
    with results.open("a", encoding="utf-8") as out:
        for line in jobs.read_text(encoding="utf-8").splitlines():
            result = forked(json.loads(line))
            print(json.dumps(result), file=out, flush=True)
            told = f"{result['score']:.4f}" if "score" in result else result["error"].partition("\n")[0][:150]
            print(f"{Path(result['folder']).name}: {result['stage']}, {told}", flush=True)


def forked(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a child; that of a crash when the child leaves none."""
    log = Path(f"{job['folder']}.log")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.alarm(SECONDS)
        with log.open("wb") as said, os.fdopen(write, "w") as out:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            json.dump(attempt(job), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as given:
        text = given.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    result = json.loads(text) if text else {**job, "stage": "crash", "error": f"the process ended with {status}"}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    warnings = {line.partition("] ")[2] for line in lines if " WARNING " in line}
    return {"standins": [], **result, "warnings": sorted(warnings)}


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    """The job and what came of it.

    stage     the last that began: config, classes, weights, kernels, forward; `run` when all went well
    score     mean log-probability of the tokens from `first` on
    standins  those that were used
    scales    of the cache, by module, as its attention layers have them
    """
    import standins

    result: dict[str, Any] = {**job, "stage": "config", "started": time.time()}
    watch(result)
    try:
        score(job, result)
        result["stage"] = "run"
    except BaseException as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"[:1500]
        places = traceback.extract_tb(error.__traceback__)[-4:]
        result["where"] = [f"{Path(place.filename).name}:{place.name}" for place in places]
    seconds = round(time.time() - result.pop("started"), 1)
    return result | {"standins": sorted(standins.USED), "seconds": seconds}


def score(job: dict[str, Any], result: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    tokens, first = job["tokens"], job["first"]
    more = {"kv_cache_dtype": job["cache"]} if job.get("cache") else {}
    llm = LLM(
        model=job["folder"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=len(tokens) + 8,
        max_num_seqs=1, disable_log_stats=True, enable_prefix_caching=False,
        model_loader_extra_config={"enable_weights_track": True},  # a parameter that no tensor is for is an error
        **more,
    )  # fmt: skip
    result["stage"] = "forward"
    result["scales"] = llm.apply_model(cache_scales)[0]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0].prompt_logprobs
    scores = [found[place][tokens[place]].logprob for place in range(first, len(tokens))]
    if not all(map(math.isfinite, scores)):
        raise ArithmeticError("a log-probability is not finite")
    result["score"] = sum(scores) / len(scores)


def cache_scales(model: Any) -> dict[str, list[float]]:
    return {
        name: [module._k_scale_float, module._v_scale_float]
        for name, module in model.named_modules()
        if hasattr(module, "_k_scale_float")
    }


def watch(result: dict[str, Any]) -> None:
    """Notes which stage of loading begins."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    places = [
        (base_loader, "initialize_model", "classes"),
        (DefaultModelLoader, "load_weights", "weights"),
        (base_loader, "process_weights_after_loading", "kernels"),
    ]
    for owner, name, stage in places:
        setattr(owner, name, noting(getattr(owner, name), result, stage))
    strict = DefaultModelLoader.track_weights_loading

    def tracked(self: Any, model: Any, loaded: set[str], quantized: bool = False) -> None:
        """Some classes make what a checkpoint need not have: a bias, which is zero then, and scales of whole inputs."""
        none = {
            name
            for name, tensor in model.named_parameters()
            if (name.endswith("_bias") and not tensor.any()) or ("input_" in name and not result["inputs"])
        }
        strict(self, model, loaded | none, quantized)

    DefaultModelLoader.track_weights_loading = tracked


def noting(work: Any, result: dict[str, Any], stage: str) -> Any:
    def noted(*given: Any, **named: Any) -> Any:
        result["stage"] = stage
        return work(*given, **named)

    return noted


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
