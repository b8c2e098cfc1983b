"""Reads compressed-tensors: the config group of a module, and its tensors. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quarkcli.dialects import _shared as shared
from quarkcli.dialects._ct_arguments import read_input, read_weight
from quarkcli.dialects._ct_kinds import CONFIG_CLASS, UNPACKED
from quarkcli.dialects._ct_layout import format_of, names_of, stored_shape, tensors_of
from quarkcli.dialects._patterns import WrittenNames
from quarkcli.dialects.base import StoredAttention, StoredTarget, TensorInfo
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike

# Attention slots with a scale of their own. transformers keeps one of q only where a group names its attention class.
ATTENTION = frozenset({"q", "k", "v"})


@dataclass(frozen=True)
class InBytes(StoredTarget):
    """A target whose integers have a signed byte each where others of its scheme share words."""


def group_of(module: str, groups: list[Mapping[str, Any]], names: WrittenNames) -> Mapping[str, Any]:
    group = find_group(module, groups, names)
    if group is None:
        raise ModelError(
            "it has a weight_scale, but no group of the quantization config names it",
            where=module,
            kind="E-SOURCE-CONTRADICTS",
        )
    return group


def find_group(module: str, groups: list[Mapping[str, Any]], names: WrittenNames) -> Mapping[str, Any] | None:
    """Returns the group of a module: by full name, else by pattern, else by class; None when no group has it."""

    def patterns(targets: list[str]) -> list[str]:
        return [target for target in targets if target.startswith("re:")]

    for fits in (
        lambda targets: module in targets,
        lambda targets: names.named(module, patterns(targets)),
        lambda targets: CONFIG_CLASS in targets,
    ):
        for group in groups:
            if fits(group.get("targets") or []):
                return group
    return None


def stored(
    module: str, group: Mapping[str, Any], headers: Mapping[str, HeaderLike], overall: str | None = None
) -> StoredTarget:
    """Returns what is stored of a module. `overall` is the format of all groups that do not name their own."""
    scale = shared.header(headers, f"{module}.weight_scale")
    spec = read_weight(module, group.get("weights") or {}, scale.dtype)
    source = read_input(module, group.get("input_activations"))
    output = read_input(module, group.get("output_activations"), "outputs")
    packed = f"{module}.weight_packed" in headers
    weight = shared.header(headers, f"{module}.weight_packed" if packed else f"{module}.weight")
    if len(weight.shape) != 2 or (spec.group_size is not None and len(scale.shape) != 2):
        raise shared.no_matrix(module, weight)
    shape = stored_shape(spec, weight, scale)
    pair = spec, source
    in_bytes = not packed and spec.format.kind == "integer" and format_of(pair) != UNPACKED
    wanted = tensors_of(module, pair, output, shape, scale.dtype, UNPACKED if in_bytes else None)
    word = group.get("format") or overall
    fitting = names_of(UNPACKED if in_bytes else format_of(pair))
    if word not in (None, "mixed-precision", *fitting):
        raise ModelError(
            f"the quantization config says format '{word}', by which a server does not find its codes",
            where=module,
            hint=f"write the format of the files into its config group: {fitting[0]}",
            kind="E-SOURCE-CONTRADICTS",
        )
    kind = InBytes if in_bytes else StoredTarget
    return kind(module, spec, source, shape, shared.check_headers(wanted, headers), output)


def stored_attention(scheme: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> dict[str, StoredAttention]:
    """Returns the attention modules that scales stand in; without specs where every head has its own, which is not run.

    Raises ModelError for another cache, and for one without scales.
    """
    by_head = scheme.get("strategy") == "attn_head"
    spec = read_input("kv_cache_scheme", {**scheme, "strategy": "tensor"} if by_head else scheme, "caches")
    if spec is None or not spec.is_static:
        raise ModelError(
            "this version can read only a KV cache with static scales", where="kv_cache_scheme", kind="E-SOURCE-FORMAT"
        )
    found = {}
    for name in headers:
        module = name.removesuffix(".k_scale")
        if module == name:
            continue
        kinds_ = [kind for kind in sorted(ATTENTION) if kind != "q" or f"{module}.q_scale" in headers]
        scales = {kind: f"{module}.{kind}_scale" for kind in kinds_}
        shapes = {kind: shared.header(headers, scale).shape if by_head else (1,) for kind, scale in scales.items()}
        shared.check_headers([TensorInfo(scales[kind], "F32", tuple(shapes[kind])) for kind in kinds_], headers)
        found[module] = StoredAttention(module, {} if by_head else dict.fromkeys(kinds_, spec), scales)
    if not found:
        raise ModelError(
            "the KV cache is quantized, but no file holds its scales",
            where="kv_cache_scheme",
            kind="E-SOURCE-CONTRADICTS",
        )
    return found
