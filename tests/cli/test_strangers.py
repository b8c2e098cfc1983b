"""What people type who know other tools: each flag is answered with one that the command has."""

from __future__ import annotations

import pytest
import typer
import yaml

from quarkcli.cli.main import app
from quarkcli.recipe import catalog

FLAGS = yaml.safe_load((catalog.built_in_folder() / "words.yaml").read_text())["flags"]


def test_flags_from_elsewhere_are_written_once_and_lead_to_flags_that_exist() -> None:
    commands = typer.main.get_command(app).commands
    known = {
        name: {flag for one in commands[name].params if one.param_type_name == "option" for flag in one.opts}
        for name in ("quantize", "eval")
    }
    names = [name for row in FLAGS for name in row["names"]]
    assert len(set(names)) == len(names)
    assert all(name == catalog.same(name) for name in names)
    own = {catalog.same(flag.lstrip("-")) for flag in known["quantize"]}
    assert not own & set(names)
    advised = [words.split()[0] for row in FLAGS for words in row["type"]]
    assert not set(advised) - known["quantize"] - known["eval"]


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ("quantize --model demo --quant_scheme int4", "no such option: --quant_scheme", "use --scheme NAME: "),
        ("quantize --model_dir demo", "no such option: --model_dir", "use --model DIR_OR_ID"),
        ("quantize --model demo --BITS=4", "no such option: --BITS", "use --scheme int4_wo_128: "),
        ("quantize -m demo", "no such option: -m", "use --model DIR_OR_ID"),
        ("plan demo --scheme mxfp4", "demo: the command takes no argument without a flag", "use --model demo"),
        ("eval out --dataset x", "no such option: --dataset", "use --text FILE"),
        ("convert --model demo", "no such option: --model", "write it without a flag: 'quark convert DIR'"),
        ("--model demo --scheme fp8", "no such option: --model", "write the command first: 'quark quantize --model"),
        ("-m demo", "no such option: -m", "write the command first: 'quark quantize --model DIR_OR_ID ...'"),
        ("schemes list --output_dir x", "no such option: --output_dir", "run 'quark schemes list --help'"),
        ("--nonsense", "no such option: --nonsense", "run 'quark --help'"),
    ],
)
def test_a_flag_from_elsewhere_is_answered(quark, line, what, hint):
    code, out, err = quark(*line.split())
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first == f"error: {what} [E-COMMAND-LINE]" and second.startswith(f"hint: {hint}")


def test_help_comes_before_a_model_without_its_flag(quark):
    assert "Usage: quark plan" in quark("plan", "demo", "--help").out


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        (
            "report out --format xml",
            "'--format': 'xml' is not one of 'text', 'md', 'json'",
            "run 'quark report --help'",
        ),
        ("quantize --model demo --seed x", "'--seed': 'x' is not a whole number", "run 'quark quantize --help'"),
        ("quantize --model demo --seed -1", "'--seed': '-1' is less than 0", "run 'quark quantize --help'"),
        ("eval out --tokens", "option '--tokens' requires an argument", "run 'quark eval --help'"),
        ("quantize --overwrite=yes", "option '--overwrite' does not take a value", "run 'quark quantize --help'"),
        ("plan --model demo --exclude a b c", "b: the command takes no argument", "write --exclude again for each"),
        ("plan --model demo --layer a=b c", "c: the command takes no argument", "write --layer again for each"),
        ("plan --model demo --scheme fp8 b c", "b: the command takes no argument", "remove it, or write the flag"),
        ("verify a b", "got unexpected extra argument(s) (b)", "run 'quark verify --help'"),
    ],
)
def test_a_value_that_does_not_fit_is_named_in_our_words(quark, line, what, hint):
    code, out, err = quark(*line.split())
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert what in first and "Value error" not in first and second.startswith(f"hint: {hint}")
