"""constraints.txt: a whole lock, for everybody's machine."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires, version

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import releases

PROJECT = tomllib.loads((releases.ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in releases.LOCK.read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(item.name): item for item in map(Requirement, LINES)}
DIRECT = [*map(Requirement, PROJECT["dependencies"]), *map(Requirement, PROJECT["optional-dependencies"]["dev"])]


def test_lines_name_one_release_and_no_machine() -> None:
    assert len(LOCKED) == len(LINES)
    for line in LINES:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; sys_platform == 'linux')?", line), line


def test_direct_dependencies_are_locked_in_their_range() -> None:
    for wanted in DIRECT:
        (pin,) = LOCKED[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version), wanted


@pytest.mark.skipif(torch.version.cuda is not None, reason="the lock is of the CPU build, which has fewer of them")
def test_indirect_dependencies_are_locked() -> None:
    """Followed through the metadata of what is installed here, where it is the locked release."""
    todo, seen = [item for item in DIRECT if item.marker is None or item.marker.evaluate()], set()
    while todo:
        item = todo.pop()
        name = canonicalize_name(item.name)
        if (name, *item.extras) in seen:
            continue
        seen.add((name, *item.extras))
        assert name in LOCKED, name
        if not LOCKED[name].specifier.contains(version(name).partition("+")[0]):
            continue
        todo += [
            other
            for other in map(Requirement, requires(name) or [])
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in ("", *item.extras))
        ]
    assert len(seen) > len(DIRECT)


def test_the_lock_is_written_without_builds() -> None:
    assert releases.locked("torch==2.13.0+cpu") == "torch==2.13.0"
    assert releases.locked("triton==3.7.1") == "triton==3.7.1 ; sys_platform == 'linux'"


def test_the_oldest_releases_are_the_lower_bounds() -> None:
    pins = {canonicalize_name(item.name): item for item in map(Requirement, releases.oldest())}
    bounded = [wanted for wanted in DIRECT if wanted.specifier and wanted.name != "torch"]
    for wanted in bounded:
        (pin,) = pins[canonicalize_name(wanted.name)].specifier
        assert f">={pin.version}" in str(wanted.specifier).split(",")
    assert len(pins) == len(bounded) + 1
