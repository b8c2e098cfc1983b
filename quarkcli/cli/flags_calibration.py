"""Flags of a job: the data that it is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from quarkcli.cli.flags import Option
from quarkcli.cli.flags_what import WhatFlags


@dataclass
class CalibrationFlags(WhatFlags):
    calib_data: Annotated[
        str | None,
        Option(
            "--calib-data",
            metavar="SOURCE",
            help="File (.jsonl, .json, .parquet, .txt, .md; .gz as well), directory, hub data set, 'builtin', or "
            "'self': text that the model writes; rows that cannot be used are skipped and counted. [default: the "
            "recipe's, else a hub set when it can be reached, else builtin with a warning]",
        ),
    ] = None
    calib_samples: Annotated[
        int | None, Option("--calib-samples", min=1, metavar="N", help="Rows. [default: the recipe's, else 512]")
    ] = None
    calib_seqlen: Annotated[
        int | None, Option("--calib-seqlen", min=2, metavar="N", help="Tokens per row. [default: recipe's, else 512]")
    ] = None
    calib_batch: Annotated[
        int | None, Option("--calib-batch", min=1, metavar="N", help="Rows that run together on a GPU. [default: auto]")
    ] = None
    calib_column: Annotated[
        str | None,
        Option(
            "--calib-column",
            metavar="NAME",
            help="Column with text or messages. [default: messages, conversations, text, or prompt and response]",
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        Option(
            "--chat-template",
            metavar="FILE",
            help="Jinja template that turns conversations into rows, instead of the tokenizer's own; the checkpoint's "
            "stays as it is.",
        ),
    ] = None
    bos: Annotated[
        Literal["auto", "on", "off"] | None,
        Option(
            "--bos",
            help="Whether rows begin with the tokenizer's BOS token; auto: as the tokenizer, or the chat template, "
            "begins a text.",
            show_default="recipe's, else auto",
        ),
    ] = None
    allow_short: Annotated[bool, Option("--allow-short", help="Fewer rows than asked for are used, not an error.")] = (
        False
    )
    moe_calibration: Annotated[
        Literal["routed", "all"] | None,
        Option(
            "--moe-calibration",
            help="Tokens an expert is calibrated on: those routed to it, or all.",
            show_default="routed",
        ),
    ] = None
    min_expert_tokens: Annotated[
        int | None,
        Option(
            "--min-expert-tokens",
            min=1,
            metavar="N",
            help="Experts that see fewer tokens take the statistics of their layer.",
            show_default="1",
        ),
    ] = None
    seed: Annotated[
        int | None, Option("--seed", metavar="N", help="Seed of the choice of calibration rows.", show_default="0")
    ] = None
