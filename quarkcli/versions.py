"""Tells the versions of installed packages."""

from __future__ import annotations

from functools import cache

from quarkcli import __version__


@cache
def installed(package: str) -> str | None:
    """Returns the version of a package, None where it is not installed. It is looked up once, since that is slow."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def deciding() -> dict[str, str | None]:
    """Returns the versions that the bytes of a run depend on."""
    return {"quark": __version__, **{package: installed(package) for package in ("torch", "transformers")}}
