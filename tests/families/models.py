"""Tiny random checkpoints of every family that transformers can build, as their published files are stored."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from quarkcli import family
from quarkcli.errors import ExitCode, ModelError
from quarkcli.family import FamilyModel, Layout
from quarkcli.model.record import Recording
from quarkcli.model.runner import Runner
from quarkcli.recipe import catalog
from tests import runs
from tests.tiny import SAFETENSORS_DTYPES, Header

# Name -> family file, class, model type of the config class, config, and how published files differ from saved ones.
RECIPES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent.parent / "data" / "families.json").read_text())


def build(name: str, folder: Path, published: bool = True, **text: Any) -> Path:
    """Write a checkpoint with a tokenizer. Every tensor gets values that matter.

    published   stored as published files are, not as transformers saves it
    text        keys of the text model's config to change
    """
    recipe = json.loads(json.dumps(RECIPES[name]))
    recipe["config"].get("text_config", recipe["config"]).update(text)
    recipe["hub_form"] = recipe.get("hub_form", {}) if published else {}
    model = fresh(recipe)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.is_floating_point():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (noise if parameter.ndim >= 2 else parameter.detach().float() + noise).bfloat16()
    model.save_pretrained(folder, save_original_format=True)
    publish(folder, recipe)
    runs.tokenizer().save_pretrained(folder)
    return folder


def fresh(recipe: dict[str, Any]) -> Any:
    """The model as transformers initializes it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[recipe["config_type"]](**recipe["config"])
    return getattr(transformers, recipe["model"])(config).eval()


def linears(name: str) -> set[str]:
    """Full names of the linears that the model has in memory."""
    with torch.device("meta"):
        model = fresh(RECIPES[name])
    return {module for module, found in model.named_modules() if isinstance(found, torch.nn.Linear)}


def own_failure(name: str) -> str | None:
    """How the model fails in transformers alone, loaded and run on text without quark; None when it runs."""
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            build(name, Path(folder) / "model", published=False)
            cls = getattr(transformers, RECIPES[name]["model"])
            model = cls.from_pretrained(Path(folder) / "model", dtype=torch.bfloat16)
            model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def excused(name: str | None, error: ModelError) -> str | None:
    """How the model fails in transformers alone, where `error` says that it does; None for any other error."""
    told = error.code == ExitCode.MODEL and f"transformers {transformers.__version__}" in error.what
    return own_failure(name) if told and name in RECIPES else None


def publish(folder: Path, recipe: dict[str, Any]) -> None:
    """Names, axes and config of published files, where transformers writes others."""
    file = folder / "model.safetensors"
    rules = recipe.get("hub_form", {})
    if rules:
        save_file(_published(load_file(file), rules), file, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | recipe.get("config_patch", {})
    path.write_text(json.dumps(config, indent=2) + "\n")


def _published(tensors: dict[str, torch.Tensor], rules: dict[str, Any]) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if any(re.search(pattern, name) for pattern in rules.get("transpose_last_two", [])):
            tensor = tensor.transpose(-1, -2).contiguous()
        for pattern, replacement in rules.get("rename", []):
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    for rule in rules.get("fuse_experts", []):
        result = _fused(result, rule)
    return result


def _fused(tensors: dict[str, torch.Tensor], rule: dict[str, Any]) -> dict[str, torch.Tensor]:
    groups: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    result = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(rule["pattern"], name)
        if found:
            groups.setdefault(found["prefix"], {}).setdefault(found["which"], {})[int(found["index"])] = tensor
        else:
            result[name] = tensor
    for prefix, parts in groups.items():
        stacked = {which: torch.stack([rows[index] for index in sorted(rows)]) for which, rows in parts.items()}
        for target, sources in rule["targets"].items():
            result[prefix + target] = torch.cat([stacked[source] for source in sources], dim=1).contiguous()
    return result


def can_rotate(name: str) -> bool:
    """True when the family's file says that its residual stream can be rotated."""
    residual = family.load(catalog.files("models")[RECIPES[name]["file"]]).residual
    return residual is not None and residual.no_rotation is None and residual.no_permutation is None


def headers(tensors: Mapping[str, torch.Tensor]) -> dict[str, Header]:
    return {name: Header(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def described(source: Path) -> tuple[FamilyModel, Layout]:
    """The family of a source in its spelling, and its layout."""
    config = json.loads((source / "config.json").read_text())
    found = headers(runs.read_all(source))
    name, model, inferred = family.for_checkpoint(config, found)
    assert not inferred
    return model, family.lay_out(name, model, inferred, config, found)


def walk(
    source: Path, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Runner, int, Recording, torch.Tensor, torch.Tensor]]:
    """(runner, block, recording, input, output) of every block that text runs, in float32, the block loaded."""
    runner = Runner(source, headers(tensors), dtype=torch.float32)
    runner.load_outside({name: tensors[name] for name in runner.outside_tensors()})
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    recording = runner.record(tokens)
    hidden = recording.hidden
    for index, call in enumerate(recording.calls):
        if call is None:
            continue
        runner.load_block(index, {name: tensors[name].clone() for name in runner.block_tensors(index)})
        output = runner.run_block(index, recording, hidden)
        yield runner, index, recording, hidden, output
        runner.unload_block(index)
        hidden = output
