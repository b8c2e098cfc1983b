"""What is changed and which commands then read it. Every kind is a function of the world, a folder and a random."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.journal import STATE
from quarkcli.recipe import catalog
from tests.forks import Forks, at
from tests.fuzz import mutate

DATA = ("--calib-data", "builtin", "--calib-samples", "4", "--calib-seqlen", "32")
MADE: dict[str, tuple[str, ...]] = {
    "mxfp4": ("--scheme", "mxfp4"),
    "int8": ("--scheme", "int8_dynamic"),
    "nvfp4": ("--recipe", "nvfp4-kv_fp8", *DATA),
    "quark": ("--scheme", "mxfp4", "--dialect", "quark"),
    "fp8": ("--scheme", "fp8", "--dialect", "quark", *DATA),
}
KILLED = ("quantize", "--model", "demo", *MADE["nvfp4"], "-o", "o", "-q")
_SHARDS = 3


@dataclass
class Case:
    """A change and the command that reads it; `same`: what it publishes has the tensors of this clean run."""

    what: str
    command: list[str]
    same: str = ""
    env: dict[str, str] = field(default_factory=dict)


class World:
    """Clean inputs and outputs, made once: a model, the same in shards, and a checkpoint of every command in MADE."""

    def __init__(self, folder: Path, quark: Forks) -> None:
        self.folder = folder
        shutil.copytree(EMBEDDED, folder / "model")
        _shard(folder / "model", folder / "shards")
        for name, flags in MADE.items():
            done = quark("quantize", "--model", "model", *flags, "-o", name, "-q", cwd=folder)
            assert done.code == 0, done.err
        killed = at("quarkcli.disk.journal.Journal.finish", call=3, after=True)
        quark(*KILLED, cwd=folder, hook=killed)
        assert (folder / "o.partial" / STATE).is_dir()

    def model(self, folder: Path, name: str = "model") -> Path:
        shutil.copytree(self.folder / name, folder / "m")
        return folder / "m"


Kind = Callable[[World, Path, Random], Case]


def _shard(model: Path, folder: Path) -> None:
    """The model with its tensors in several files and an index."""
    shutil.copytree(model, folder)
    table, data = header(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(name for name in table if name != "__metadata__")
    weight_map = {}
    for number in range(_SHARDS):
        own, parts, position = {}, [], 0
        file = f"model-{number + 1:05}-of-{_SHARDS:05}.safetensors"
        for name in names[number::_SHARDS]:
            start, end = table[name]["data_offsets"]
            own[name] = {**table[name], "data_offsets": [position, position + end - start]}
            parts.append(data[start:end])
            position += end - start
            weight_map[name] = file
        write_safetensors(folder / file, json.dumps(own).encode(), b"".join(parts))
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(path: Path, head: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def _change(path: Path, random: Random) -> str:
    content, what = mutate.json_bytes(json.loads(path.read_bytes()), random)
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _quantize(random: Random, *names: str) -> list[str]:
    return ["quantize", "--model", "m", *MADE[random.choice(names or list(MADE))], "-o", "o", "-q"]


# ---- models


def config(world: World, folder: Path, random: Random) -> Case:
    what = _change(world.model(folder) / "config.json", random)
    commands = [["inspect", "m"], ["plan", "--model", "m", "--scheme", "mxfp4"], ["models", "infer", "m"]]
    ways = [*commands, _quantize(random), ["eval", "m", "--tokens", "64", "--window", "32"]]
    return Case(what, random.choice(ways))


def side_file(world: World, folder: Path, random: Random) -> Case:
    """Nothing of the tokenizer and of generation touches weights that are rounded without data."""
    name = random.choice(["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
    what = _change(world.model(folder) / name, random)
    free = random.random() < 0.3
    command = _quantize(random, "mxfp4") if free else _quantize(random, "nvfp4", "fp8")
    return Case(what, command, "mxfp4" if free else "")


def index(world: World, folder: Path, random: Random) -> Case:
    what = _change(world.model(folder, "shards") / "model.safetensors.index.json", random)
    ways = [["inspect", "m"], ["plan", "--model", "m", "--scheme", "mxfp4"], _quantize(random, "mxfp4")]
    return Case(what, random.choice(ways), "mxfp4")


def headers(world: World, folder: Path, random: Random) -> Case:
    model = world.model(folder)
    table, data = header(model / "model.safetensors")
    head, what = mutate.json_bytes(table, random)
    if random.random() < 0.2:
        data, more = mutate.data(data, random)
        what += f"; data: {more}"
    write_safetensors(model / "model.safetensors", head, data)
    ways = [
        ["inspect", "m"],
        ["plan", "--model", "m", "--scheme", "mxfp4"],
        _quantize(random, "mxfp4", "int8", "nvfp4"),
    ]
    return Case(f"header: {what}", random.choice(ways))


def raw_weights(world: World, folder: Path, random: Random) -> Case:
    path = world.model(folder) / "model.safetensors"
    content = path.read_bytes()
    start, what = mutate.data(content[:4000], random)
    path.write_bytes(start + content[4000:])
    return Case(f"model.safetensors: {what}", random.choice([["inspect", "m"], _quantize(random, "mxfp4")]))


# ---- checkpoints


def _checkpoint(world: World, folder: Path, random: Random) -> Path:
    name = random.choice(list(MADE))
    shutil.copytree(world.folder / name, folder / "c")
    return folder / "c"


def quantization_config(world: World, folder: Path, random: Random) -> Case:
    path = _checkpoint(world, folder, random) / "config.json"
    whole = json.loads(path.read_bytes())
    changed, what = mutate.value(whole["quantization_config"], random)
    path.write_bytes(mutate.dump({**whole, "quantization_config": changed}))
    quantize = ["quantize", "--model", "demo", "--recipe", "c/config.json", *DATA, "-o", "o", "-q"]
    ways = [["verify", "c"], ["inspect", "c"], ["recipes", "show", "c/config.json"], quantize]
    ways.append(["eval", "c", "--tokens", "64", "--window", "32"])
    return Case(f"quantization_config: {what}", random.choice(ways))


def written_headers(world: World, folder: Path, random: Random) -> Case:
    path = random.choice(sorted(_checkpoint(world, folder, random).glob("*.safetensors")))
    table, data = header(path)
    head, what = mutate.json_bytes(table, random)
    write_safetensors(path, head, data)
    ways = [["verify", "c"], ["verify", "c", "--source", "demo"], ["eval", "c", "--tokens", "64", "--window", "32"]]
    return Case(f"{path.name}: {what}", random.choice(ways))


def report(world: World, folder: Path, random: Random) -> Case:
    what = _change(_checkpoint(world, folder, random) / "quark" / "report.json", random)
    return Case(what, ["report", "c", *random.choice([[], ["--format", "json"]])])


def manifest(world: World, folder: Path, random: Random) -> Case:
    what = _change(_checkpoint(world, folder, random) / "quark" / "manifest.json", random)
    return Case(what, ["verify", "c"])


def written_index(world: World, folder: Path, random: Random) -> Case:
    what = _change(_checkpoint(world, folder, random) / "model.safetensors.index.json", random)
    return Case(what, random.choice([["verify", "c"], ["inspect", "c"]]))


# ---- what a user writes


def recipe_tree(world: World, folder: Path, random: Random) -> Case:
    name, path = random.choice(sorted(catalog.files("ptq").items()))
    changed, what = mutate.value(catalog.document(path).data, random)
    (folder / "r.json").write_bytes(mutate.dump(changed))
    return Case(f"recipe {name}: {what}", _reads_recipe(random, "r.json"))


def recipe_text(world: World, folder: Path, random: Random) -> Case:
    kind = random.choice(["ptq", "schemes", "kv_cache"])
    name, path = random.choice(sorted(catalog.files(kind).items()))  # type: ignore[arg-type]
    text, what = mutate.lines(path.read_text(encoding="utf-8"), random)
    content = text.encode()
    if random.random() < 0.5:
        content, what = mutate.data(path.read_bytes(), random)
    (folder / "r.yaml").write_bytes(content)
    return Case(f"{kind} {name}: {what}", _reads_recipe(random, "r.yaml"))


def recipe_entry(world: World, folder: Path, random: Random) -> Case:
    """A native recipe with one value changed, written as YAML."""
    entry = {
        "quantizer_path": "*mlp*weight_quantizer",
        "cfg": {"element": "int8", "granularity": {"channel": 0}, "scale": {"rule": "absmax", "dtype": "f32"}},
    }
    tree = {
        "schema": "quark/recipe/1",
        "metadata": {"name": "x", "description": "x"},
        "quantize": {"quant_cfg": [entry], "algorithm": [{"method": "gptq", "slots": ["*up_proj.weight_quantizer"]}]},
        "share": [{"slots": ["*up_proj*", "*gate_proj*"]}],
        "calibration": {"samples": 4, "seqlen": 32, "seed": 1},
        "export": {"dialect": "auto"},
    }
    changed, what = mutate.value(tree, random)
    text = yaml.safe_dump(changed, sort_keys=False).replace("'@huge@'", mutate.DIGITS)
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return Case(f"native recipe: {what}", _reads_recipe(random, "r.yaml"))


def _reads_recipe(random: Random, file: str) -> list[str]:
    ways = [
        ["plan", "--model", "demo", "--recipe", file, *DATA],
        ["recipes", "show", file],
        ["recipes", "normalize", file],
    ]
    ways += [["recipes", "convert", file], ["recipes", "validate", file]]
    ways.append(["quantize", "--model", "demo", "--recipe", file, *DATA, "-o", "o", "-q"])
    return random.choice(ways)


def family(world: World, folder: Path, random: Random) -> Case:
    """A family file of a user's own, where $QUARK_HOME would have it."""
    path = catalog.files("models")["llama"]
    home = folder / "home" / "models"
    home.mkdir(parents=True)
    if random.random() < 0.5:
        changed, what = mutate.value(catalog.document(path).data, random)
        content = mutate.dump(changed)
    else:
        content, what = mutate.data(path.read_bytes(), random)
    (home / "mine.yaml").write_bytes(content)
    ways = [["models", "show", "mine"], ["models", "list"], ["plan", "--model", "demo", "--scheme", "mxfp4"]]
    return Case(f"family: {what}", random.choice(ways), env={"QUARK_HOME": "home"})


