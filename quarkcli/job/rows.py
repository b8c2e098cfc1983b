"""Makes the calibration rows of a job: from data with the model's tokenizer, or written by the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quarkcli.disk.source import Source
from quarkcli.disk.writer import partial_path
from quarkcli.errors import AccessError, DataError, UsageError
from quarkcli.events import Listener, Message, Working
from quarkcli.forward.defaults import SELF
from quarkcli.job import authored, judging
from quarkcli.job.authored import Author
from quarkcli.job.options import Calibration, Options, Prepared

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData
    from quarkcli.model.tokenizer import Tokenizer as LoadedTokenizer


def token_rows(prepared: Prepared, tell: Listener) -> CalibrationData | None:
    """Returns the calibration rows (first half of step 7), or None when nothing needs data.

    Raises DataError, AccessError.
    """
    settings, options = prepared.calibration, prepared.options
    if settings is None:
        return None
    if settings.source == SELF and prepared.download is not None:
        raise UsageError(
            "a model can write text only if it is on a local disk, and this one is on the hub",
            where="--calib-data self",
            hint="run 'hf download' first",
            kind="E-FLAG-CONFLICT",
        )
    return rows_of(settings, options, tokenizer_of(prepared.source, options), tell, author_of(prepared))


def author_of(prepared: Prepared) -> Author:
    """Returns the model as one that writes rows; those of an interrupted run lie where this one works."""
    kept = partial_path(prepared.output) / prepared.folder / authored.FILE
    return Author(prepared.source, prepared.weights, prepared.layout.transposed_experts, prepared.options, kept)


def tokenizer_of(source: Source, options: Options) -> LoadedTokenizer:
    """Returns the model's tokenizer, with the chat template that was asked for. Raises ModelError, AccessError."""
    from quarkcli.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source.whole_folder(), options.trust_remote_code)
    if options.chat_template is not None:
        tokenizer.use_template(_template(options.chat_template))
    return tokenizer


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise AccessError(f"the chat template cannot be read: {why}", where=str(path), kind="E-FILE-READ") from error


def rows_of(
    settings: Calibration, options: Options, tokenizer: LoadedTokenizer, tell: Listener, author: Author
) -> CalibrationData:
    """Returns calibration rows as settings say. Raises DataError, AccessError, ResourceError.

    author   the model, where it is to write them
    """
    from quarkcli.forward import data

    tell(Working(f"making calibration rows from {settings.source}"))
    held = judging.held_out(options, settings)
    rows = (
        author.rows(settings, tokenizer, held, tell)
        if settings.source == SELF
        else data.load(
            settings.source,
            tokenizer,
            samples=settings.samples,
            seqlen=settings.seqlen,
            seed=settings.seed,
            column=settings.column,
            asked=settings.asked,
            allow_short=options.allow_short,
            offline=options.offline,
            bos=settings.bos,
            held=held,
        )
    )
    judging.check_rows(options, rows)
    if options.chat_template is not None and rows.mask is None:
        text = f"--chat-template {options.chat_template} is not used: no conversation in {rows.source}"
        tell(Message(text, "warning"))
    if rows.notes and options.strict:
        raise DataError(
            rows.notes[0],
            where=rows.source,
            hint="fix it, or leave --strict out to make it a warning",
            kind="E-DATA-STRICT",
        )
    for note in rows.notes:
        tell(Message(note, "warning"))
    tell(Message(f"calibration: {len(rows.tokens)} rows of {rows.tokens.shape[1]} tokens from {rows.source}"))
    return rows


def keep(prepared: Prepared, data: CalibrationData | None, partial: Path) -> None:
    """Keeps rows that the model wrote beside every output."""
    if data is None or data.source != SELF or prepared.calibration is None:
        return
    tokenizer = tokenizer_of(prepared.source, prepared.options)
    for one in prepared.every:
        author_of(prepared).keep(data, prepared.calibration, tokenizer, partial / one.folder)
