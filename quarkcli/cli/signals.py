"""Handles SIGINT and SIGTERM: the first ends the command in order; if that takes too long, the process ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quarkcli.errors import ExitCode

GRACE = 1.5  # seconds for letting go of locks and temporary files; a user is answered within two
CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


class Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way takes it for a failure."""


@contextmanager
def answered(last_words: Callable[[ExitCode], None], last: bool = False) -> Iterator[list[signal.Signals]]:
    """SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`, once; further ones while that is handled do nothing.

    Yields a list that gets the number of the signal: a library may turn what was raised into an error of its own.

    Python runs a handler between two instructions only, and a library may wait for its threads on the way out. So a
    thread hears of the signal too, from the interpreter's wakeup pipe: when the block has not ended `GRACE` seconds
    later, it says `last_words` and ends the process. Nothing is lost by that which a kill would not lose: files bear
    their names when they are complete. A signal that was ignored from the start (nohup) stays ignored.

    last   the process ends behind the block: once a signal was answered, no handler comes back that another could meet
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(heard, ended, last_words), name="signals", daemon=True)
    watch.start()
    before = {number: signal.getsignal(number) for number in CODES}
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    raised: list[signal.Signals] = []

    def answer(number: int, frame: object) -> None:
        if not raised:
            raised.append(signal.Signals(number))
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, answer)
    try:
        yield raised
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        if not (last and raised):
            for number, handler in before.items():
                signal.signal(number, handler)
        os.close(told)


def _watch(heard: int, ended: threading.Event, last_words: Callable[[ExitCode], None]) -> None:
    """Reads signal numbers until the pipe closes; ends the process when one was not obeyed in time."""
    with os.fdopen(heard, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            code = CODES.get(signal.Signals(number[0]))
            if code is None or ended.wait(GRACE):
                continue
            words = threading.Thread(target=last_words, args=(code,), daemon=True)
            words.start()
            words.join(0.3)  # a stream that nobody reads must not hold us
            os._exit(code)
