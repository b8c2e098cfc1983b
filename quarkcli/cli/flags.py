"""Flags that several commands have, said once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from quarkcli.cli.completion import targets

Option = typer.Option

Model = Annotated[
    str, Option("--model", metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo' for the embedded model.")
]
Json = Annotated[
    bool, Option("--json", help="The answer as one JSON object on stdout; every line on stderr is a JSON object.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Only warnings and errors on stderr.")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks (also QUARK_DEBUG=1).")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option("--device", help="auto: the GPU where there is one.")]
Threads = Annotated[
    int | None,
    Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads that compute on the CPU; data-free, each does a weight of its own; the bytes are the same. "
        "[default: OMP_NUM_THREADS, else the cores that this process may use]",
    ),
]
Trust = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code that the model's directory brings: it is foreign code.")
]
Pickle = Annotated[
    bool,
    Option(
        "--allow-pickle",
        help="Read pytorch_model.bin files where there are no safetensors files: tensors alone, no code of theirs.",
    ),
]
Bos = Annotated[
    Literal["auto", "on", "off"],
    Option("--bos", help="Whether rows begin with the tokenizer's BOS token; auto: as the tokenizer begins a text."),
]
Nonfinite = Annotated[
    Literal["stop", "keep"],
    Option("--on-nonfinite", help="NaN or inf in tensors that stay as they are: an error, or a warning."),
]
Revision = Annotated[str, Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")]
Offline = Annotated[
    bool, Option("--offline", envvar="HF_HUB_OFFLINE", help="Use only what is local or in the hub cache.")
]
Servers = Annotated[
    str,
    Option(
        "--target",
        metavar="SERVER",
        autocompletion=targets,
        help="The server that must load it, such as vllm; auto: any, so that weights which they fuse have one scheme; "
        "none: nothing in particular.",
    ),
]
