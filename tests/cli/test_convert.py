"""quark convert: the summary, the exit codes, and nothing left where it is refused."""

from __future__ import annotations

import json


def test_convert(quark, made, tmp_path):
    code, out, err = quark("convert", str(made), "--to", "quark", "-o", "there", "--json", "-q")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["schema"], found["from"], found["to"]) == ("quark/convert/1", "compressed-tensors", "quark")
    assert found["weights"] == 28 and found["loads_in"]
    assert "all 39 tensors are equal bit for bit" in quark("compare", str(made), "there").out
    assert quark("verify", "there", "--source", "demo").code == 0
    assert quark("report", "there").code == 0
    code, out, err = quark("convert", "there", "--to", "compressed-tensors", "-o", "back")
    assert code == 0 and "with their old codes and scales" in out
    assert "phase: convert" in err


def test_what_is_refused_leaves_nothing(quark, made, tmp_path):
    assert quark("convert", "demo", "--to", "quark", "-o", "out").code == 5  # a directory, or an id that is not here
    assert quark("convert", str(made), "--to", "nope", "-o", "out").code == 2
    assert quark("convert", str(made), "--to", "compressed-tensors", "-o", "out").code == 2
    assert not list(tmp_path.glob("out*"))
