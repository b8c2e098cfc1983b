"""Command lines in processes of their own, without the seconds that importing torch takes each.

One process imports everything and forks a child per command line, so that a SIGKILL in it is a real one. `python -m
tests.forks` is that process: it reads a request per line on stdin and answers on stdout.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "quarkcli.cli.main",
    "quarkcli.job.run",
    "quarkcli.job.part",
    "quarkcli.job.pipeline",
    "quarkcli.job.prepass",
    "quarkcli.forward.data",
    "quarkcli.cli.planview",
    "quarkcli.cli.progress",
    "quarkcli.cli.summary",
    "quarkcli.model.runner",
    "quarkcli.model.tokenizer",
    "quarkcli.numerics.settle",
    "quarkcli.numerics.smooth",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "pydoc_data.topics",
    "safetensors.torch",
)


class Done(NamedTuple):
    """code is negative when a signal ended the process, as in subprocess; seconds until it ended."""

    code: int
    out: str
    err: str
    seconds: float


def at(*targets: str, call: int = 1, after: bool = False, what: str = "SIGKILL") -> dict[str, Any]:
    """Something that happens in a child.

    targets   dotted names of functions; their calls are counted together
    call      the how manieth call, 1-based; 0: every one
    after     once that call has returned, instead of in its place
    what      a signal's name, or several with the seconds between them ("SIGINT 0.1 SIGINT"), sent by another thread;
              a number: an OSError with that errno is raised; a float: seconds to sleep
    """
    return {"targets": targets, "call": call, "after": after, "what": what}


class Forks:
    """Runs `quark` command lines in children of one prepared process, in an empty home and offline."""

    def __init__(self, home: Path) -> None:
        settings = {"HF_HUB_OFFLINE": "1", "QUARK_HOME": str(home), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **settings},
            text=True,
        )

    def __call__(
        self,
        *argv: str,
        cwd: Path,
        hook: dict[str, Any] | None = None,
        timeout: float = 0,
        env: dict[str, str] | None = None,
        streams: dict[int, str | None] | None = None,
    ) -> Done:
        """Run one command line.

        timeout   SIGKILL from outside after so many seconds
        streams   descriptor -> the file that it writes to, or None for one that is closed
        """
        request = {"argv": argv, "cwd": str(cwd), "hook": hook, "env": env or {}, "streams": streams or {}}
        return self._ask([request], timeout)[0]

    def together(
        self,
        *argv: str,
        folders: list[Path],
        hooks: dict[int, dict[str, Any]],
        env: list[dict[str, str]],
        timeout: float,
    ) -> list[Done]:
        """Run one command line in several processes at once, each in a folder and surroundings of its own."""
        places = enumerate(zip(folders, env, strict=True))
        return self._ask(
            [{"argv": argv, "cwd": str(cwd), "hook": hooks.get(number), "env": own} for number, (cwd, own) in places],
            timeout,
        )

    def value(self, function: str, cwd: Path) -> Any:
        """What a function gives, called by its dotted name without arguments."""
        (done,) = self._ask([{"function": function, "cwd": str(cwd)}])
        assert done.code == 0, done.err
        return json.loads(done.out)

    def _ask(self, requests: list[dict[str, Any]], timeout: float = 0) -> list[Done]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"requests": requests, "timeout": timeout}) + "\n")
        self._process.stdin.flush()
        return [Done(**answer) for answer in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.kill()  # faster than an end in order; it has nothing to put away
        self._process.communicate()


def serve() -> None:
    """Answer requests until stdin ends."""
    _prepare()
    for line in sys.stdin:
        asked = json.loads(line)
        children: dict[int, Path] = {}
        for request in asked["requests"]:
            cwd = Path(request["cwd"])
            child = os.fork()
            if not child:
                _child(request, cwd / ".out", cwd / ".err")
            children[child] = cwd
        ended = _wait(children, asked["timeout"])
        sys.stdout.write(json.dumps([_answer(cwd, *ended[child]) for child, cwd in children.items()]) + "\n")
        sys.stdout.flush()


def _prepare() -> None:
    """Imports what command lines use, and plans once: what is imported and read for that is there in every child."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    from quarkcli.cli import main

    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main.main(["plan", "--model", "demo", "--scheme", "int4_wo_128", "--algorithm", "awq,gptq"]) == 0
    gc.collect()
    gc.freeze()  # a child that looked for garbage among it would copy all its pages


