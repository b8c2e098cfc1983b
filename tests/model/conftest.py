"""Tiny models are faster on one thread."""

from tests.runs import one_thread  # noqa: F401
