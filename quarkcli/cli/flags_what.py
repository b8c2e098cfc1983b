"""Flags of a job: which model, what becomes of it, and where the result goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from quarkcli.cli.completion import names
from quarkcli.cli.flags import Model, Option, Servers

_Many = list[str] | None


@dataclass
class WhatFlags:
    model: Model
    scheme: Annotated[
        str | None,
        Option("--scheme", metavar="NAME", autocompletion=names("schemes"), help="See 'quark schemes list'."),
    ] = None
    recipe: Annotated[
        str | None,
        Option(
            "--recipe",
            metavar="NAME_OR_FILE",
            autocompletion=names("ptq"),
            help="Instead of --scheme; see 'quark recipes list'.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the recipe, calibration.samples=64, or a parameter of an algorithm, gptq.damp=0.05. "
            "Repeatable.",
        ),
    ] = None
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="Where to write. [default: ./<model>-<scheme>]")
    ] = None
    dialect: Annotated[
        str | None,
        Option(
            "--dialect",
            "--format",
            metavar="NAMES",
            help="On-disk convention, or auto: one that most servers load. Of a comma list, each gets a directory of "
            "its name in the output, all from one run. [default: the recipe's, else auto]",
        ),
    ] = None
    target: Servers = "auto"
    tp: Annotated[
        int | None,
        Option(
            "--tp",
            min=1,
            metavar="N",
            help="Servers must be able to split it over N devices (tensor parallel); else stop before the work.",
        ),
    ] = None
    exclude: Annotated[
        _Many,
        Option("--exclude", metavar="PATTERN", help="Keep these modules as they are: glob, or re:REGEX. Repeatable."),
    ] = None
    include: Annotated[
        _Many, Option("--include", metavar="PATTERN", help="Quantize these although excluded by default. Repeatable.")
    ] = None
    layers: Annotated[
        _Many,
        Option("--layer", metavar="PATTERN=SCHEME", help="Another scheme for these modules; later wins. Repeatable."),
    ] = None
    layer_types: Annotated[
        _Many,
        Option("--layer-type", metavar="CLASS=SCHEME", help="The same by class: Linear or Embedding. Repeatable."),
    ] = None
    unprotect: Annotated[
        _Many,
        Option(
            "--unprotect", metavar="ROLE", help="Drop the default exclusion of a role: head, embedding, ... Repeatable."
        ),
    ] = None
    on_indivisible: Annotated[
        Literal["error", "keep", "pad"],
        Option(
            "--on-indivisible",
            help="Modules whose width is no multiple of the scheme's group: an error; keep: they stay as they are; "
            "pad: the last group of a row is shorter, which no server loads.",
        ),
    ] = "error"
    allow_unmatched: Annotated[
        bool, Option("--allow-unmatched", help="A pattern that matches no module is not an error.")
    ] = False
    kv_cache: Annotated[
        str | None,
        Option(
            "--kv-cache",
            metavar="NAME",
            autocompletion=names("kv_cache"),
            help="Quantize the KV cache: fp8, nvfp4, or none.",
        ),
    ] = None
    attention: Annotated[
        str | None,
        Option(
            "--attention",
            metavar="NAME",
            autocompletion=names("attention"),
            help="Quantize queries, keys, values and softmax outputs: fp8, or none.",
        ),
    ] = None
    min_kv_scale: Annotated[
        float | None, Option("--min-kv-scale", metavar="F", help="Scales of the KV cache are at least this.")
    ] = None
    algorithm: Annotated[
        str | None,
        Option(
            "--algorithm",
            metavar="NAMES",
            help="Comma list in order, such as smoothquant,gptq, or auto: the default advice for each format. "
            "See 'quark algorithms list'. [default: the recipe's]",
        ),
    ] = None
