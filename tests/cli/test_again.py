"""The line under `next` has the flags that the next command needs."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

from quarkcli.cli import again, search
from quarkcli.cli.jobflags import JobFlags
from quarkcli.job.options import Options
from quarkcli.plan.compose import Overrides
from tests import runs

SEARCH = ("search", "--model", "demo", "--schemes", "nvfp4,fp8", "--calib-samples", "4", "--calib-seqlen", "32")
# Flags of a search that its recipe holds, as what was chosen or as calibration.
IN_THE_RECIPE = {
    "settings", "algorithm", "exclude", "include", "unprotect", "allow_unmatched", "dialect", "calib_data",
    "calib_samples", "calib_seqlen", "calib_column", "bos", "moe_calibration", "min_expert_tokens", "seed",
}  # fmt: skip
# Flags that change neither the model, nor its rows, nor what is accepted.
OF_THE_MACHINE = {
    "offline", "calib_batch", "device", "threads", "overwrite", "json", "quiet", "progress", "log_level", "log_format",
    "debug",
}  # fmt: skip


def test_every_flag_of_a_search_is_in_its_recipe_or_in_the_next_command() -> None:
    flags = {field.name for field in fields(JobFlags)} - set(search._WITHOUT) - {"model"}
    assert flags == IN_THE_RECIPE | OF_THE_MACHINE | set(again.UNSAID_BY_RECIPES)
    assert not (IN_THE_RECIPE | OF_THE_MACHINE) & set(again.UNSAID_BY_RECIPES)


def test_flags_that_were_given() -> None:
    plain = Options("demo")
    assert again.flags(plain, again.UNSAID_BY_RECIPES) == ""
    pad = Overrides(on_indivisible="pad")
    options = Options("demo", revision="v 2", trust_remote_code=True, tp=2, overrides=pad, chat_template=Path("a b"))
    said = shlex.split(again.flags(options, again.UNSAID_BY_RECIPES))
    assert said == [
        "--revision", "v 2", "--trust-remote-code", "--tp", "2", "--on-indivisible", "pad", "--chat-template", "a b",
    ]  # fmt: skip
    assert again.flags(options, again.OPENED) == " --revision 'v 2' --trust-remote-code"


def test_commands_that_follow(quark, tmp_path) -> None:
    data = ("--calib-data", str(runs.text_file(tmp_path / "text.txt")))
    found = quark(*SEARCH, *data, "--budget", "5", "-o", "mixed.yaml", "--target", "none")
    assert "next: quark quantize --model demo --recipe mixed.yaml --target none\n" in found.err
    made = quark("quantize", "--model", "demo", "--scheme", "mxfp4", "-o", "out", "--allow-pickle")
    assert "quark eval out --baseline demo --allow-pickle\n" in made.err
    written = quark("init", "demo", "--gpu", "h100", "--revision", "v2")
    assert "# Run it:  quark quantize --model demo --revision v2 --recipe FILE -o OUT\n" in written.out
