"""Measures how fast this machine works (`quark env --measure`), by small jobs on random weights.

What a job does for a block is timed from one finished block to the next, so that reading, work and writing overlap as
they do in any job. Passes and solving are what a job with more tokens, or with an algorithm, takes beyond that.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quarkcli.algorithms.base import Effort
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.headers import read_headers, read_tensors
from quarkcli.disk.writer import write_tensors
from quarkcli.events import Event, Listener, PartDone, Working, silent
from quarkcli.forward.moments import Moments
from quarkcli.job import run as job
from quarkcli.job.costs import PartCost, costs
from quarkcli.job.forecast import part_sizes
from quarkcli.job.options import Options, Prepared
from quarkcli.job.rates import OTHERS, Rates, kind
from quarkcli.job.reach import last_part
from quarkcli.numerics.quantize import fake_quantize
from quarkcli.numerics.solve import factorize
from quarkcli.recipe.attributes.native import to_spec
from quarkcli.recipe.recipe import scheme_model
from quarkcli.spec import TensorSpec

Clock = Callable[[], float]

HIDDEN, INNER, BLOCKS = 1024, 2816, 6
SEQLEN, ROWS, FEW = 256, 8, 2  # a short row has so few tokens that passes take no time
REPEATS = 3


class Measuring:
    """A folder with a model, and what was found so far.

    clock   reads seconds: the wall's, or those of the processor
    device  `cpu` or `cuda`
    """

    def __init__(self, folder: Path, device: str, clock: Clock, tell: Listener) -> None:
        self.folder, self.device, self.clock, self.tell = folder, device, clock, tell
        self.model = folder / "model"
        _build(self.model)

    def rates(self) -> Rates:
        """Returns the rates of this machine."""
        weight = self.weight()
        blocks = {one: self.block(scheme) for one, scheme in _schemes(_DATA_FREE).items()}
        tensor = self.block("fp8", rows=1, seqlen=FEW)
        blocks[_kind("fp8")] = tensor
        values = {one: _values(cost) / _more(seconds, cost.weights * weight) for one, (seconds, cost) in blocks.items()}
        values[OTHERS] = min(values.values())
        fake = {_kind(scheme, "input"): self.decoding(scheme) for scheme in _INPUTS}
        fake[OTHERS] = min(fake.values())
        products = self.products(tensor[0], fake)
        moments, plain, factors = self.moments(), self.plain(), self.factors()
        read, write = self.disk()
        return Rates(
            name="this machine", origin=self.origin(), products=products, moments=moments, plain=plain,
            factors=factors, candidates=self.candidates(products, moments, plain, factors, values), read=read,
            write=write, weight=weight, start=self.start(), values=values, fake=fake, memory=self._memory(),
            link=self._link(), node=1, shared=True,
        )  # fmt: skip

    def origin(self) -> str:
        threads = f"{torch.get_num_threads()} threads" if self.device == "cpu" else torch.cuda.get_device_name()
        return f"measured on {time.strftime('%d %B %Y')}: {platform.machine()}, {threads}, torch {torch.__version__}"

    # -- jobs -------------------------------------------------------------------------------------------------------

    def block(self, scheme: str, *, rows: int = ROWS, seqlen: int = SEQLEN, **options: Any) -> tuple[float, PartCost]:
        """Returns the seconds from one finished block to the next, and the work of a block."""
        self.tell(Working(f"measuring {scheme} {options.get('algorithm', '')}".strip()))
        out = self.folder / "out"
        given = Options(
            model=str(options.pop("model", self.model)), scheme=scheme, output=out, device=self.device, overwrite=True,
            calib_data="builtin", calib_samples=rows, calib_seqlen=seqlen, **options,
        )  # fmt: skip
        times: list[float] = []
        made: list[Prepared] = []

        def listen(event: Event) -> None:
            if isinstance(event, PartDone):
                times.append(self.clock())

        job.run(given, listen, made.append)
        shutil.rmtree(out)
        found = _costs(made[0])
        # The first block comes after the start, and the last one needs no further pass.
        blocks = [cost.part.index for cost in found if cost.part.block is not None][1:-1]
        return statistics.median(times[index] - times[index - 1] for index in blocks), found[blocks[0]]

    def products(self, quantizing: float, fake: Mapping[str, float]) -> float:
        seconds, cost = self.block("fp8")
        tokens = ROWS * SEQLEN
        inputs = sum(tokens * count / fake[kind(spec)] for spec, count in cost.inputs.items())
        return _product(cost) / _more(seconds, quantizing + inputs)

    def candidates(
        self, products: float, moments: float, plain: float, factors: float, values: Mapping[str, float]
    ) -> float:
        """Returns what is left of a block's time under gptq, in values times candidates."""
        seconds, cost = self.block("int4_wo_128", algorithm="gptq")
        done = Effort(*map(sum, zip(*cost.problems, strict=True)))
        known = _product(cost) / products + ROWS * SEQLEN * cost.moments / moments
        known += done.products / plain + done.factors / factors + _values(cost) / values[_kind("int4_wo_128")]
        return done.candidates / _more(seconds, known)

    def weight(self) -> float:
        """Returns the seconds that a weight takes which is next to nothing."""
        seconds, cost = self.block("mxfp4", model="demo")
        return seconds / cost.weights

    def start(self) -> tuple[float, float]:
        """Returns the seconds of a whole job on the embedded model: data-free, and with a model to run."""
        found = []
        for scheme in ("mxfp4", "fp8"):
            self.tell(Working(f"measuring the start of a job in {scheme}"))
            command = [sys.executable, "-c", _START, scheme, str(self.folder / "start"), self.device]
            found.append(self._least(partial(subprocess.run, command, check=True, capture_output=True)))
        return found[0], found[1]

    # -- single steps -----------------------------------------------------------------------------------------------

    def decoding(self, scheme: str) -> float:
        spec = _spec(scheme, "input")
        x = self._random(ROWS * SEQLEN, HIDDEN).bfloat16()
        static = torch.tensor(0.05, device=self.device) if spec.is_static or spec.needs_amax else None
        return x.numel() / self._least(lambda: fake_quantize(x, spec, static))

    def moments(self) -> float:
        x = self._random(ROWS * SEQLEN, INNER).bfloat16()

        def add() -> None:
            moments = Moments()
            moments.add(x)
            moments.means()

        return 2 * len(x) * INNER**2 / self._least(add)

    def plain(self) -> float:
        a, b = self._random(HIDDEN, INNER), self._random(INNER, INNER)
        return 2 * HIDDEN * INNER**2 / self._least(lambda: a @ b)

    def factors(self) -> float:
        x = self._random(2 * INNER, INNER)
        gram = x.T @ x / len(x)
        return 2 / 3 * INNER**3 / self._least(lambda: factorize(gram))

    def disk(self) -> tuple[float, float]:
        """Returns bytes a second, read from the page cache and written durably."""
        tensors = {"x": torch.zeros(64, 2**20, dtype=torch.uint8)}
        file = self.folder / "rates.safetensors"
        write = tensors["x"].nbytes / self._least(lambda: write_tensors(file, tensors))
        headers = read_headers(file, file.name)
        return tensors["x"].nbytes / self._least(lambda: read_tensors(file, headers)["x"].clone()), write

    def _memory(self) -> int | None:
        return None if self.device == "cpu" else torch.cuda.mem_get_info()[1]

    def _link(self) -> float | None:
        if self.device == "cpu":
            return None
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        return host.nbytes / self._least(lambda: host.to(self.device))

    def _random(self, rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _least(self, work: Callable[[], object]) -> float:
        """Returns the seconds of the fastest of a few repeats."""
        found = []
        for _ in range(REPEATS):
            self._wait()
            started = self.clock()
            work()
            self._wait()
            found.append(self.clock() - started)
        return max(min(found), 1e-9)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


_START = """
import sys
from pathlib import Path
from quarkcli.job.run import Options, run
scheme, out, device = sys.argv[1:]
run(Options(model="demo", scheme=scheme, output=Path(out), device=device, overwrite=True, calib_data="builtin",
            calib_samples=2, calib_seqlen=16))
"""
_DATA_FREE = ("nvfp4_weight_only", "mxfp4", "int4_wo_128", "ptpc_fp8", "int8_dynamic", "fp8_block128")
_INPUTS = ("fp8", "nvfp4", "mxfp4", "int8_dynamic")


def measure(device: str, clock: Clock = time.perf_counter, tell: Listener = silent) -> Rates:
    """Returns the rates of this machine with its `cpu` or its `cuda` device. Takes about a minute."""
    with tempfile.TemporaryDirectory(prefix="quark-rates-") as folder:
        return Measuring(Path(folder), device, clock, tell).rates()


def _build(folder: Path) -> None:
    """Writes a Llama of random weights, with the tokenizer of the embedded model."""
    config = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "head_dim": 64,
        "num_attention_heads": HIDDEN // 64, "num_key_value_heads": HIDDEN // 64,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    random = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).mul_(0.02).bfloat16()

    tensors = {f"{name}.weight": weight(config["vocab_size"], HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for index in range(BLOCKS):
        at = f"model.layers.{index}."
        tensors |= {f"{at}self_attn.{one}_proj.weight": weight(HIDDEN, HIDDEN) for one in "qkvo"}
        tensors |= {f"{at}mlp.{one}_proj.weight": weight(INNER, HIDDEN) for one in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = weight(HIDDEN, INNER)
        for one in ("input", "post_attention"):
            tensors[f"{at}{one}_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    write_tensors(folder / "model.safetensors", tensors)


def _costs(prepared: Prepared) -> list[PartCost]:
    settings, plan = prepared.calibration, prepared.plan
    rows, seqlen = (settings.samples, settings.seqlen) if settings else (0, 0)
    sizes = part_sizes(plan, prepared.dialect, prepared.weights.headers)
    last = last_part(plan, prepared.needs)
    return costs(plan, sizes, prepared.steps, prepared.needs, prepared.source.config, last, rows, seqlen)


def _more(seconds: float, known: float) -> float:
    """Returns what is left of some seconds; measured apart, parts may add up to more than the whole."""
    return max(seconds - known, seconds / 10)


def _product(cost: PartCost) -> float:
    return ROWS * SEQLEN * (cost.product + cost.attention * SEQLEN) * cost.forwards


def _values(cost: PartCost) -> int:
    return sum(cost.quantized.values())


def _schemes(names: tuple[str, ...]) -> dict[str, str]:
    return {_kind(name): name for name in names}


def _kind(scheme: str, slot: str = "weight") -> str:
    return kind(_spec(scheme, slot))


def _spec(scheme: str, slot: str) -> TensorSpec:
    return to_spec(getattr(scheme_model(scheme), slot))
