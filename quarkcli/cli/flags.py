"""Defines the flags that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from quarkcli.cli.completion import targets

Option = typer.Option

Model = Annotated[
    str, Option("--model", metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo' for the embedded model.")
]
Json = Annotated[
    bool,
    Option("--json", help="Print the answer as one JSON object on stdout. Each line on stderr is a JSON object too."),
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Show only warnings and errors on stderr.")]
Debug = Annotated[bool, Option("--debug", help="Show the Python traceback of an error (also QUARK_DEBUG=1).")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Option("--device", help="Compute on the CPU or on a CUDA GPU. auto: the GPU if there is one."),
]
Threads = Annotated[
    int | None,
    Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads that compute on the CPU. The result does not depend on it. [default: OMP_NUM_THREADS, else "
        "the cores that this process may use]",
    ),
]
Trust = Annotated[
    bool,
    Option(
        "--trust-remote-code",
        help="Run the Python code in the model's directory. The author of the model wrote it, so read it first.",
    ),
]
Pickle = Annotated[
    bool,
    Option(
        "--allow-pickle",
        help="Read pytorch_model.bin files if there are no safetensors files. Only tensors are read; no code in "
        "them runs.",
    ),
]
Bos = Annotated[
    Literal["auto", "on", "off"],
    Option("--bos", help="Begin each row with the tokenizer's BOS token. auto: as the tokenizer begins a text."),
]
Nonfinite = Annotated[
    Literal["stop", "keep"],
    Option(
        "--on-nonfinite",
        help="What to do at NaN or inf in tensors that are not quantized. stop: end with an error. keep: warn.",
    ),
]
Revision = Annotated[str, Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")]
Offline = Annotated[bool, Option("--offline", envvar="HF_HUB_OFFLINE", help="Use only local files and the hub cache.")]
Servers = Annotated[
    str,
    Option(
        "--target",
        metavar="SERVER",
        autocompletion=targets,
        help="The server that must load the result, such as vllm. auto: any server, so weights that servers "
        "multiply together (q, k, v) need one scheme. none: skip this check.",
    ),
]
