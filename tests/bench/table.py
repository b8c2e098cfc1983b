"""The loss table of docs/benchmarks.md: KL(source || quantized) per token for every scheme, algorithm and composition.

    python -m tests.bench.table MODEL... --calib FILE --text FILE [--other FILE] [--rows PATTERN] [--seeds 1,2,3]

Without files the built-in text is used, so that the command runs anywhere. Results are kept in `--results`, a JSON
file; rows that it has are not measured again unless `--again` is given. `--page FILE` writes all of them as Markdown
tables between the marks of that page, and measures nothing when no model is given.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import QuarkError
from quarkcli.job.run import Options, prepare, run
from quarkcli.numerics.signs import may_be_negative
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.recipe import Recipe
from tests.bench import page
from tests.bench.compositions import INPUTS, SCHEMES, compositions, parsed
from tests.bench.losses import Measure, Text

IN, OUT = "in domain", "out of domain"


@dataclass(frozen=True)
class Row:
    """One row: a model's name, a scheme, steps, and the seed of the calibration rows."""

    model: str
    scheme: str
    steps: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.model} {self.scheme} {self.steps} seed {self.seed}"


class Results:
    """Results by row key, in a JSON file that several processes may write."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def keep(self, key: str, result: dict[str, Any]) -> None:
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read() | {key: result}
            lines = (f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
            self.file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class Model:
    """A model with its texts; what the source says of them is computed when the first row asks for it."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        self.folder = str(EMBEDDED) if folder == "demo" else folder
        self.name = Path(self.folder).name
        self.args = args

    @cached_property
    def measure(self) -> Measure:
        args = self.args
        texts = [Text(IN, args.text, args.tokens)]
        texts += [Text(OUT, args.other, args.other_tokens)] if args.other else []
        return Measure(self.folder, texts, args.window, Path(args.cache))

    def options(self, recipe: Recipe, seed: int, out: Path) -> Options:
        args = self.args
        return Options(
            model=self.folder, recipe=recipe, output=out, calib_data=args.calib or "builtin",
            calib_samples=args.samples, calib_seqlen=args.seqlen, seed=seed, allow_short=True, device="cpu",
        )  # fmt: skip

    def measured(self, row: Row) -> dict[str, Any]:
        """Returns the result of a row, or the reason why the plan refuses it."""
        recipe = recipes.from_scheme(row.scheme)
        recipe.algorithms = [] if row.steps in {"rtn", INPUTS} else parsed(row.steps)
        with tempfile.TemporaryDirectory(prefix="quark-bench-") as folder:
            out = Path(folder) / "out"
            started, worked = time.perf_counter(), time.process_time()
            try:
                report = run(self.options(recipe, row.seed, out))
            except QuarkError as error:
                return {"refused": " ".join(filter(None, (error.what, error.where)))}
            seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - worked}
            losses = self.measure.score(str(out), inputs_only=row.steps == INPUTS)
        return {"bits": report["size"]["effective_bits"], "seconds": seconds, "losses": losses}

    def rows(self, scheme: str, seeds: list[int], asked: list[str] | None = None) -> Iterator[Row]:
        """Yields the rows of a scheme, or those asked for; the seed changes nothing of round-to-nearest."""
        plan = prepare(replace(self.options(recipes.from_scheme(scheme), 0, Path("out")))).plan
        specs = [target.weight for target in plan.quantized()]
        integers = any(may_be_negative(spec) for spec in specs)
        inputs = any(target.input is not None for target in plan.quantized())
        for steps in asked or compositions(integers, inputs):
            for seed in seeds[:1] if steps in {"rtn", INPUTS} else seeds:
                yield Row(self.name, scheme, steps, seed)


def commit() -> str:
    """Returns the commit of the tree, with a + where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "quarkcli") else "")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--calib", help="text of the calibration rows")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seeds", default="1", help="comma list: rows are measured for each")
    parser.add_argument("--text", help="text to measure on")
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--other", help="a text of another domain to measure on as well")
    parser.add_argument("--other-tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument(
        "--rows", default="", help="a regular expression: rows whose 'model scheme steps seed N' has it"
    )
    parser.add_argument("--steps", default="", help="comma list of compositions, instead of the table's own")
    parser.add_argument("--again", action="store_true", help="measure rows that have a result too")
    parser.add_argument("--list", action="store_true", help="name the rows and measure nothing")
    parser.add_argument("--results", default="docs/losses.json")
    parser.add_argument("--cache", default="", help="folder that keeps what the source says of the texts")
    parser.add_argument("--page", help="Markdown page whose table is written anew")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="quark-bench-") as folder:
        args.cache = args.cache or folder
        measure(args, Results(Path(args.results)))
    if args.page:
        page.write(Path(args.page), Results(Path(args.results)).read())


def measure(args: argparse.Namespace, results: Results) -> None:
    """Measures every row that is asked for and has no result yet."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = re.compile(args.rows)
    for folder in args.models:
        model = Model(folder, args)
        own = args.steps.split(",") if args.steps else None
        for row in (row for scheme in args.schemes.split(",") for row in model.rows(scheme, seeds, own)):
            if not wanted.search(row.key) or (row.key in results.read() and not args.again):
                continue
            if args.list:
                print(row.key)
                continue
            facts = {"model": row.model, "scheme": row.scheme, "steps": row.steps, "seed": row.seed}
            result = model.measured(row)
            results.keep(row.key, facts | {"commit": commit(), "rows": [args.samples, args.seqlen]} | result)
            print(row.key, page.brief(result), flush=True)


if __name__ == "__main__":
    main()