def _answer(cwd: Path, code: int, seconds: float) -> dict[str, Any]:
    said = {}
    for name in ("out", "err"):
        file = cwd / f".{name}"
        said[name] = file.read_text(errors="replace")
        file.unlink()
    return {"code": code, "seconds": seconds, **said}


def _wait(children: Collection[int], timeout: float) -> dict[int, tuple[int, float]]:
    """Exit code and seconds of each child."""

    def kill(*_: object) -> None:
        for child in set(children) - set(ended):
            with suppress(ProcessLookupError):  # it may have ended in this very moment
                os.kill(child, signal.SIGKILL)

    ended: dict[int, tuple[int, float]] = {}
    started = time.monotonic()
    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    while len(ended) < len(children):
        child, status = os.waitpid(-1, 0)
        ended[child] = os.waitstatus_to_exitcode(status), time.monotonic() - started
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ended


def _child(request: dict[str, Any], out: Path, err: Path) -> None:
    code = 99
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        for number, path in request.get("streams", {}).items():
            _redirect(int(number), path)
        os.chdir(request["cwd"])
        os.environ.update(request.get("env", {}))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = _value(request["function"]) if "function" in request else _command(**request)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError):  # one that is closed or full
                stream.flush()
        os._exit(code)


def _command(argv: list[str], hook: dict[str, Any] | None, **_: Any) -> int:
    from quarkcli.cli import main

    if hook:
        _hook(**hook)
    return main.main(argv, last=True)


def _value(function: str) -> int:
    owner, name = _owner(function)
    print(json.dumps(getattr(owner, name)()))
    return 0


def _redirect(number: int, path: str | None) -> None:
    """Where a stream goes; of one that is closed, Python has no object and the system gives its number to others."""
    if path is not None:
        os.dup2(os.open(path, os.O_WRONLY), number)
        return
    os.close(number)
    for name in (("stdin",), ("stdout", "__stdout__"), ("stderr", "__stderr__"))[number]:
        setattr(sys, name, None)


def _hook(targets: list[str], call: int, after: bool, what: str) -> None:
    count = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = call in (0, count)
            if mine and not after:
                _act(what)
            result = real(*args, **kwargs)
            if mine and after:
                _act(what)
            return result

        return function

    for target in targets:
        owner, name = _owner(target)
        setattr(owner, name, wrapped(getattr(owner, name)))


def _owner(target: str) -> tuple[Any, str]:
    *path, name = target.split(".")
    for length in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:length]))
        except ImportError:
            continue
        for step in path[length:]:
            owner = getattr(owner, step)
        return owner, name
    raise ImportError(target)


def _act(what: str) -> None:
    if " " in what:
        _send(what.split())
    elif what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    elif "." in what:
        time.sleep(float(what))
    else:
        raise OSError(int(what), os.strerror(int(what)))


def _send(words: list[str]) -> None:
    """A thread beside sends the signals to this one, which waits for the first of them.

    Not a forked process: the first signal could meet the hooks that run behind a fork, where errors are only printed.
    """
    waiting = threading.main_thread().ident
    assert waiting is not None

    def beside() -> None:
        for word in words:
            if word.startswith("SIG"):
                signal.pthread_kill(waiting, getattr(signal, word))
            else:
                time.sleep(float(word))

    threading.Thread(target=beside, daemon=True).start()
    time.sleep(60)


if __name__ == "__main__":
    serve()
