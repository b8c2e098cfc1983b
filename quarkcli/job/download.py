"""Downloads of a job whose model is on the hub, once its plan stands."""

from __future__ import annotations

from quarkcli.disk import side_files as files_beside
from quarkcli.events import Listener, Message, Working
from quarkcli.job import preflight
from quarkcli.job.options import Prepared


def side_files(prepared: Prepared, tell: Listener) -> None:
    """Downloads the files beside the weights. Raises AccessError, ModelError, ResourceError."""
    source = prepared.source
    if source.remote is None:
        return
    tell(Working("downloading the files beside the weights"))
    source.whole_folder()
    found = files_beside.gather(source)
    for one in prepared.every:
        one.side_files = found
    preflight.check_tokenizer(source, prepared.side_files, prepared.calibration)
    for warning in prepared.side_files.warnings():
        tell(Message(warning, "warning"))
