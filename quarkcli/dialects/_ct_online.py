"""Writes turned inputs as `transform_config` of compressed-tensors 0.20 (`transform/*`), as vLLM 0.32 reads it.

A group has a type and a block (`head_dim`), and says where it is applied. We write what a loader has to do, which is at
the `input`; that the weights are turned (`weight_input`) is done, and a loader that did it again would undo it.
vLLM keeps the matrix of a group once for all modules, and takes it from the files where a kernel multiplies by it; its
name is that of the first module, as llm-compressor writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quarkcli.dialects import _vllm_names as vllm_names
from quarkcli.dialects._patterns import WrittenNames, linear_patterns
from quarkcli.dialects.base import TensorInfo
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Plan

if TYPE_CHECKING:
    from torch import Tensor

VLLM = "vLLM 0.32 rotates the inputs only on CUDA, in 16 bits, with one GPU per replica"
_TYPE, _INPUT, _CLASS = "hadamard", "input", "Linear"
_OFFLINE = ("weight_input", "weight_output")


def transform_config(plan: Plan, universe: Iterable[str]) -> dict[str, Any]:
    """Returns the `transform_config`, with one group for each size of block."""
    known = list(universe)
    return {
        "config_groups": {
            _group(block): {
                "type": _TYPE,
                "apply": [
                    {"targets": linear_patterns(names, known), "location": _INPUT, "inverse": False, "ignore": []}
                ],
                "randomize": False,
                "requires_grad": False,
                "head_dim": block,
                "precision": "torch.float32",
            }
            for block, names in _by_block(plan).items()
        }
    }


def _by_block(plan: Plan) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, block in plan.online.items():
        found.setdefault(block, []).append(name)
    return found


def _group(block: int) -> str:
    return f"{_TYPE}_{block}"


def matrices(plan: Plan, part: int) -> list[tuple[TensorInfo, int]]:
    """Returns the matrices that lie in the files of a part, with their sizes: each once, beside its first module."""
    firsts = {names[0]: block for block, names in _by_block(plan).items()}
    return [
        (TensorInfo(f"{name}.{_group(block)}_{_INPUT}.weight", "BF16", (block, block)), block)
        for name, block in firsts.items()
        if plan.targets[name].part == part
    ]


def matrix(block: int) -> Tensor:
    """Returns the matrix of a group as it is stored: Sylvester's, not divided by its norm."""
    import torch

    from quarkcli.numerics.hadamard import sylvester

    return sylvester(block).to(torch.bfloat16)


# vLLM looks for the members of what it fuses, where the files have one linear as well.
_NOT_TURNED = {"head", "qkv", "gate_up", "linear_qkv", "linear_qkvz"}


def vllm_turns(plan: Plan) -> bool:
    """True when vLLM can turn these inputs: of linears, without bias, all of what it fuses by one block.

    The config names them as the files do.
    """
    online = plan.online
    if not online:
        return True
    groups: dict[str, set[int | None]] = {}
    for target in plan.targets.values():
        groups.setdefault(target.group, set()).add(online.get(target.name))
    mixed = any(len(blocks) > 1 for blocks in groups.values())
    targets = [plan.targets[name] for name in online]
    renamed = not vllm_names.own_names(plan).keys().isdisjoint(online)
    plain = all(t.bias is None and t.expert is None and t.role not in _NOT_TURNED for t in targets)
    return plain and not mixed and not renamed


# --- reading -------------------------------------------------------------------------------------------------------


def read_online(
    config: Mapping[str, Any], quantized: Iterable[str], headers: Mapping[str, HeaderLike]
) -> tuple[dict[str, int], frozenset[str]]:
    """Returns the turned modules with their blocks, and the tensors that hold the matrices.

    Raises ModelError for what is done at run time in another way, which nothing here does.
    """
    groups: Mapping[str, Any] = (config.get("transform_config") or {}).get("config_groups") or {}
    if not groups:
        return {}, frozenset()
    quantized = set(quantized)
    linear = {name.removesuffix(".weight") for name, header in headers.items() if _is_matrix(name, header)}
    applied = [(name, group, row) for name, group in groups.items() for row in group.get("apply") or []]
    texts = [text for _, _, row in applied for key in ("targets", "ignore") for text in row.get(key) or []]
    names = WrittenNames(texts, linear | quantized)
    found: dict[str, int] = {}
    for name, group, row in applied:
        if row.get("location") in _OFFLINE:
            continue
        _check_group(name, group, row)
        for module in _modules(row, names, quantized, linear):
            if module in found:
                raise ModelError(
                    "the transform config rotates its input twice", where=module, kind="E-SOURCE-CONTRADICTS"
                )
            found[module] = _width(group, module)
    stored = re.compile(rf"\.({'|'.join(map(re.escape, groups))})_{_INPUT}\.weight$")
    return found, frozenset(name for name in headers if stored.search(name))


def _is_matrix(name: str, header: HeaderLike) -> bool:
    return name.endswith(".weight") and len(header.shape) == 2


def _check_group(name: str, group: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Raises ModelError for anything but a plain Hadamard at an input."""
    if row.get("location") != _INPUT:
        raise ModelError(
            f"it has a transform at '{row.get('location')}', and this version can read only those of inputs",
            where=f"transform_config.{name}",
            kind="E-SOURCE-TRANSFORM",
        )
    if group.get("type") != _TYPE or group.get("randomize") or group.get("head_dim") is None:
        raise ModelError(
            f"this version cannot read a transform of type '{group.get('type')}', only a plain '{_TYPE}' in blocks",
            where=f"transform_config.{name}",
            kind="E-SOURCE-TRANSFORM",
        )


def _modules(
    row: Mapping[str, Any], names: WrittenNames, quantized: set[str], linear: set[str]
) -> Iterator[str]:  # fmt: skip
    """Yields the modules that a row applies to. Its class alone says nothing of modules that are not quantized."""
    targets, ignore = row.get("targets") or [], row.get("ignore") or []
    for module in sorted(quantized | linear):
        by_class = _CLASS in targets and module in quantized
        if (by_class or names.named(module, targets)) and not names.named(module, ignore):
            yield module


def _width(group: Mapping[str, Any], module: str) -> int:
    block = group["head_dim"]
    if type(block) is not int or block < 2 or block & (block - 1):
        raise ModelError(
            f"the size {block!r} of a Hadamard is not a power of two", where=module, kind="E-SOURCE-TRANSFORM"
        )
    return block