_TEXT = "The value of a function is what it returns.\n" * 60
_ROWS: tuple[Any, ...] = (
    {"text": _TEXT}, {"messages": [{"role": "user", "content": _TEXT}, {"role": "assistant", "content": "yes"}]},
    {"conversations": [{"from": "human", "value": _TEXT}, {"from": "gpt", "value": "yes"}]},
)  # fmt: skip


def rows(world: World, folder: Path, random: Random) -> Case:
    """A calibration file with one value or piece changed."""
    listed = [random.choice(_ROWS)] * 12
    suffix = random.choice([".jsonl", ".json", ".txt"])
    kind = random.random()
    tree, what = mutate.value(listed, random) if kind < 0.7 else (listed, "")
    if suffix == ".jsonl" and isinstance(tree, list):
        content = b"\n".join(mutate.dump(row).replace(b"\n", b"") for row in tree)
    elif suffix == ".json":
        content = mutate.dump(tree)
    else:
        content = _TEXT.encode() * 4
    if kind >= 0.7 or suffix == ".txt":
        content, what = mutate.data(content, random)
    (folder / f"rows{suffix}").write_bytes(content)
    flags = ["--calib-data", f"rows{suffix}", "--calib-samples", "4", "--calib-seqlen", "32"]
    command = ["quantize", "--model", "demo", "--scheme", "fp8", *flags, "-o", "o", "-q"]
    return Case(f"rows{suffix}: {what}", command)


