"""Every flag of every command has a case here in which it cannot act, and says so; or a reason why it always acts.

The cases are held against the commands themselves: a flag that is added without one fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
import typer

from quarkcli.cli import main
from quarkcli.cli.jobflags import JobFlags
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.job.options import Options
from quarkcli.plan.compose import Overrides
from tests import runs

FREE = ("--model", "demo", "--scheme", "mxfp4")
DATA = ("--model", "demo", "--scheme", "fp8", "--calib-data", "builtin")
SEARCH = ("search", "--model", "demo", "--schemes", "mxfp4,bf16", "--calib-data", "text.txt", "--calib-seqlen", "8",
          "--calib-samples", "1")  # fmt: skip
PREVIEW = ("data", "preview", "--model", "demo", "--calib-seqlen", "8", "--calib-data")
NOT_USED, NOTHING = "not used", "changes nothing"

# Flag of `quantize` and `plan` -> command lines in which it cannot act: (arguments, exit code, what is said).
Case = tuple[tuple[str, ...], int, str]
IDLE: dict[str, list[Case]] = {
    "scheme": [(("--model", "demo", "--scheme", "fp8", "--recipe", "mxfp4"), 2, "exclude each other")],
    "recipe": [(("--model", "demo", "--recipe", "mxfp4", "--scheme", "fp8"), 2, "exclude each other")],
    "settings": [
        ((*FREE, "--set", "calibration.samples=4"), 2, "there is no recipe to change"),
        (("--model", "demo", "--recipe", "mxfp4", "--set", "calibration.samples=4"), 0, NOT_USED),
        (("--model", "demo", "--recipe", "mxfp4-kv_fp8", "--calib-data", "builtin", "--calib-samples", "9",
          "--set", "calibration.samples=4"), 0, "--calib-samples is given"),
        (("--model", "demo", "--recipe", "mxfp4-kv_fp8", "--calib-data", "builtin", "--kv-cache", "nvfp4",
          "--set", "quantize.kv_cache=fp8"), 0, "--kv-cache is given"),
        (("--model", "demo", "--recipe", "mxfp4", "--set", "quantize.scheme=mxfp4"), 0, NOTHING),
    ],
    "exclude": [((*FREE, "--exclude", "lm_head"), 0, NOTHING), ((*FREE, "--exclude", "*dwn_proj"), 3, "matches none")],
    "include": [((*FREE, "--include", "*q_proj"), 0, NOTHING), ((*FREE, "--include", "*nope"), 3, "matches none")],
    "layers": [((*FREE, "--layer", "*q_proj=mxfp4"), 0, NOTHING), ((*FREE, "--layer", "*nope=fp8"), 3, "matches none"),
               ((*FREE, "--layer", "lm_head=fp8"), 3, "switched off")],
    "layer_types": [((*FREE, "--layer-type", "Linear=mxfp4"), 0, NOTHING),
                    ((*FREE, "--layer-type", "Conv2d=fp8"), 3, "matches none"),
                    ((*FREE, "--layer-type", "Embedding=fp8", "--exclude", "*embed_tokens"), 3, "switched off")],
    "unprotect": [((*FREE, "--unprotect", "audio"), 0, NOTHING), ((*FREE, "--unprotect", "nope"), 3, "unknown role"),
                  (("--model", "demo", "--recipe", "NVFP4_DEFAULT_CFG", "--calib-data", "builtin",
                    "--unprotect", "head"), 0, "no default exclusions")],
    "allow_unmatched": [((*FREE, "--allow-unmatched"), 0, NOTHING)],
    "kv_cache": [((*FREE, "--kv-cache", "none"), 0, NOTHING)],
    "attention": [((*FREE, "--attention", "none"), 0, NOTHING)],
    "on_indivisible": [((*FREE, "--on-indivisible", word), 0, NOTHING) for word in ("keep", "pad")],
    "min_kv_scale": [((*FREE, "--min-kv-scale", "0.1"), 3, "no KV cache")],
    "algorithm": [(("--model", "demo", "--recipe", "CACHE", "--algorithm", "gptq", "--calib-data", "builtin"),
                   0, "no weight that it could work on")],
    "calib_data": [((*FREE, "--calib-data", "builtin"), 0, NOT_USED)],
    "calib_samples": [((*FREE, "--calib-samples", "4"), 0, NOT_USED)],
    "calib_seqlen": [((*FREE, "--calib-seqlen", "64"), 0, NOT_USED)],
    "calib_batch": [((*FREE, "--calib-batch", "2"), 0, NOT_USED),
                    ((*DATA, "--calib-batch", "2", "--device", "cpu"), 0, "--calib-batch is not used: it works only")],
    "calib_column": [((*FREE, "--calib-column", "text"), 0, NOT_USED), ((*DATA, "--calib-column", "text"), 0, NOT_USED),
                     ((*DATA[:-1], "text.txt", "--calib-column", "text"), 0, NOT_USED),
                     ((*DATA[:-1], "texts", "--calib-column", "text"), 0, NOT_USED)],
    "target": [((*FREE, "--target", "none"), 0, NOTHING)],
    "on_nonfinite": [((*FREE, "--on-nonfinite", "keep"), 0, "reads no weights"),
                     ((*FREE, "--on-nonfinite", "skip-algorithm"), 0, NOT_USED)],
    "bos": [((*FREE, "--bos", "on"), 0, NOT_USED)],
    "chat_template": [((*FREE, "--chat-template", "text.txt"), 0, NOT_USED),
                      ((*DATA, "--chat-template", "text.txt"), 0, NOT_USED)],
    "allow_short": [((*FREE, "--allow-short"), 0, NOT_USED), ((*DATA, "--allow-short"), 0, "no number of rows")],
    "moe_calibration": [((*FREE, "--moe-calibration", "all"), 0, NOT_USED),
                        ((*DATA, "--moe-calibration", "all"), 0, "no routed experts"),
                        ((*DATA, "--moe-calibration", "routed"), 0, "no routed experts")],
    "min_expert_tokens": [((*FREE, "--min-expert-tokens", "4"), 0, NOT_USED),
                          ((*DATA, "--min-expert-tokens", "4"), 0, "no routed experts")],
    "device": [((*FREE, "--device", "cuda"), 0, "--device cuda: this machine has no CUDA")],
    "seed": [((*FREE, "--seed", "3"), 0, NOT_USED)],
    "resume": [((*FREE, "--resume", "require"), 0, "and writes nothing")],
    "overwrite": [((*FREE, "--overwrite"), 0, "and writes nothing")],
    "strict": [((*FREE, "--strict"), 0, NOT_USED)],
    "time_budget": [((*FREE, "--time-budget", "9m"), 0, "and writes nothing")],
    "keep_download": [((*FREE, "--keep-download"), 0, "the model is a directory")],
    "max_cpu_mem": [((*FREE, "--max-cpu-mem", "1GB"), 0, "and writes nothing")],
    "max_gpu_mem": [((*FREE, "--max-gpu-mem", "1GB"), 0, "and writes nothing"),
                    ((*FREE, "--max-gpu-mem", "1GB", "--device", "cpu"), 0, "runs on a CPU")],
    "offload": [((*FREE, "--offload", "disk"), 0, NOT_USED), ((*DATA, "--offload", "cpu"), 0, "and writes nothing"),
                ((*DATA, "--offload", "none", "--device", "cpu"), 0, "is not used: on a CPU hidden states are")],
    "threads": [((*FREE, "--threads", "2"), 0, "and writes nothing")],
    "verify": [((*FREE, "--no-verify"), 0, "and writes nothing")],
    "evaluate": [((*FREE, "--eval"), 0, "and writes nothing"), ((*FREE, "--no-eval"), 0, "--no-eval changes nothing")],
    "trust_remote_code": [((*FREE, "--trust-remote-code"), 0, NOT_USED),
                          ((*DATA, "--trust-remote-code"), 0, "brings no code")],
    "allow_pickle": [((*FREE, "--allow-pickle"), 0, "has safetensors files")],
    "revision": [((*FREE, "--revision", "v2"), 0, "has no revisions")],
    "progress": [((*FREE, "--progress", "bar"), 0, "shows no progress")],
}  # fmt: skip
ALWAYS = {
    "model": "what everything is about",
    "output": "the plan shows it",
    "tp": "it is possible, or refused",
    "dialect": "it decides, or is refused",
    "json": "another form of the answer",
    "quiet": "fewer lines",
    "offline": "a promise that holds, whether or not the hub would be asked",
    "log_level": "fewer lines, or more",
    "log_format": "another form of errors and warnings",
    "debug": "tracebacks",
}

# Flags and arguments of the other commands: cases as above, or a reason.
OTHERS: dict[str, dict[str, list[Case] | str]] = {
    "quantize": {"dry_run": "it stops there"},
    "plan": {
        "check_model": "it builds the model's class",
        **dict.fromkeys(("ranks", "gpu", "rates"), "the forecast is for these"),
        "modules": [(("plan", *FREE, "--modules", "--json"), 2, "use --json --full to get every module")],
        "full": [(("plan", *FREE, "--full"), 2, "--full works only with --json")],
    },
    "env": {
        "measure": "it measures, and says where the rates are",
        "device": [(("env", "--device", "cpu"), 2, "works only with --measure")],
    },
    "explain": {"code": "what is explained"},
    "search": {
        **dict.fromkeys(("model", "schemes", "recipe"), "what everything is about"),
        **dict.fromkeys(("output", "scores"), "where it goes"),
        **dict.fromkeys(
            (
                "offline",
                "dialect",
                "settings",
                "algorithm",
                "unprotect",
                "device",
                "threads",
                "seed",
                "revision",
                "calib_data",
                "calib_samples",
                "calib_seqlen",
                "bos",
                "strict",
                "chat_template",
                "on_indivisible",
                "tp",
            ),
            "as in quantize, whose code looks at it",
        ),
        **dict.fromkeys(("exclude", "include", "allow_unmatched", "target"), "they decide which weights are searched"),
        "budget": [
            (
                ("search", "--model", "demo", "--schemes", "fp8,nvfp4", "--budget", "5", "--size", "9GB"),
                2,
                "exclude each other",
            )
        ],
        "size": [
            (
                ("search", "--model", "demo", "--schemes", "fp8,nvfp4", "--size", "9"),
                3,
                "too few; the smallest choice takes",
            )
        ],
        "overwrite": [((*SEARCH, "--overwrite"), 0, NOT_USED)],
        "on_nonfinite": [((*SEARCH, "--on-nonfinite", "skip-algorithm"), 2, "is not one of 'stop', 'keep'")],
        "allow_short": [((*SEARCH[:-2], "--allow-short"), 0, "no number of rows")],
        "calib_batch": [
            (
                (*SEARCH, "--calib-batch", "2", "--device", "cpu"),
                0,
                "--calib-batch is not used: it works only",
            )
        ],
        "calib_column": [((*SEARCH, "--calib-column", "text"), 0, NOT_USED)],
        "moe_calibration": [((*SEARCH, "--moe-calibration", "all"), 0, "no routed experts")],
        "min_expert_tokens": [((*SEARCH, "--min-expert-tokens", "4"), 0, "no routed experts")],
        "trust_remote_code": [((*SEARCH, "--trust-remote-code"), 0, "brings no code")],
        "allow_pickle": [((*SEARCH, "--allow-pickle"), 0, "has safetensors files")],
        "progress": "where the screen is",
    },
    "eval": {
        "offline": "a promise that holds",
        "baseline": "it is compared with",
        "text": "it is measured on",
        "window": "it cuts the text",
        "tokens": [(("eval", "demo", "--tokens", "64", "--text", "text.txt", "--window", "8"), 0, NOT_USED)],
        "bos": [(("eval", "NO_BOS", "--bos", "off", "--text", "text.txt", "--window", "8"), 0, NOT_USED)],
        "max_kl": [(("eval", "demo", "--max-kl", "1"), 2, "baseline")],
        "max_ppl_increase": [(("eval", "demo", "--max-ppl-increase", "1%"), 2, "baseline")],
        "weights_only": [(("eval", "demo", "--weights-only", "--text", "text.txt", "--window", "8"), 0, NOT_USED)],
        "on_nonfinite": "it decides what happens where there is one",
        "allow_pickle": [
            (("eval", "demo", "--allow-pickle", "--text", "text.txt", "--window", "8"), 0, "has safetensors files")
        ],
        "dtype": "it is computed in",
        "device": "it runs there, or is refused",
        "threads": "so many compute",
        "trust_remote_code": [
            (("eval", "demo", "--trust-remote-code", "--text", "text.txt", "--window", "8"), 0, NOT_USED)
        ],
        "directory": "what it is about",
    },
    "verify": {
        "offline": "a promise that holds",
        "directory": "what it is about",
        "source": "it is compared with",
        "target": [(("verify", "MADE", "--target", "none"), 0, NOT_USED)],
        "on_nonfinite": "it decides what happens where there is one",
        "hashes": [
            (("verify", "PEER", "--hashes"), 8, "no manifest"),
            (("verify", "PEER", "--no-hashes"), 0, "no manifest"),
        ],
        "degrees": "another check is made",
        "allow_pickle": [
            (
                ("verify", "MADE", "--allow-pickle"),
                2,
                "needs --source: only the original model is read from pickle files",
            ),
            (("verify", "MADE", "--source", "demo", "--allow-pickle"), 0, "has safetensors files"),
        ],
        "min_sqnr": [(("verify", "MADE", "--min-sqnr", "20"), 2, "needs --source, the model to compare with")],
    },
    "compare": {
        "allow_pickle": [(("compare", "demo", "demo", "--allow-pickle"), 0, "has safetensors files")],
        **dict.fromkeys(("a", "b"), "what it is about"),
        "limit": "how much of the answer is shown",
        "html": "a page beside the answer",
        "min_sqnr": "it decides the exit code",
        "offline": "a promise that holds",
    },
    "convert": {
        "threads": "so many compute",
        "directory": "what it is about",
        **dict.fromkeys(("to", "to_output"), "where it goes"),
        "allow_pickle": [
            (("convert", "MADE", "--to", "quark", "-o", "pickled", "--allow-pickle"), 0, "has safetensors files")
        ],
        "overwrite": [(("convert", "MADE", "--to", "quark", "-o", "out", "--overwrite"), 0, NOT_USED)],
    },
    "push": {
        **dict.fromkeys(("directory", "repository"), "what it is about"),
        "private": "of a repository that is made",
        "overwrite": "a line says when there was nothing; tests/disk/test_push.py",
    },
    "inspect": {
        "allow_pickle": [(("inspect", "demo", "--allow-pickle"), 0, "has safetensors files")],
        "model": "what it is about",
        "revision": [(("inspect", "demo", "--revision", "v2"), 0, "has no revisions")],
        "offline": "a promise that holds",
    },
    "report": {
        "directory": "what it is about",
        **dict.fromkeys(("form", "html"), "another form of the answer"),
        "to": [(("report", "out", "page.html"), 2, "a file works only with --html")],
    },
    "recipes show": {"name": "what it is about", "resolved": "another form of the answer"},
    "recipes normalize": {"name": "what it is about"},
    "recipes convert": {"name": "what it is about", "to": "where it goes"},
    "recipes schema": {"to": "where it goes"},
    "recipes validate": {
        "name": "what it is about",
        "model": "it is resolved against",
        "allow_pickle": [
            (("recipes", "validate", "nvfp4", "--allow-pickle"), 2, "needs --model: only a model is read"),
            (("recipes", "validate", "nvfp4", "--model", "demo", "--allow-pickle"), 0, "has safetensors files"),
        ],
    },
    "recipes explain": {
        **dict.fromkeys(("name", "slot"), "what it is about"),
        "model": "it is resolved against",
        "allow_pickle": [
            (
                ("recipes", "explain", "nvfp4", "lm_head", "--model", "demo", "--allow-pickle"),
                0,
                "has safetensors files",
            )
        ],
    },
    "recipes copy": {"name": "what it is about", "destination": "where it goes"},
    "init": {
        "model": "what it is about",
        **dict.fromkeys(("gpu", "server", "tp"), "what is chosen for"),
        "to": "where it goes",
        "offline": "a promise that holds",
        "revision": [(("init", "demo", "--gpu", "h100", "--revision", "v2"), 0, "has no revisions")],
        "allow_pickle": [(("init", "demo", "--gpu", "h100", "--allow-pickle"), 0, "has safetensors files")],
    },
    "schemes list": dict.fromkeys(("server", "gpu"), "what is listed"),
    "schemes show": {"name": "what it is about"},
    "algorithms show": {"name": "what it is about"},
    "models show": {"name": "what it is about", "resolved": "another form of the answer"},
    "data preview": {
        "model": "what everything is about",
        **dict.fromkeys(("recipe", "calib_data", "calib_samples", "calib_seqlen", "seed", "bos"), "as in quantize"),
        "offline": "a promise that holds",
        "limit": "how much of the answer is shown",
        "chat_template": [((*PREVIEW, "builtin", "--chat-template", "text.txt"), 0, NOT_USED)],
        "calib_column": [((*PREVIEW, "text.txt", "--calib-column", "text"), 0, NOT_USED)],
        "allow_short": [((*PREVIEW, "builtin", "--allow-short"), 0, "no number of rows")],
        "trust_remote_code": [((*PREVIEW, "builtin", "--trust-remote-code"), 0, "brings no code")],
        "allow_pickle": [((*PREVIEW, "builtin", "--allow-pickle"), 0, "has safetensors files")],
        "revision": [((*PREVIEW, "builtin", "--revision", "v2"), 0, "has no revisions")],
    },
    "models infer": {
        "model": "what it is about",
        "to": "where it goes",
        "revision": [(("models", "infer", "demo", "--revision", "v2"), 0, "has no revisions")],
        "allow_pickle": [(("models", "infer", "demo", "--allow-pickle"), 0, "has safetensors files")],
        "offline": "a promise that holds",
    },
}
SHOWN = {"json", "quiet", "debug", "log_level", "log_format"}  # how the answer of any command looks


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its words."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, (*words, name))
        else:
            yield " ".join(words), command

    return walk(typer.main.get_command(main.app), ())


def test_every_flag_has_a_case():
    known = set(IDLE) | set(ALWAYS)
    assert set(JobFlags.__dataclass_fields__) == known
    of_python = {field.name for record in (Options, Overrides) for field in fields(record)}
    assert of_python - {"overrides", "entries", "command"} <= known
    for name, command in commands():
        flags = {parameter.name for parameter in command.params}
        shared = known if name in ("quantize", "plan") else SHOWN
        assert flags - shared == set(OTHERS.get(name, ())), name


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """What the command lines name, in the directory in which they run."""
    (tmp_path / "text.txt").write_text("A text of a few words, so that there is one window of it.")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A text.")
    (tmp_path / "CACHE").write_text(
        "schema: quark/recipe/1\nmetadata: {description: x}\n"
        "quantize: {quant_cfg: [{quantizer_path: '*', enable: false}], kv_cache: fp8}\n"
    )
    return tmp_path


PLANS = [(flag, case) for flag, cases in IDLE.items() for case in cases]


@pytest.mark.parametrize(("flag", "case"), PLANS, ids=[f"{flag}-{n}" for n, (flag, _) in enumerate(PLANS)])
def test_a_flag_that_cannot_act_is_said(quark, here, monkeypatch, flag: str, case: Case):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    arguments, code, said = case
    answer = quark("plan", *arguments)
    assert answer.code == code, answer.err
    assert said in answer.err
    (names,) = (
        parameter.opts + parameter.secondary_opts
        for parameter in dict(commands())["plan"].params
        if parameter.name == flag
    )
    line = next(line for line in answer.err.splitlines() if said in line)
    assert code or any(name in line for name in names)


MORE = [(name, flag, case) for name, flags in OTHERS.items() for flag, cases in flags.items()
        if not isinstance(cases, str) for case in cases]  # fmt: skip


@pytest.mark.parametrize(("name", "flag", "case"), MORE, ids=[f"{name}-{flag}" for name, flag, _ in MORE])
def test_a_flag_of_another_command_that_cannot_act(quark, here, made, monkeypatch, name: str, flag: str, case: Case):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    arguments, code, said = case
    stands = {"MADE": made}
    if name == "eval":  # which takes directories alone
        stands = {"demo": EMBEDDED, "NO_BOS": runs.build("llama", here / "llama")}
    if "PEER" in arguments:
        stands["PEER"] = copytree(made, here / "peer", ignore=ignore_patterns("quark"))
    answer = quark(*(str(stands.get(word, word)) for word in arguments))
    assert answer.code == code, answer.err
    assert said in answer.err + answer.out
