"""Runs the `quark` command: finds the subcommand, and turns errors into a message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from signal import Signals
from typing import Annotated, Any, NoReturn

import typer

from quarkcli import __version__, memory, threads
from quarkcli.cli import (
    algorithms,
    apps,
    compare,
    convert,
    data,
    evaluate,
    foreign,
    github,
    init,
    inspect,
    mistakes,
    models,
    output,
    push,
    quantize,
    recipes,
    report,
    schemes,
    strangers,
    verify,
)
from quarkcli.cli import env as environment
from quarkcli.cli import search as searching
from quarkcli.cli.signals import CODES, Terminated, answered
from quarkcli.disk.outputs import LOG
from quarkcli.errors import ExitCode, QuarkError, ResourceError, UsageError
from quarkcli.model import deferred

# The base of all errors in a command line; Typer has no public name for it.
_CommandLineError: Any = typer.BadParameter.__base__

_EXAMPLES = apps.examples("quark quantize --model demo --scheme mxfp4 -o out", "quark recipes list")
app = apps.new("Quantize large language models from the command line.", _EXAMPLES, completion=True)
app.command("quantize", epilog=quantize.QUANTIZE_EXAMPLES)(quantize.quantize)
app.command("plan", epilog=quantize.PLAN_EXAMPLES)(quantize.plan)
app.command("init", epilog=init.EXAMPLES)(init.init)
app.command("search", epilog=searching.EXAMPLES)(searching.search)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("push", epilog=push.EXAMPLES)(push.push)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.add_typer(recipes.app, name="recipes")
app.add_typer(schemes.app, name="schemes")
app.add_typer(algorithms.app, name="algorithms")
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.command("env", epilog=environment.EXAMPLES)(environment.env)
app.command("explain", epilog=mistakes.EXAMPLES)(mistakes.explain)


class _Stopped(QuarkError):
    def __init__(self, what: str, code: ExitCode, hint: str, kind: str) -> None:
        super().__init__(what, hint=hint, kind=kind)
        self.code = code


def _show_version(asked: bool) -> None:
    if asked:
        output.data(f"quark {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXAMPLES)
def _quark(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Quantize large language models from the command line."""


def run() -> NoReturn:
    """Runs the command: the entry point. After a signal nothing waits for threads that libraries left behind."""
    deferred.ALLOWED = True
    memory.collect_later()
    threads.wait_asleep()
    code = main(last=True)
    if code in CODES.values():
        os._exit(code)  # every line was flushed when it was written
    sys.exit(code)


