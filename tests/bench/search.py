"""How well `quark search` predicts and chooses: predicted against measured KL of mixed recipes, as served.

    python -m tests.bench.search MODEL --calib FILE --text FILE [--mixes 12] [--algorithm gptq]

Measures random mixes of nvfp4 and fp8, the choices for some budgets, and what people do by hand: the first and last
blocks in fp8. `line` is the straight line between nvfp4 and fp8 in bits and log KL.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from pathlib import Path

import yaml

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from quarkcli.job.options import Options
from quarkcli.job.run import run
from quarkcli.recipe.recipe import from_config
from quarkcli.search.choice import Choice, Choosing
from quarkcli.search.run import Asked, Found, search
from quarkcli.search.text import recipe_text

LOW, HIGH = "nvfp4", "fp8"


class Bench:
    """One model with its texts."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.model = str(EMBEDDED) if args.model == "demo" else args.model
        self.count = 0

    def options(self) -> Options:
        return Options(
            model=self.model,
            algorithm=self.args.algorithm,
            calib_data=self.args.calib or "builtin",
            calib_samples=self.args.samples,
            calib_seqlen=256,
            allow_short=True,
            device=self.args.device,
        )

    def found(self) -> Found:
        scores = self.folder / "scores.json"
        return search(Asked(self.options(), [LOW, HIGH], scores=scores), silent)

    def measured(self, choosing: Choosing, choice: Choice, tokens: int) -> float:
        """Returns the KL of a choice, as served, from written files."""
        self.count += 1
        text = recipe_text(choosing.space, choosing.groups, choice, choosing.losses, name="mix", calibration={})
        out = self.folder / f"out-{self.count}"
        options = self.options()
        options.recipe, options.output, options.algorithm = from_config(yaml.safe_load(text), "mix"), out, None
        run(options)
        result = evaluate(
            str(out), baseline=self.model, text=self.args.text, window=self.args.window,
            max_tokens=tokens, dtype="float32", device=self.args.device, tell=silent,
        )  # fmt: skip
        return float(result["kl"])


def mixes(choosing: Choosing, count: int, seed: int) -> list[Choice]:
    """Returns random choices, of any share of the larger scheme."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        share = draw.random()
        found.append(choosing.choice([HIGH if draw.random() < share else LOW for _ in choosing.groups]))
    return found


def ends(choosing: Choosing, budget: float) -> Choice:
    """Returns the first and last blocks in the larger scheme, as many as the budget allows, the first one first."""
    parts = sorted({group.part for group in choosing.groups})
    order = [part for pair in zip(parts, reversed(parts), strict=True) for part in pair][: len(parts)]
    best = choosing.choice([LOW] * len(choosing.groups))
    for last in range(1, len(order) + 1):
        given = set(order[:last])
        choice = choosing.choice([HIGH if group.part in given else LOW for group in choosing.groups])
        if choice.bits > budget + 1e-9:
            break
        best = choice
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calib")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--mixes", type=int, default=12)
    parser.add_argument("--mix-tokens", type=int, default=10240, help="of the text, for random mixes")
    parser.add_argument("--samples", type=int, default=128, help="rows of 256 tokens, to search and to calibrate with")
    parser.add_argument("--budgets", type=float, nargs="*", default=[4.8, 5.5])
    parser.add_argument("--algorithm")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        show(Bench(args, Path(folder)), args)


def show(bench: Bench, args: argparse.Namespace) -> None:
    started = time.perf_counter()
    choosing = bench.found().choosing
    print(f"search: {time.perf_counter() - started:.1f} s, {len(choosing.groups)} groups\n")
    print("| recipe | bits | predicted KL | measured KL | predicted / measured |\n|---|---|---|---|---|")

    def row(name: str, choice: Choice, tokens: int = args.tokens) -> float:
        kl = bench.measured(choosing, choice, tokens)
        print(f"| {name} | {choice.bits:.3f} | {choice.loss:.5f} | {kl:.5f} | {choice.loss / kl:.2f} |", flush=True)
        return kl

    low, high = (choosing.choice([name] * len(choosing.groups)) for name in (LOW, HIGH))
    at_low, at_high = row(LOW, low), row(HIGH, high)
    for number, choice in enumerate(mixes(choosing, args.mixes, seed=0), 1):
        row(f"random mix {number}", choice, args.mix_tokens)
    for budget in args.budgets:
        share = (budget - low.bits) / (high.bits - low.bits)
        line = math.exp(math.log(at_low) + share * (math.log(at_high) - math.log(at_low)))
        best = row(f"search, {budget:g} bits", choosing.of_bits(budget))
        by_hand = ends(choosing, budget)
        said = f"at {budget:g} bits: {best / line:.2f} of the line's {line:.5f}"
        if by_hand.bits > low.bits:
            kl = row(f"first and last blocks, at most {budget:g} bits", by_hand)
            equal = row("search, at those bits", choosing.of_bits(by_hand.bits))
            said += f"; {equal / kl:.2f} of by hand at {by_hand.bits:.3f} bits"
        print(f"\n{said}\n")


if __name__ == "__main__":
    main()
