"""A signal is answered within two seconds, whatever the process is in the middle of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quarkcli.cli import main, signals
from quarkcli.errors import ExitCode
from quarkcli.job import ranks

# What keeps the main thread when the signal comes; each says "ready" first.
BUSY = {
    "a loop in Python": "while True: pass",
    "one long call": "import ctypes; ctypes.CDLL(None).sleep(60)",  # no instruction of ours until it returns
    "a library that waits for its threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "    with ThreadPoolExecutor(1) as pool: pool.submit(time.sleep, 60).result()"
    ),
    "a library that swallows it": ("while True:\n        try: time.sleep(60)\n        except BaseException: pass"),
    "a library that makes an error of it": (  # as numpy does while it is imported
        "try: time.sleep(60)\n    except BaseException: raise ImportError('cannot load module')"
    ),
    "a thread that is left behind": "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
}
PROGRAM = """
import sys, threading, time
from quarkcli.cli import main
def busy(*args, **kwargs):
    print("ready", flush=True)
    {what}
main._command = lambda: busy
main.run()
"""


def start(what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM.replace("{what}", what)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    return process


@pytest.mark.parametrize("what", BUSY.values(), ids=BUSY)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_seconds(what: str, number: signal.Signals, code: int) -> None:
    process = start(what)
    at = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - at < 2.5  # half a second for a machine that is busy
    assert process.returncode == code
    assert "Traceback" not in err
    assert ("interrupted" if code == 130 else "terminated") in err


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.2])
def test_impatience_changes_nothing(delay: float) -> None:
    process = start("try: time.sleep(60)\n    finally: time.sleep(0.5); print('let go', flush=True)")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(delay)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "let go" in out
    assert "Traceback" not in err


def test_a_signal_that_was_ignored_stays_so() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + PROGRAM.replace("{what}", "time.sleep(0.5)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in signals.CODES]
    files = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(3):
        with pytest.raises(signals.Terminated), signals.answered(lambda code: None):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert [signal.getsignal(number) for number in signals.CODES] == before
    time.sleep(0.2)  # the threads that listened close their end
    assert not files or len(list(Path("/proc/self/fd").iterdir())) == files
    assert signals.CODES[signal.SIGTERM] == ExitCode.TERMINATED


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second of two processes of torchrun, which have not found each other."""
    shared = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "ended", ranks.Ended())
    return monkeypatch


def _end(seconds: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_process_has_the_time_to_speak(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends it when another has ended: the other one waits, and torchrun ends it in its turn."""
    waited: list[float] = []
    launched.setattr(time, "sleep", lambda seconds: (waited.append(seconds), _end(seconds)))
    assert main.main(["quantize", "--no-such-flag"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "" and waited == [2 * ranks.VERDICT]


def test_what_one_process_alone_finds_wrong_is_said(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    launched.setattr(time, "sleep", waited.append)
    launched.setenv("QUARK_LOG_FORMAT", "bogus")
    assert main.main(["quantize"]) == ExitCode.USAGE
    assert "unknown format 'bogus'" in capsys.readouterr().err and waited == [2 * ranks.VERDICT]


def test_a_signal_while_an_error_is_told_does_not_hide_it(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched.setenv("RANK", "0")
    told = ranks.muted
    launched.setattr(ranks, "muted", lambda code: (_end(0), told(code))[1])
    assert main.main(["quantize", "--no-such-flag"]) == ExitCode.USAGE
    assert "no such option" in capsys.readouterr().err
