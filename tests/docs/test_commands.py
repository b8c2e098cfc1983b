"""Commands on the pages for people are right: all are parsed, those in ```sh blocks run."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from tests.docs import commands, readme
from tests.docs.commands import PAGES, Block

APART = {"README.md", "api.md"}  # tests of their own run them
RUNNING = [page for page in PAGES if commands.scripts(page) and page.name not in APART]


def page_name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_is_parsed(page: Path) -> None:
    wrong = []
    for block in commands.blocks(page):
        for line, arguments in commands.calls(block):
            try:
                commands.parse(arguments)
            except typer.Exit:  # --version
                pass
            except BaseException as error:
                wrong.append(f"{page.name}:{line}: quark {' '.join(arguments)}: {error or type(error).__name__}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_in_a_sentence_exists(page: Path) -> None:
    wrong = []
    for line, arguments in commands.mentions(page):
        try:
            commands.parse(arguments)
        except BaseException as error:
            if "Missing" not in type(error).__name__ and not isinstance(error, typer.Exit):
                wrong.append(f"{page.name}:{line}: quark {' '.join(arguments)}: {error or type(error).__name__}")
    assert not wrong


def test_commands_are_found() -> None:
    found = {page.name: sum(1 for block in commands.blocks(page) for _ in commands.calls(block)) for page in PAGES}
    assert found["README.md"] >= 3 and found["recipes.md"] > 8 and found["big_models.md"] >= 1
    block = Block(
        PAGES[0], 1, "", "quark plan --model X \\\n  --scheme fp8 | jq .x && quark env # so\ntime quark env\n"
    )
    assert list(commands.calls(block)) == [
        (1, ["plan", "--model", "X", "--scheme", "fp8"]), (1, ["env"]), (2, ["env"]),
    ]  # fmt: skip
    with pytest.raises(Exception, match="resolvd"):
        commands.parse(["recipes", "show", "x", "--resolvd"])


@pytest.mark.slow  # a minute; README.md is in the normal run, below
@pytest.mark.parametrize("page", RUNNING, ids=page_name)
def test_every_sh_block_runs(page: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for block in commands.scripts(page):
        answer = commands.ran(block.text, tmp_path, block.kind)
        assert answer.returncode == 0, f"{page.name}:{block.line}\n{answer.stdout}\n{answer.stderr}"


def test_the_readme_shows_what_its_commands_say() -> None:
    """They are run, in the order of the page; numbers differ by machine."""
    (script,) = commands.scripts(readme.PAGE)
    shown = readme.outputs(readme.PAGE.read_text(encoding="utf-8"))
    assert list(shown) == script.text.splitlines()
    for command, text in readme.made(list(shown)).items():
        assert readme.masked(text) == readme.masked(shown[command]), command
