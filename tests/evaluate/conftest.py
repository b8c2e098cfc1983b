"""One thread for tiny models."""

from tests.runs import one_thread  # noqa: F401
