"""Defines the flags of a job about its calibration data."""

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
            help="Text to calibrate on: a file (.jsonl, .json, .parquet, .txt, .md; also .gz), a directory, a hub data "
            "set, 'builtin', or 'self' for text that the model writes. Rows that cannot be used are skipped and "
            "counted. [default: the recipe's, else a hub set when it can be reached, else builtin with a warning]",
        ),
    ] = None
    calib_samples: Annotated[
        int | None,
        Option(
            "--calib-samples", min=1, metavar="N", help="Number of calibration rows. [default: the recipe's, else 512]"
        ),
    ] = None
    calib_seqlen: Annotated[
        int | None,
        Option("--calib-seqlen", min=2, metavar="N", help="Tokens in each row. [default: the recipe's, else 512]"),
    ] = None
    calib_batch: Annotated[
        int | None, Option("--calib-batch", min=1, metavar="N", help="Rows that run together on a GPU. [default: auto]")
    ] = None
    calib_column: Annotated[
        str | None,
        Option(
            "--calib-column",
            metavar="NAME",
            help="Column that holds the text or the messages. [default: messages, conversations, text, or prompt "
            "and response]",
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        Option(
            "--chat-template",
            metavar="FILE",
            help="Jinja template that turns conversations into rows, instead of the tokenizer's own. The "
            "checkpoint keeps its own template.",
        ),
    ] = None
    bos: Annotated[
        Literal["auto", "on", "off"] | None,
        Option(
            "--bos",
            help="Begin each row with the tokenizer's BOS token. auto: as the tokenizer or the chat template "
            "begins a text.",
            show_default="the recipe's, else auto",
        ),
    ] = None
    allow_short: Annotated[bool, Option("--allow-short", help="Go on when there are fewer rows than asked for.")] = (
        False
    )
    moe_calibration: Annotated[
        Literal["routed", "all"] | None,
        Option(
            "--moe-calibration",
            help="Tokens that calibrate an expert of a MoE model: those routed to it, or all.",
            show_default="routed",
        ),
    ] = None
    min_expert_tokens: Annotated[
        int | None,
        Option(
            "--min-expert-tokens",
            min=1,
            metavar="N",
            help="An expert that sees fewer tokens uses the statistics of its whole layer.",
            show_default="1",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option(
            "--seed",
            min=0,
            max=2**63 - 1,
            metavar="N",
            help="Seed of what is random: the choice of calibration rows, the signs of a rotation.",
            show_default="0",
        ),
    ] = None
