"""Asks the hub: whole snapshots, or bytes of a file by range. Tries again, and turns refusals into errors."""

from __future__ import annotations

import errno
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from quarkcli.disk.headers import OTHER_WEIGHTS, PICKLES
from quarkcli.errors import HubError, QuarkError, ResourceError
from quarkcli.events import Listener, Message, silent

# What is not downloaded: weights of formats that are not read, and the same weights under other names.
IGNORED = [f"*{suffix}" for suffix in PICKLES + OTHER_WEIGHTS] + ["original/*", "*/original/*", "consolidated*"]
TRIES = 6
LONGEST = 300.0  # seconds that one wait may take; the hub's limits count requests of five minutes
PARTIAL = 206
_FIRST = 10.0  # seconds for the first answer
_TOO_MANY = 429
_BUSY = {408, _TOO_MANY, 500, 502, 503, 504}
T = TypeVar("T")


def is_offline(offline: bool = False) -> bool:
    """True when nothing may be asked of the hub: said so here, or by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return offline or bool(constants.HF_HUB_OFFLINE)


def answers() -> bool:
    """True when the hub answers at all: two tries, where its client would go on for half a minute."""
    from huggingface_hub import constants, utils

    for wait in (1.0, 0.0):
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=_FIRST)
            return True
        except _broken():
            time.sleep(wait)
    return False


def download(hub_id: str, revision: str, offline: bool) -> Path:
    """Returns the local snapshot folder of a hub id, without weights of formats that are not read."""
    import huggingface_hub as hub

    with refusals(hub_id, revision, offline):
        folder = hub.snapshot_download(hub_id, revision=revision, local_files_only=offline, ignore_patterns=IGNORED)
    return Path(folder)


class Patience:
    """Waits between tries of one request, and ends it after `TRIES` that brought nothing.

    stop   ends a wait; who sets it wants no more tries
    """

    def __init__(self, what: str, tell: Listener = silent, stop: threading.Event | None = None) -> None:
        self.what = what
        self.tell = tell
        self.stop = stop or threading.Event()
        self.tries = 0

    def worked(self) -> None:
        """Forgets the tries that failed: something came."""
        self.tries = 0

    def after(self, error: Exception) -> None:
        """Waits as long as the hub asks for, or longer with every try. Raises `error` when another try is no use."""
        status = _status(error)
        if status != _TOO_MANY and not is_out_of_reach(error):
            raise error
        self.tries += 1
        asked = _asked_to_wait(error)
        seconds = min(2.0 ** (self.tries - 2), 8.0) if asked is None else asked
        if self.tries >= TRIES or seconds > LONGEST or self.stop.is_set():
            raise error
        why = f"the hub answered {status}" if status else f"the connection broke ({type(error).__name__})"
        going_on = f"trying again in {seconds:.0f} s (try {self.tries} of {TRIES})"
        self.tell(Message(f"{self.what}: {why}; {going_on}"))
        self.pause(seconds)

    def pause(self, seconds: float) -> None:
        self.stop.wait(seconds)


def patiently(call: Callable[[], T], what: str, tell: Listener = silent) -> T:
    """Returns what `call` returns, called again while the hub is busy or cannot be reached."""
    patience = Patience(what, tell)
    while True:
        try:
            return call()
        except Exception as error:
            patience.after(error)


@contextmanager
def opened(hub_id: str, commit: str, file: str, start: int, count: int | None = None) -> Iterator[Any]:
    """Yields the response for a file's bytes from `start` on, as a stream; a hub without ranges sends it whole."""
    import huggingface_hub as hub
    from huggingface_hub import constants, utils

    end = "" if count is None else start + count - 1
    headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{end}", "Accept-Encoding": "identity"}
    url = hub.hf_hub_url(hub_id, file, revision=commit)
    with utils.get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        utils.hf_raise_for_status(response)
        yield response


