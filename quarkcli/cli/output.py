"""Prints for all commands: data on stdout, all else on stderr. It imports Rich only for a terminal.

What stands on stderr is text, JSON lines or text with GitHub's annotations (`session.format`); in JSON, no other line
does. Messages below `session.level` are not shown.

Colour follows NO_COLOR, then FORCE_COLOR, then TERM=dumb, then whether the stream is a terminal; no meaning is carried
by colour alone. A reader that closes the pipe ends nothing: what follows goes to the null device. An answer that could
not be written for another reason (a full disk) is kept in `session.lost`, and decides the exit code.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from quarkcli.cli import github, tables
from quarkcli.errors import ExitCode, QuarkError, UsageError
from quarkcli.events import Event, Level, Message

Stream = Literal["stdout", "stderr"]
Format = Literal["text", "json", "github"]
FORMAT_VARIABLE = "QUARK_LOG_FORMAT"
_RANK: dict[Level, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
ERROR_SCHEMA = "quark/error/1"
# Control characters but line ends and tabs, and marks that change the direction of text.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
STOPS = {ExitCode.STOPPED, ExitCode.INTERRUPTED, ExitCode.TERMINATED}
_CODES = {"bold": "1", "red": "31", "yellow": "33"}


@dataclass
class Session:
    """The settings of the command under way; the error handler reads them.

    format   what stands on stderr
    level    messages below it are dropped
    debug    tracebacks are shown
    stderr   where our own lines go while descriptor 2 collects those of libraries; None: to sys.stderr
    partial  the directory in which a quantization works, once it is known
    done     the output that stands, whatever happens from here on
    arguments   of the command line
    lost     why a part of the answer did not reach stdout
    """

    format: Format = "text"
    level: Level = "info"
    debug: bool = False
    stderr: TextIO | None = None
    partial: Path | None = None
    done: Path | None = None
    lost: str = ""
    arguments: tuple[str, ...] = ()


session = Session()


def start(
    *,
    json: bool = False,
    debug: bool = False,
    quiet: bool = False,
    log_format: Format | None = None,
    log_level: Level = "info",
) -> None:
    """Begins a command. `debug` only adds to what the environment said; `log_format` None: as `json` asks.

    Of `quiet` and `log_level` the one counts that shows less.
    """
    if log_format is not None or json:
        session.format = log_format or "json"
    session.level = max(log_level, "warning" if quiet else "debug", key=lambda level: _RANK[level])
    session.debug = session.debug or debug
    _hush_libraries(bars=session.format != "text" or not shows("info") or not is_terminal("stderr"))


def shows(level: Level) -> bool:
    """True when messages of a level are shown."""
    return _RANK[level] >= _RANK[session.level]


def _hush_libraries(bars: bool) -> None:
    """Silences chatter, and bars, of the libraries, which are imported after this; a user's choice stays."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE") if bars else ():
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def reset(argv: Sequence[str]) -> None:
    """Restores the state before any command; a wrong command line is answered in the format that it asked for."""
    session.format = _asked_format(argv)
    session.level = "info"
    session.arguments = tuple(argv)
    session.debug = os.environ.get("QUARK_DEBUG", "") not in {"", "0"}
    session.partial = session.done = None
    session.lost = ""
    _open_streams()


def _asked_format(argv: Sequence[str]) -> Format:
    """Returns the format of `--log-format`, else of `--json`, else of the environment."""
    given = [word.partition("=")[2] for word in argv if word.startswith("--log-format=")]
    given += [after for word, after in pairwise(argv) if word == "--log-format"]
    given += ["json"] if "--json" in argv else []
    known: tuple[Format, ...] = get_args(Format)
    found = (form for name in [*given, os.environ.get(FORMAT_VARIABLE, "")] for form in known if form == name)
    return next(found, "text")


def check_environment() -> None:
    """Raises UsageError for a value of the environment that means nothing."""
    name = os.environ.get(FORMAT_VARIABLE, "")
    if name and name not in get_args(Format):
        raise UsageError(
            f"unknown format '{name}'",
            where=FORMAT_VARIABLE,
            hint=f"use one of {', '.join(get_args(Format))}",
            kind="E-FLAG-VALUE",
        )


def _open_streams() -> None:
    """Gives closed descriptors the null device: a file opened later must not become stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) != number:
                break
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - stays open until the process ends


# ---- the two streams


def shown(text: str) -> str:
    """Returns `text` with what would steer a terminal written out as in JSON: names come from anybody's files."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def data(text: str, *, whole: bool = False) -> None:
    """Prints a line of the answer, on stdout. `whole`: it is for a program as well, and no width breaks it."""
    if whole:
        _write("stdout", text)
    else:
        _lines("stdout", text)


def heading(text: str) -> None:
    """Prints a heading within the answer, on stdout."""
    for line in tables.wrapped(text, tables.room()):
        _write("stdout", "", paint(shown(line), "bold", "stdout"))


def json_data(value: Mapping[str, Any]) -> None:
    """Prints the answer as one JSON object, on stdout, that begins with `schema` and `ok`.

    `ok` is true unless `value` says otherwise. Numbers that JSON has no word for become null.
    """
    answer = {"schema": value["schema"], "ok": True, **value}
    data(json.dumps(_plain(answer), indent=2, ensure_ascii=False), whole=True)


def note(text: str) -> None:
    """Prints a line for people, on stderr; dropped with -q."""
    say(text)


def warning(text: str) -> None:
    """Prints a warning, on stderr; -q keeps it."""
    say(text, "warning")