_VALUES = (
    "",
    "0",
    "-1",
    "1",
    "x",
    "*",
    "*=int8",
    "re:(a+)+(?=b)c",
    "1e9",
    "nan",
    mutate.DIGITS,
    "/dev/null",
    "é\x1b[2J",
    "*mlp*",
)
_FLAGS = (
    "--scheme", "--recipe", "--set", "-o", "--dialect", "--target", "--exclude", "--include", "--layer", "--layer-type",
    "--unprotect", "--kv-cache", "--attention", "--min-kv-scale", "--algorithm", "--calib-data", "--calib-samples",
    "--calib-seqlen", "--calib-batch", "--calib-column", "--bos", "--moe-calibration", "--device", "--seed", "--resume",
    "--time-budget", "--revision", "--log-level",
)  # fmt: skip


def flags(world: World, folder: Path, random: Random) -> Case:
    """Values that a shell lets through."""
    base = ["quantize", "--model", "demo", "--scheme", "mxfp4", "--dry-run"]
    chosen = [word for _ in range(random.randrange(1, 3)) for word in (random.choice(_FLAGS), random.choice(_VALUES))]
    return Case(f"flags: {' '.join(map(repr, chosen)):.120}", [*base, *chosen])


# ---- what a killed run left


def journal(world: World, folder: Path, random: Random) -> Case:
    """What a killed run left, changed: the next run ends with the clean bytes, or says why it does not."""
    shutil.copytree(world.folder / "o.partial", folder / "o.partial")
    state = folder / "o.partial" / STATE
    kinds = ("journal.json", "fingerprint.json", "record-*", "*.safetensors")
    files = [path for kind in kinds for path in state.glob(kind)]
    path = random.choice(sorted(files))
    if path.suffix == ".json" and random.random() < 0.7:
        what = _change(path, random)
    else:
        content, what = mutate.data(path.read_bytes(), random)
        path.write_bytes(content)
    return Case(f"state/{path.name}: {what}", list(KILLED), "nvfp4")


KINDS: dict[str, tuple[int, Kind]] = {
    "config": (4, config),
    "quantization_config": (6, quantization_config),
    "side_file": (3, side_file),
    "index": (2, index),
    "headers": (3, headers),
    "raw_weights": (1, raw_weights),
    "written_headers": (2, written_headers),
    "written_index": (1, written_index),
    "report": (2, report),
    "manifest": (1, manifest),
    "recipe_tree": (3, recipe_tree),
    "recipe_text": (3, recipe_text),
    "recipe_entry": (3, recipe_entry),
    "family": (2, family),
    "rows": (3, rows),
    "flags": (3, flags),
    "journal": (1, journal),
}