def total_size(response: Any) -> int:
    """Returns the size of the whole file that a response is a part of."""
    place = response.headers.get("Content-Range", "")
    total = place.rpartition("/")[2] if place else response.headers.get("Content-Length", "")
    if not total.isdigit():
        raise HubError(
            "the hub does not say how large the file is",
            where=str(response.url).partition("?")[0],
            kind="E-HUB-DOWNLOAD",
        )
    return int(total)


@contextmanager
def refusals(hub_id: str, revision: str, offline: bool = False, *, found: bool = False) -> Iterator[None]:
    """Turns errors of the hub into user errors. The HTTP library's own pass through, and which one it is varies.

    found   the hub has shown this model already
    """
    try:
        yield
    except QuarkError:
        raise
    except Exception as error:
        raise _refusal(error, hub_id, revision, offline, found) from error


def _refusal(error: Exception, hub_id: str, revision: str, offline: bool, found: bool) -> QuarkError:
    """Returns the plain message of a failed download; the token itself is never shown."""
    from huggingface_hub import constants, errors, get_token

    token = get_token()
    page = f"{constants.ENDPOINT}/{hub_id}"
    login = f"set HF_TOKEN to a token that may read this model ({'a' if token else 'no'} token was found)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or set HF_HOME to a larger disk"
        return ResourceError(
            "the disk is full while downloading", where=str(constants.HF_HUB_CACHE), hint=hint, kind="E-DISK-FULL"
        )
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        what, hint = "is a gated model", f"accept its licence at {page}; {login}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "there is no such directory, and no such model on the hub (or it is private)"
        hint = f"look at {page}; {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = f"the hub has no revision {revision} of it", ""
    elif status in (401, 403):
        what, hint = "the hub refused access", f"look at {page}, where you may have to accept a licence; {login}"
    elif status == _TOO_MANY:
        wait = _asked_to_wait(error)
        asked = "" if wait is None else f", and asks to wait {wait:.0f} s"
        what = f"the hub refuses more requests for now (429){asked}"
        hint = f"try again later; with a token more requests are allowed: {login}"
    elif is_offline(offline):
        what = f"there is no such directory, and offline revision {revision} is not completely in the hub cache"
        hint = "go online once, or give a local directory"
    elif status is None and (isinstance(error, errors.LocalEntryNotFoundError) or is_out_of_reach(error)):
        what = (
            "the connection to the hub broke" if found else "there is no such directory, and the hub cannot be reached"
        )
        hint = (
            "check the network, then run the same command again to continue"
            if found
            else "correct the path, or check the network"
        )
    else:
        text = " ".join(str(error).split())[:300].replace(token or "\0", "***")
        here = "" if found else "there is no such directory, and "
        what = f"{here}the download from the hub failed: {type(error).__name__}: {text}"
        hint = "check the network" + (
            ", then run the same command again to continue" if found else ", or give a local directory"
        )
    return HubError(what, where=hub_id, hint=hint, kind="E-HUB-MODEL")


def is_out_of_reach(error: Exception) -> bool:
    """True when the hub gave no answer, or none but that it cannot."""
    status = _status(error)
    return status in _BUSY - {_TOO_MANY} or (status is None and isinstance(error, _broken()))


def _broken() -> tuple[type[Exception], ...]:
    """Returns the errors of a connection: those of the library that the hub's client comes from."""
    from huggingface_hub import utils

    library = importlib.import_module(type(utils.get_session()).__module__.partition(".")[0])
    return (library.TransportError, ConnectionError, TimeoutError)


def _status(error: BaseException | None) -> int | None:
    """Returns the status of the answer that an error, or what caused it, is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _asked_to_wait(error: BaseException | None) -> float | None:
    """Returns the seconds that the hub asks to wait, in the common header or in its own; None where it asks nothing."""
    from huggingface_hub import utils

    while error is not None:
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        if (text := str(headers.get("Retry-After", "")).strip()).isdigit():
            return float(text)
        limit = utils.parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining == 0:
            return float(limit.reset_in_seconds)
        error = error.__cause__
    return None
