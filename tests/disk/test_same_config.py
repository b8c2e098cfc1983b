"""What counts as another value of a key of config.json."""

from __future__ import annotations

import json

from quarkcli.disk.same_config import _changed


def test_not_a_number_is_the_value_that_it_was() -> None:
    """Python's JSON holds NaN, which equals nothing, itself included."""
    text = '{"limit": NaN, "steps": [0.0, NaN], "inner": {"x": NaN}, "size": 2}'
    ours, theirs = json.loads(text), json.loads(text.replace("2}", "3}"))
    assert [str(change) for change in _changed(ours, theirs)] == ["size is 2 and was 3"]
    assert [change.path for change in _changed({"limit": 1.0}, theirs)] == ["limit"]
    assert not [*_changed({"size": 3.0}, theirs)]
