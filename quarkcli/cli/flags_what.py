"""Defines the flags of a job about the model, the formats and the place of the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from quarkcli.cli.amounts import number
from quarkcli.cli.completion import names
from quarkcli.cli.flags import Model, Option, Servers

_Many = list[str] | None


@dataclass
class WhatFlags:
    model: Model
    scheme: Annotated[
        str | None,
        Option(
            "--scheme",
            metavar="NAME",
            autocompletion=names("schemes"),
            help="How to quantize: the name of a scheme. 'quark schemes list' shows all.",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        Option(
            "--recipe",
            metavar="NAME_OR_FILE",
            autocompletion=names("ptq"),
            help="Use a recipe instead of --scheme: a YAML file, or a name from 'quark recipes list'.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, such as calibration.samples=64, or of an algorithm, such as "
            "gptq.damp=0.05. Repeatable.",
        ),
    ] = None
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="DIR", help="Write the checkpoint here. [default: ./<model>-<scheme>]"),
    ] = None
    dialect: Annotated[
        str | None,
        Option(
            "--dialect",
            "--format",
            metavar="NAMES",
            help="Checkpoint format, such as compressed-tensors. auto: the one that most servers load. With a "
            "comma list, one run writes all of them, each into a directory of its name. [default: the "
            "recipe's, else auto]",
        ),
    ] = None
    target: Servers = "auto"
    tp: Annotated[
        int | None,
        Option(
            "--tp",
            min=1,
            metavar="N",
            help="Stop before the work unless servers can split the result over N devices (tensor parallel).",
        ),
    ] = None
    exclude: Annotated[
        _Many,
        Option("--exclude", metavar="PATTERN", help="Do not quantize these modules: a glob, or re:REGEX. Repeatable."),
    ] = None
    include: Annotated[
        _Many,
        Option(
            "--include",
            metavar="PATTERN",
            help="Quantize these modules although they are excluded by default. Repeatable.",
        ),
    ] = None
    layers: Annotated[
        _Many,
        Option(
            "--layer",
            metavar="PATTERN=SCHEME",
            help="Use another scheme for these modules; the last match wins. Repeatable.",
        ),
    ] = None
    layer_types: Annotated[
        _Many,
        Option(
            "--layer-type",
            metavar="CLASS=SCHEME",
            help="Use another scheme for all modules of a class: Linear or Embedding. Repeatable.",
        ),
    ] = None
    unprotect: Annotated[
        _Many,
        Option(
            "--unprotect",
            metavar="ROLE",
            help="Allow a kind of tensor (role) that is kept by default to be "
            "quantized: head, embedding, ... Repeatable.",
        ),
    ] = None
    on_indivisible: Annotated[
        Literal["error", "keep", "pad"],
        Option(
            "--on-indivisible",
            help="What to do when the group size does not divide the width of a weight. error: stop. keep: do not "
            "quantize it. pad: make the last group of a row shorter, which no server loads.",
        ),
    ] = "error"
    allow_unmatched: Annotated[
        bool, Option("--allow-unmatched", help="Do not stop at a pattern that matches no module.")
    ] = False
    kv_cache: Annotated[
        str | None,
        Option(
            "--kv-cache",
            metavar="NAME",
            autocompletion=names("kv_cache"),
            help="Quantize the KV cache: fp8, nvfp4, or none. [default: the recipe's]",
        ),
    ] = None
    attention: Annotated[
        str | None,
        Option(
            "--attention",
            metavar="NAME",
            autocompletion=names("attention"),
            help="Quantize queries, keys, values and softmax outputs: fp8, or none. [default: the recipe's]",
        ),
    ] = None
    min_kv_scale: Annotated[
        float | None,
        Option("--min-kv-scale", parser=number, metavar="F", help="Raise every scale of the KV cache to at least F."),
    ] = None
    algorithm: Annotated[
        str | None,
        Option(
            "--algorithm",
            metavar="NAMES",
            help="Algorithms in the order they run, such as smoothquant,gptq. auto: the ones advised for each "
            "format. 'quark algorithms list' shows all. [default: the recipe's]",
        ),
    ] = None
