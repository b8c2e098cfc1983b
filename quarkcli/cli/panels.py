"""Sorts the flags of a large command into panels, and fits its help into a terminal of any width."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import typer.core

from quarkcli.cli import tables

MANY = 8  # flags of a command that still are one list
WIDEST = 100
WHOLE = 1000  # characters of a first sentence
_NARROW = 60  # columns below which the text of a flag stands under it
_VALUE = re.compile(r"( --?[a-z-]+) (?=[^ -])")  # a flag stays with its value
_FORMATTER: Any = typer.Context.formatter_class

# Panel -> names of parameters, for all commands. Any other flag is about what is done.
PANELS = {
    "Model": "model source baseline revision trust_remote_code allow_pickle offline keep_download",
    "What": "scheme schemes recipe settings algorithm exclude include layers layer_types unprotect on_indivisible "
    "allow_unmatched kv_cache attention min_kv_scale target tp degrees gpu server budget size min_sqnr hashes max_kl "
    "max_ppl_increase weights_only limit modules full check_model",
    "Calibration": "calib_data calib_samples calib_seqlen calib_batch calib_column chat_template bos allow_short "
    "moe_calibration min_expert_tokens seed text window tokens",
    "Output": "output to to_output dialect overwrite verify evaluate scores html json",
    "Run": "device threads dtype resume strict on_nonfinite time_budget max_cpu_mem max_gpu_mem offload dry_run ranks "
    "rates quiet progress log_level log_format debug help",
}
_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}


def panel(name: str) -> str:
    """Returns the panel of a flag."""
    return _OF.get(name, "What")


class Formatter(_FORMATTER):
    """Lays help out for the terminal's width, however narrow."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.width = max(20, min(shutil.get_terminal_size().columns, WIDEST) - 2)

    def write_dl(self, rows: Sequence[tuple[str, str]], *arguments: Any, **settings: Any) -> None:
        if self.width >= _NARROW:
            super().write_dl(rows, *arguments, **settings)
            return
        lead = " " * self.current_indent
        for first, second in rows:
            self.write("".join(f"{lead}{line}\n" for line in tables.fold(first, self.width - len(lead))))
            self.write("".join(f"{lead}    {line}\n" for line in tables.fold(second, self.width - len(lead) - 4)))


class Context(typer.Context):
    formatter_class = Formatter


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Writes arguments and flags of a command: many flags panel by panel."""
    records = [(flag, record) for flag in command.get_params(ctx) if (record := flag.get_help_record(ctx)) is not None]
    arguments = [record for flag, record in records if flag.param_type_name == "argument"]
    flags = [(flag, record) for flag, record in records if flag.param_type_name == "option"]
    sections = {"Arguments": arguments}
    if len(flags) <= MANY:
        sections["Options"] = [record for _, record in flags]
    else:
        sections |= {name: [record for flag, record in flags if panel(flag.name) == name] for name in PANELS}
    for name, rows in sections.items():
        if rows:
            with formatter.section(name):
                formatter.write_dl(rows)


def write_commands(group: Any, ctx: Any, formatter: Any) -> None:
    """Writes the commands of a group, each with its first sentence, whole."""
    found = ((name, group.get_command(ctx, name)) for name in group.list_commands(ctx))
    with formatter.section("Commands"):
        formatter.write_dl([(name, command.get_short_help_str(WHOLE)) for name, command in found])


def fitted(text: str) -> str:
    """Returns help with lines that are too long broken: a command line so that a shell still takes it."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    return "\n".join(line for whole in text.split("\n") for line in _fitted(whole, width))


def _fitted(line: str, width: int) -> Iterator[str]:
    if len(line) <= width or not line.strip().startswith(("quark ", "torchrun ")):
        yield from tables.wrapped(line, width)
        return
    lead = line[: len(line) - len(line.lstrip())]
    pieces = tables.fold(_VALUE.sub(r"\1\0", line), width - len(lead) - 4)
    for number, piece in enumerate(pieces):
        more = " \\" if number < len(pieces) - 1 else ""
        yield f"{lead}{'  ' if number else ''}{piece}{more}".replace("\0", " ")