def main(argv: Sequence[str] | None = None, last: bool = False) -> int:
    """Runs a command line (without the program's name) and returns the exit code; never raises.

    last   the process ends behind it
    """
    arguments = [_expanded(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some costs a tenth of a short command
    output.reset(arguments)
    memory.share_heap()
    memory.keep_few_kernels()
    programs_read = last and output.session.format == "json"
    with foreign.apart() if programs_read else nullcontext(), answered(_last_words, last) as signals:
        code = _outcome(arguments, signals)
        if output.session.done is not None and code:
            output.say(f"{output.session.done} is complete; the exit code is 0", "warning", always=True)
            code = 0
        return _lost(code) if output.session.lost else code


def _outcome(arguments: list[str], signals: list[Signals]) -> int:
    """Runs a command line and returns its exit code. `signals`: those that came; an error behind one comes of it."""
    try:
        output.check_environment()
        _check_launch(arguments)
        with _without_warnings():
            code = _command()(arguments, prog_name="quark", standalone_mode=False)
    except Terminated:
        return _fail(_stopped(ExitCode.TERMINATED))
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_stopped(ExitCode.INTERRUPTED))
    except Exception as error:
        if signals:
            return _fail(_stopped(CODES[signals[0]]))
        try:
            return _failed(error)
        except (Terminated, KeyboardInterrupt):  # it comes once; torchrun sends it when another process was faster
            return _failed(error)
    if code == ExitCode.INTERRUPTED:  # Typer turns Ctrl-C into this value
        return _fail(_stopped(ExitCode.INTERRUPTED))
    return int(code or 0)


def _failed(error: Exception) -> int:
    """Tells an error and returns its exit code."""
    if isinstance(error, QuarkError):
        return _fail(error)
    if isinstance(error, _CommandLineError):
        return _wrong_command_line(error)
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        what = f"the locale's character set '{error.encoding}' has no letters for {error.object!a}"
        hint = "set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        return _fail(ResourceError(what, hint=hint, kind="E-SYSTEM"))
    return _fail(_environment(error)) if isinstance(error, OSError) else _unexpected(error)


@cache
def _command() -> Any:
    """Returns the command that Typer makes of the app, which takes 25 ms: a program that calls `main` does it once."""
    command = typer.main.get_command(app)
    for parameter in command.params:
        apps.lighten(parameter)  # Typer adds those of shell completion behind our back
    return command


def _expanded(argument: str) -> str:
    """Expands `--flag=~/x`, and a `~/x` that no shell has seen, as the shell does `--flag ~/x`."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    at_home = value == "~" or value.startswith("~/")
    return f"{flag}{equals}{os.path.expanduser(value)}" if at_home else argument  # noqa: PTH111 - never raises


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences Python warnings of libraries, which are for their developers; ours are events. Asked for, they stay."""
    with warnings.catch_warnings():
        if not sys.warnoptions and not output.session.debug:
            warnings.simplefilter("ignore")
        yield


def _check_launch(arguments: list[str]) -> None:
    """Raises UsageError for a command that would do its work in each of several processes."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if _is_launched() and command != "quantize":
        from quarkcli.job import ranks

        ranks.refuse(command)


def _is_launched() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _muted(error: QuarkError) -> tuple[QuarkError, int | None]:
    """Returns the error to tell, and the exit code where another process of a launch tells it; None: this one does."""
    if not _is_launched():
        return error, None
    from quarkcli.job import ranks

    return ranks.reason() or error, ranks.muted(int(error.code))


def _fail(error: QuarkError) -> int:
    error, muted = _muted(error)
    if muted is not None:
        return muted
    output.error(error)
    if error.code not in output.STOPS:
        lines = [*output.shown_error(error).splitlines(), *([f"hint: {error.hint}"] if error.hint else [])]
        output.summarize(github.section("quark ended with an error", [f"- {line}" for line in lines]))
    if output.session.debug and sys.exc_info()[0] is not None:
        output.traceback(traceback.format_exc().rstrip())
    return int(error.code)


def _last_words(code: ExitCode) -> None:
    """Prints the message for a signal that could not be answered in order."""
    error, muted = _muted(_stopped(code))
    if muted is not None:
        os._exit(muted)
    output.show_cursor()
    output.error(error)
    if error.code != code:  # another rank is the reason
        os._exit(error.code)


def _stopped(code: ExitCode) -> QuarkError:
    """Returns a signal's message; only a quantization that has begun can be gone on with."""
    partial = output.session.partial
    resumable = partial is not None and _is_there(partial)
    hint = f"run the same command again to continue; finished work is kept in {partial}" if resumable else ""
    if code == ExitCode.INTERRUPTED:
        return _Stopped("interrupted", code, hint, kind="E-INTERRUPTED")
    return _Stopped("terminated", code, hint, kind="E-TERMINATED")


def _wrong_command_line(error: Any) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "quark"
    known = strangers.hint(context, error.option_name) if hasattr(error, "possibilities") and context else ""
    text: str = error.message if known else strangers.plainly(error)
    if text.startswith("Usage:"):  # a group was called without a command: its help is the answer
        output.data(text)
        return int(ExitCode.USAGE)
    what = " ".join(text.split()).rstrip(".")
    hint = known or f"run '{path} --help' to see what it takes"
    return _fail(UsageError(what[:1].lower() + what[1:], hint=hint, kind="E-COMMAND-LINE"))


def _unexpected(error: Exception) -> int:
    if memory.ran_out(error):
        device = "GPU " if type(error).__name__ == "OutOfMemoryError" else ""
        hint = "use a smaller --calib-batch, --calib-samples or --calib-seqlen" + (
            "; or --device cpu" if device else ""
        )
        return _fail(ResourceError(f"there is not enough {device}memory", hint=hint, kind="E-MEMORY"))
    log = output.session.partial and output.session.partial / LOG
    place = f"; the log is {log}" if log and _is_there(log) else ""
    what = f"internal error, which is a defect of quark: {type(error).__name__}: {error}"
    return _fail(
        QuarkError(
            what,
            hint=f"run it again with --debug or QUARK_DEBUG=1 to see the traceback, and please report it{place}",
            kind="E-INTERNAL",
        )
    )


def _environment(error: OSError) -> QuarkError:
    """Returns the error for a refusal of the system, with the place: a disk, a permission, a limit.

    No check of ours knew it before.
    """
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    what = f"the system refused an operation: {error.strerror or error}"
    return ResourceError(
        what, where=where, hint="check permissions and free space; --debug shows where it happened", kind="E-SYSTEM"
    )


def _lost(code: int) -> int:
    """Returns the exit code for an answer that did not reach stdout: an error, unless a checkpoint stands."""
    what = f"the answer could not be written to standard output: {output.session.lost}"
    if output.session.done is not None:
        output.say(what, "warning", always=True)
        return code
    return code or _fail(ResourceError(what, kind="E-DISK-WRITE"))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
