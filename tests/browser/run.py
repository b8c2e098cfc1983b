"""report.html in a real browser: python -m tests.browser.run [--keep FOLDER].

Opens the pages of runs and of two side by side, at 1280 and 390 pixels, light and dark: no errors, nothing loaded,
nothing wider than the window, no labels on each other, colours that follow the scheme, letters that stand out. Writes
pictures to docs/images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.browser import chromium

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
WIDTHS = (1280, 390)
PACKAGE = "chromium"
# Texts of one drawing whose boxes touch, and boxes that leave the window; both are empty where all is well.
OVERLAPS = """
(() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([a, one], at) => {
      if (one.left < 0 || one.right > innerWidth + 0.5) found.push(a + ' leaves the window');
      for (const [b, other] of boxes.slice(at + 1))
        if (one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)
          found.push(a + ' on ' + b);
    });
  }
  return found;
})()
"""
WIDE = """
[...document.querySelectorAll('body *')].filter(node => {
  const box = node.getBoundingClientRect();
  return box.right > innerWidth + 1 && !node.closest('.scroll');
}).map(node => node.tagName + '.' + node.className + ' ' + node.textContent.slice(0, 40)).slice(0, 5)
"""
# The contrast (WCAG) of the weakest letters on the colour below them.
CONTRAST = """
(() => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const below = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!colour.endsWith(', 0)')) return colour;
    }
  };
  let least = 21;
  for (const node of document.querySelectorAll('h1, h2, h3, p, dt, dd, td, th, li, small, span, text, summary, mark')) {
    if (!node.textContent.trim()) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node.tagName == 'text' ? style.fill : style.color), light(below(node))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()
"""


def pages(folder: Path) -> dict[str, Path]:
    """Runs of the command, and their pages by name."""
    from quarkcli.cli import main

    calibrated = ["--calib-data", "builtin", "--calib-samples", "64", "--calib-seqlen", "256", "--eval", "-q"]
    made = {}
    os.chdir(folder)
    for name, flags in (
        ("solved", ["--scheme", "nvfp4", "--algorithm", "gptq", *calibrated]),
        ("nearest", ["--scheme", "nvfp4", *calibrated]),
        ("plain", ["--scheme", "mxfp4", "-q"]),
    ):
        assert main.main(["quantize", "--model", "demo", *flags, "-o", name]) == 0
        made[name] = folder / name / "quark" / "report.html"
    made["compared"] = folder / "compared.html"
    both = ["nearest", "solved", "--html", str(made["compared"]), "-q"]
    assert main.main(["compare", *both]) == 0
    made["large"] = folder / "large.html"
    made["large"].write_text(large(json.loads((folder / "solved" / "quark" / "report.json").read_text())))
    return made


def large(report: dict[str, Any]) -> str:
    """The page of a run on 94 layers of 128 experts, with numbers made up, long names and warnings."""
    from quarkcli.reporting.page import page

    tensors, parts, sites, counts = [], [], [], {}
    weights = [row for row in report["tensors"] if row["layer"] == 1 and row["fate"] == "quantized"]
    part = next(row for row in report["parts"] if row["layer"] == 1)
    inputs = [row for row in report["sites"] if row["layer"] == 1]
    for layer in range(94):
        name = f"model.language_model.layers.{layer}"
        place = {"part": name, "layer": layer}
        for row in weights:
            inside = row["name"].partition(".layers.1.")[2].replace("mlp.", "block_sparse_moe.experts.17.")
            error = row["output_error"] * (1 + layer / 30)
            tensors.append({**row, **place, "name": f"{name}.{inside}", "output_error": error})
        sites += [{**row, **place, "name": f"{name}.{row['name'].partition('.layers.1.')[2]}"} for row in inputs]
        parts.append({**part, "name": name, "layer": layer})
        counts[f"{name}.block_sparse_moe.experts"] = {str(at): (at * 37 + layer * 11) % 997 for at in range(128)}
    more = {"tensors": tensors, "parts": parts, "sites": sites, "warnings": [f"{'long' * 40} {at}" for at in range(30)]}
    more["experts"] = report["experts"] | {"calibration_tokens": counts}
    more["evaluation"] = report["evaluation"] | {"drift": [0.01 + at / 500 for at in range(94)]}
    return page({**report, **more, "model": report["model"] | {"name": "some-organisation__" + "x" * 60}})


def check(browser: chromium.Browser, name: str, file: Path, width: int, dark: bool) -> list[str]:
    """What is wrong with a page at a width."""
    browser.problems.clear()
    browser.open(file, width, dark)
    found = [f"console: {problem}" for problem in browser.problems]
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    scroll, inner = browser.value("document.documentElement.scrollWidth"), browser.value("innerWidth")
    if scroll > inner or inner != width:
        found.append(f"{scroll} pixels wide in a window of {inner}")
    found += [f"sticks out: {node}" for node in browser.value(WIDE)]
    found += [f"labels: {pair}" for pair in browser.value(OVERLAPS)]
    found += [] if (least := browser.value(CONTRAST)) >= 4 else [f"letters of contrast {least:.2f}"]
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128
    found += [] if bright != dark else [f"the ground is {ground} in {'dark' if dark else 'light'}"]
    count = browser.value("document.querySelectorAll('figure').length")
    found += [] if count >= 5 else [f"{count} charts"]
    browser.value("document.querySelectorAll('details').forEach(one => one.open = false)")
    return [f"{name} at {width}, {'dark' if dark else 'light'}: {text}" for text in found]


PICTURES = {
    ("solved", 1280, False): "report-1280-light.png",
    ("solved", 1280, True): "report-1280-dark.png",
    ("solved", 390, False): "report-390.png",
    ("compared", 1280, False): "compare-1280.png",
}
HIGH = {1280: 2000, 390: 1700}  # of a picture


def program() -> str:
    """Chromium, which is installed where apt may do so."""
    found = chromium.find()
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", PACKAGE], check=False)
        found = chromium.find()
    if found is None:
        sys.exit(f"chromium is missing: apt-get install {PACKAGE}, as root")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where all pictures of all pages go")
    keep = parser.parse_args().keep
    keep = keep and keep.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder, wrong = Path(temporary), list[str]()
        with chromium.Browser(program(), folder / "profile") as browser:
            IMAGES.mkdir(exist_ok=True)
            for name, file in pages(folder).items():
                for width in WIDTHS:
                    for dark in (False, True):
                        wrong += check(browser, name, file, width, dark)
                        picture = PICTURES.get((name, width, dark))
                        if picture:
                            browser.picture(IMAGES / picture, width, HIGH[width])
                        if keep:
                            keep.mkdir(parents=True, exist_ok=True)
                            browser.picture(keep / f"{name}-{width}-{'dark' if dark else 'light'}.png", width, 9000)
    print("\n".join(wrong) or f"{len(WIDTHS) * 2} views of every page are as they should be; pictures in {IMAGES}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
