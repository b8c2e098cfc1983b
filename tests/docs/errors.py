"""Writes docs/errors.md from the index of errors: `make docs`. A test keeps the page fresh."""

from __future__ import annotations

from pathlib import Path

from quarkcli.reporting.kinds import Kind, index

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
_HEAD = """\
# Errors

Look up an error by the code in brackets at its end. `quark explain CODE` shows the same. With `--json` the code is the
field `id`. `make docs` generates this page from `quarkcli/assets/errors.yaml`; do not edit it.

The exit code of a command says what kind of error it was:

| exit | means |
|---|---|
| 0 | done |
| 1 | a defect of quark |
| 2 | the command line is wrong |
| 3 | a recipe, a pattern or a plan is wrong |
| 4 | quark cannot work on the model |
| 5 | quark cannot reach a file, a model or data |
| 6 | too little disk or memory, or no such device |
| 7 | calibration data or numbers are wrong |
| 8 | a check failed, or a limit was passed |
| 75 | the time budget is used up; the same command continues |
| 130, 143 | Ctrl-C or SIGTERM stopped the command; the same command continues |
"""


def section(kind: Kind) -> str:
    """The part of the page about one kind."""
    causes = "\n".join(f"- {cause}" for cause in kind.causes)
    ends = " or ".join(map(str, kind.exit))
    return (
        f"## {kind.code}\n\n{kind.means} Exit {ends}.\n\n```\n{kind.example}\n```\n\nCauses:\n\n{causes}\n\n"
        f"Cure: {kind.cure}\n"
    )


def page() -> str:
    return "\n".join([_HEAD, *map(section, index().values())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