def say(text: str, level: Level = "info", *, always: bool = False) -> None:
    """Prints a message, on stderr. `always`: whatever the level is."""
    if not (always or shows(level)):
        return
    if session.format == "json":
        _json_line({"event": "message", "time": round(time.time(), 3), "text": text, "level": level})
    elif session.format == "github" and level == "warning":
        _write("stderr", github.command("warning", text))
    elif level == "warning":
        _lines("stderr", text, "warning:", "yellow")
    else:
        _lines("stderr", text if level != "debug" else f"debug: {text}")


def tell(event: Event) -> None:
    """Prints the messages of what is no job: a listener."""
    if isinstance(event, Message):
        say(event.text, event.level, always=event.always)


def event(kind: str, fields: Mapping[str, Any], level: Level = "info") -> None:
    """Prints one JSON object on one line of stderr."""
    if shows(level):
        _json_line({"event": kind, **fields})


def _json_line(fields: Mapping[str, Any]) -> None:
    _write("stderr", json.dumps(_plain(fields), ensure_ascii=False))


def error(problem: QuarkError) -> None:
    """Prints an error on stderr: what and where, then the hint on a line of its own; or as JSON."""
    if session.format == "json":
        text = {"what": problem.what, "where": problem.where, "hint": problem.hint}
        code = {"code": int(problem.code), "id": problem.kind or None}
        _json_line({"schema": ERROR_SCHEMA, "event": "error", **code, **text})
        return
    stopped = problem.code in STOPS
    if session.format == "github" and not stopped:
        said = "\n".join(filter(None, (str(problem), problem.hint)))
        _write("stderr", github.command("error", said, title=problem.kind))
        return
    word, colour = ("stopped", "yellow") if stopped else ("error", "red")
    _lines("stderr", str(problem) if stopped else shown_error(problem), f"{word}:", colour)
    if problem.hint:
        _lines("stderr", problem.hint, "hint:", "bold")


def shown_error(problem: QuarkError) -> str:
    """Returns an error with its code behind the first line, for `quark explain`."""
    first, *more = str(problem).split("\n")
    return "\n".join([f"{first} [{problem.kind}]" if problem.kind else first, *more])


def summarize(markdown: str) -> None:
    """Adds Markdown to the summary of a step of GitHub Actions, where there is one."""
    if failure := github.summarize(markdown):
        warning(failure)


def traceback(text: str) -> None:
    """Prints a traceback, on stderr, whatever the level is."""
    if session.format == "json":
        _json_line({"event": "traceback", "text": text})
    else:
        _write("stderr", text)


def show_cursor() -> None:
    """Brings back the cursor that a bar hides."""
    if session.format != "json" and is_terminal("stderr"):
        sys.stderr.write("\x1b[?25h")


def _lines(name: Stream, text: str, lead: str = "", style: str = "") -> None:
    """Prints text for people, broken where the terminal ends. `lead`: our own word before it, which may be painted."""
    width = tables.room(name)
    for number, line in enumerate(text.split("\n")):
        taken = len(lead) + 1 if lead and number == 0 else 0
        first, *more = tables.wrapped(line, width, taken)
        _write(name, first, paint(lead, style, name) if taken else "")
        for rest in more:
            _write(name, rest)


def _write(name: Stream, text: str, lead: str = "") -> None:
    text = " ".join(filter(None, (lead, shown(text))))
    stream: TextIO = session.stderr if name == "stderr" and session.stderr is not None else getattr(sys, name)
    try:
        try:
            stream.write(text + "\n")
        except UnicodeEncodeError:  # a path with bytes that are no text, or a terminal without UTF-8
            encoding = stream.encoding or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        _silence(name, stream)
    except (OSError, ValueError) as error:  # full, hung up, closed
        _silence(name, stream)
        if name == "stdout":
            session.lost = getattr(error, "strerror", None) or str(error)


def _silence(name: Stream, stream: TextIO) -> None:
    """Sends the rest to the null device, also what the interpreter flushes at its end."""
    null = Path(os.devnull).open("w")  # noqa: SIM115 - stays open until the process ends
    with suppress(OSError, ValueError):  # a stream that is closed has no descriptor
        os.dup2(null.fileno(), stream.fileno())
    setattr(sys, name, null)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    return value


# ---- colour and tables


def is_terminal(name: Stream) -> bool:
    """True when the stream is a terminal that understands more than plain lines."""
    return os.environ.get("TERM") != "dumb" and bool(getattr(sys, name).isatty())


def has_colour(name: Stream) -> bool:
    """True when a stream is to be coloured."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_terminal(name)


def paint(text: str, style: str, name: Stream) -> str:
    """Returns `text` in a style (bold, red, yellow) where the stream has colour."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if has_colour(name) else text


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table on stdout, as wide as the terminal; where there is none, no width breaks a line."""
    cells = [[shown(str(cell)) for cell in row] for row in rows]
    for number, line in enumerate(tables.table(headers, cells, tables.room("stdout"))):
        is_head = number == 0 and line.startswith(headers[0])
        _write("stdout", "" if is_head else line, paint(line, "bold", "stdout") if is_head else "")


def pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Returns labelled lines: `size        3.7 MB -> 2.5 MB`; an empty label continues the one above."""
    return [f"{label:<12}{text}".rstrip() for label, text in rows]


def listed(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Returns rows for `pairs`: the label before the first of some texts."""
    return [(label if number == 0 else "", text) for number, text in enumerate(texts)]


def yes(value: object) -> str:
    """Returns a truth value as a word for tables."""
    return "yes" if value else "no"


def size(count: float) -> str:
    """Returns bytes for people, decimal units: `3.68 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
