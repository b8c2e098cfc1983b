"""Which checkpoints a server is said to load: every scheme and dialect of a few small models, asked of the writers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quarkcli import dialects
from quarkcli.job import run as job
from quarkcli.plan.compose import Overrides
from quarkcli.recipe import catalog
from tests import runs

DEMO = "demo"
# The embedded model has 64 rows of k, half a tile; of the others the experts are quantized.
SIZES = {
    "llama": {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_key_value_heads": 2},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 384},
    "mixtral": {"hidden_size": 256, "intermediate_size": 384},
    "gpt_oss": {"hidden_size": 256, "intermediate_size": 384},
}
MODELS = (DEMO, *SIZES)
CACHE = "fp8"
# Its own dialect holds nothing but experts.
LEFT_OUT = {"gpt_oss": ("*self_attn*",)}


@dataclass(frozen=True)
class Pair:
    """A model in a scheme and a dialect; `cache`: the format of its cache, empty for none."""

    model: str
    scheme: str
    dialect: str
    cache: str = ""
    calibrated: bool = False

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, self.scheme, self.dialect, self.cache and f"{self.cache}cache")))


def source(model: str, folder: Path) -> Path | str:
    """The name or folder of a model; it is built where it is not there yet."""
    if model == DEMO:
        return DEMO
    return folder / model if (folder / model).exists() else runs.build(model, folder / model, **SIZES[model])


def pairs(model: str, server: str, folder: Path) -> Iterator[Pair]:
    """The pairs of a model that a server is said to load: those of the embedded one with a quantized cache, too.

    Of `llama`, which has room for tiles, those that the embedded one has not.
    """
    known = {(pair.scheme, pair.dialect) for pair in pairs(DEMO, server, folder)} if model == "llama" else set()
    for cache in ("", CACHE) if model == DEMO else ("",):
        for scheme in sorted(catalog.files("schemes")):
            prepared = prepare(source(model, folder), scheme, cache, LEFT_OUT.get(model, ()))
            for writer in dialects.writers():
                if (scheme, writer.name) in known or server not in writer.loaders(prepared.plan):
                    continue
                if not writer.refusals(prepared.plan) and (not cache or scheme in runs.CALIBRATED):
                    yield Pair(model, scheme, writer.name, cache, prepared.calibration is not None)


def prepare(model: Path | str, scheme: str, cache: str = "", exclude: Sequence[str] = ()) -> job.Prepared:
    overrides = Overrides(kv_cache=cache or None, exclude=exclude)
    options = job.Options(model=str(model), scheme=scheme, device="cpu", calib_data="builtin", overrides=overrides)
    return job.prepare(options)
