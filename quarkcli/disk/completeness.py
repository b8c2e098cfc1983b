"""Checks that a checkpoint holds the tensors of its model, no more and no less: index, blocks, scales, caches."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.headers import INDEX
from quarkcli.disk.nonfinite import is_buffer
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError, ModelError, none_of
from quarkcli.family import HeaderLike, Layout, check_fit, text_config

# Dtypes of weights that are stored as they are.
_PLAIN = {"BF16", "F16", "F32", "F64"}
# Roles that do not say what a tensor is.
_NO_ROLES = {"parameter", "linear", "other"}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_MLP = {"gate", "up", "expert_gate", "expert_up"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def index(source: Source) -> str:
    """Returns the check made of the index. Raises CheckError for a wrong total, and for files that it does not name."""
    none_of(list(source.unlisted), "tensors are in the files but not in the index")
    held = sum(header.nbytes for header in source.headers.values())
    path = source.folder / INDEX
    if not path.is_file():
        return f"{len(source.headers)} tensors in {len(source.files)} files, each in one"
    metadata = json.loads(path.read_bytes()).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    # AMD Quark counts whole files, where all others count tensors.
    if said is not None and said not in (held, sum((source.folder / file).stat().st_size for file in source.files)):
        raise CheckError(
            f"the index says {said} bytes of tensors, but the files hold {held}",
            where=str(path),
            kind="E-CHECK-FILES",
        )
    stray = sorted({file.name for file in source.folder.glob("*.safetensors")} - set(source.files))
    none_of(stray, "weight files are not in the index")
    return f"{len(source.headers)} tensors in {len(source.files)} files, as the index says"


def model(checkpoint: Checkpoint) -> str:
    """Returns the check made. Raises CheckError for missing tensors and wrong shapes.

    Blocks, experts and config.json say which tensors there are, and their shapes.
    """
    config, headers = checkpoint.source.config, checkpoint.headers
    try:
        layout = checkpoint.layout
        check_fit(checkpoint.family, layout, config, headers)
    except ModelError as error:
        raise CheckError(
            error.what, where=error.where, hint="write it again, or copy it again", kind="E-CHECK-MODEL"
        ) from error
    none_of(list(_misfits(layout, config)), "weights have another width than config.json has")
    unsaid = _unsaid(config)
    but = f"; it does not say {', '.join(unsaid)}, so that a server takes what the model's class has" if unsaid else ""
    return f"blocks, experts, widths and counts fit config.json and each other{but}"


def _unsaid(config: Mapping[str, Any]) -> list[str]:
    """Returns the usual sizes that config.json leaves out, where it has most of them, so that these are its names."""
    missing = [key for key in _SIZES if key not in config]
    return missing if text_config(config) is config and 2 * len(missing) < len(_SIZES) else []


def _misfits(layout: Layout, config: Mapping[str, Any]) -> Iterator[str]:
    """Yields gates and ups whose rows are no width of an MLP in config.json, where that says all of them."""
    if layout.inferred or text_config(config) is not config:  # a config within another leaves out defaults
        return
    family = layout.rewrites.family
    if family is not None and not family.says_width(config):
        return
    said = [value for key, value in config.items() if "intermediate_size" in key]
    widths = {one for value in said for one in (value if isinstance(value, list) else [value])}
    for name, weight in layout.weights.items() if widths else ():
        if weight.role in _MLP and weight.shape[0] not in widths:
            yield f"{name} {list(weight.shape)}"


def codes(checkpoint: Checkpoint, layout: Layout) -> str:
    """Returns the check made. Raises CheckError for weights that are stored as codes, and lack a scale."""
    headers = checkpoint.source.headers
    owned = {weight.view.tensor for weight in layout.weights.values()}
    bare = [name for name in checkpoint.copied() if name in owned and headers[name].dtype not in _PLAIN]
    shown = [f"{name} ({headers[name].dtype})" for name in bare]
    none_of(shown, "weights are stored as codes, without a scale that says what they mean")
    return "no weight is stored as codes without a scale"


def caches(checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """Returns the check made, none without a quantized cache. Raises CheckError for attentions that lack a scale."""
    stored = checkpoint.view.attention
    if not stored:
        return []
    held = {name: attention.specs.keys() | attention.scales.keys() for name, attention in stored.items()}
    kinds = {kind for own in held.values() for kind in own}
    lacking = [
        f"{module.name} ({kind})"
        for module in layout.attention
        for kind in sorted(kinds)
        if kind not in held.get(module.name, ())
    ]
    none_of(lacking, "scales of the cache or of attention are missing that other blocks have")
    return [f"attentions of all blocks have scales of {', '.join(sorted(kinds))}"]


def strangers(checkpoint: Checkpoint, layout: Layout, ours: Callable[[str], bool]) -> str:
    """Returns the check made. Raises CheckError for tensors that belong to no module of the model.

    ours   True for a file whose header is the one that it had when it was written
    """
    if checkpoint.inferred:
        return "no check for tensors of unknown modules: quark has no family file for this model"
    headers = checkpoint.source.headers
    found = [name for name in _strangers(checkpoint, layout) if not ours(headers[name].file)]
    none_of(found, "tensors belong to no module of the model; servers ignore them or do not load the checkpoint")
    return "every tensor belongs to a module of the model"


def _strangers(checkpoint: Checkpoint, layout: Layout) -> Iterator[str]:
    """Yields tensors of no known role that are inside a weight's module, outside all blocks, or in one block alone."""
    headers: Mapping[str, HeaderLike] = checkpoint.source.headers
    weights = set(layout.weights)
    blocks = {tensor: part.block for part in layout.parts for tensor in part.tensors}
    count = sum(part.block is not None for part in layout.parts)
    copied = [name for name in checkpoint.copied() if not is_buffer(name, len(headers[name].shape))]
    published = {name: checkpoint.renamed.get(name, name) for name in copied}
    unknown = {name: own for name, own in published.items() if layout.tensor_roles.get(own, "other") in _NO_ROLES}
    alike = Counter(_NUMBER.sub("*", own) for own in unknown.values())
    for name, own in unknown.items():
        parent, _, leaf = own.rpartition(".")
        if _of_router(layout, parent, headers[name]):
            continue
        inside = parent in weights and leaf not in ("weight", "bias")
        outside = blocks.get(own) is None
        alone = count > 1 and alike[_NUMBER.sub("*", own)] == 1
        if inside or outside or alone:
            yield name


def _of_router(layout: Layout, module: str, header: HeaderLike) -> bool:
    """True for a value for each expert beside a router's weight, such as what corrects its scores."""
    weight = layout.weights.get(module)
    return weight is not None and weight.role == "router" and tuple(header.shape) == weight.shape[:1]
