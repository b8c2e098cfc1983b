"""Uploads a finished checkpoint to the hub in one commit. It refuses what fails `verify` before it sends anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quarkcli.disk import manifest, verify
from quarkcli.disk.outputs import LOG, MANIFEST
from quarkcli.disk.side_files import README
from quarkcli.errors import HubError, QuarkError, UsageError, some
from quarkcli.events import Listener, Message, Phase, Working, silent

_HUBS_OWN = {".gitattributes", README}


def push(
    folder: Path, repository: str, *, private: bool = False, overwrite: bool = False, tell: Listener = silent
) -> dict[str, Any]:
    """Uploads a checkpoint and returns a summary. Raises CheckError, UsageError, HubError.

    overwrite   a repository that holds something is replaced: its other files are removed in the same commit
    """
    import huggingface_hub as hub

    _check_place(repository)
    tell(Phase("verify"))
    checks = verify.check(str(folder), verify.Asked(), tell)
    names = _names(folder, tell)
    tell(Phase("upload"))
    api = hub.HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        there = set(api.list_repo_files(repository)) - _HUBS_OWN
        if there and not overwrite:
            what = f"the repository holds {len(there)} files already"
            raise UsageError(
                what,
                where=repository,
                hint="use --overwrite to replace them, or choose another name",
                kind="E-OUTPUT-EXISTS",
            )
        operations: list[Any] = [hub.CommitOperationAdd(name, folder / name) for name in names]
        operations += [hub.CommitOperationDelete(name) for name in sorted(there - set(names))]
        tell(Working(f"uploading {len(names)} files"))
        commit = api.create_commit(repository, operations, commit_message="Upload by quark")
    except QuarkError:
        raise
    except Exception as error:  # the HTTP library's own errors pass through, and which library it is varies
        raise _refusal(error, repository) from error
    return {
        "directory": str(folder), "repository": repository, "url": str(url), "commit": commit.oid, "files": names,
        "removed": sorted(there - set(names)), "bytes": sum((folder / name).stat().st_size for name in names),
        "checks": checks,
    }  # fmt: skip


def _check_place(repository: str) -> None:
    """Raises UsageError for a name that no repository can have, HubError when quark is offline: before any work."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        named = repository.count("/") == 1
    except errors.HFValidationError:
        named = False
    if not named:
        hint = "write ORG/NAME: letters, digits, '-', '_' and '.', at most 96 characters"
        raise UsageError("is not the name of a repository", where=repository, hint=hint, kind="E-FLAG-VALUE")
    if constants.HF_HUB_OFFLINE:
        what = "an upload needs the network, and quark is offline"
        raise HubError(what, where=repository, hint="unset HF_HUB_OFFLINE", kind="E-HUB-UPLOAD")


def _names(folder: Path, tell: Listener) -> list[str]:
    """Returns the files to upload: those of the manifest, or all that are not hidden where there is none."""
    every = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [path.as_posix() for path in every if not any(part.startswith(".") for part in path.parts)]
    listed = manifest.read(folder)
    if listed is None:
        return shown
    names = [*sorted(listed.files), MANIFEST]
    if left := sorted(set(shown) - {*names, LOG}):
        tell(Message(f"these files are not in the manifest and were not uploaded: {some(left)}", "warning"))
    return names


def _refusal(error: Exception, repository: str) -> QuarkError:
    """Returns the plain message of a failed upload; the token itself is never shown."""
    from huggingface_hub import get_token

    token = get_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = f"set HF_TOKEN to a token that may write to {repository} ({'a' if token else 'no'} token was found)"
    if status in (401, 403) or (token is None and "token" in str(error).lower()):
        return HubError("the hub refused the upload", where=repository, hint=login, kind="E-HUB-UPLOAD")
    text = " ".join(str(error).split())[:300].replace(token or "\0", "***")
    what = f"the upload failed: {type(error).__name__}: {text}"
    return HubError(
        what,
        where=repository,
        hint="check the name and the network, then run the same command again",
        kind="E-HUB-UPLOAD",
    )
