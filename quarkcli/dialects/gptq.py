"""The gptq dialect: AutoGPTQ and GPTQModel write it, vLLM reads it.

Codes of 2, 3, 4 or 8 bits in words along the inputs, the lowest bits first; a code of 3 bits may lie across two words.
Symmetric codes are stored with half their range added. Format `gptq` stores zero points less one, `gptq_v2` as they
are. `g_idx` names the group of every input: with `desc_act` groups are not runs of neighbours. As GPTQModel and vLLM
0.32 (`quantization/auto_gptq.py`, `utils/gptq_utils.py`) have it; vLLM reads symmetric codes alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from quarkcli.dialects import _shared as shared
from quarkcli.dialects import _words as words
from quarkcli.dialects._documents import GptqConfig
from quarkcli.dialects._patterns import WrittenNames, linear_patterns
from quarkcli.dialects.base import (
    CONFIG_FILE,
    CONFIG_KEY,
    Decoded,
    Reader,
    StoredTarget,
    StoredView,
    TensorInfo,
    Writer,
)
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

NAME = "gptq"
FILE = "quantize_config.json"
_SECOND = "gptq_v2"
_READ_BITS = (2, 3, 4, 8)
_GROUPS = "g_idx"
_HOLDS = frozenset((f"{short} {where}", "none") for short in ("int4", "int8") for where in ("group", "channel"))
_PLACES = shared.Places(_HOLDS, attention=frozenset())
_EXPERTS = frozenset({("int4 group", "none"), ("int8 group", "none")})
# Roles that its own tools never quantize: they know the linears of every model's blocks.
_UNLISTED = frozenset({"embedding", "head", "router", "gates", "indexer", "mtp", "vision", "audio", "projector"})
_SKIP, _OVERRIDE, _MARK = "-:", "+:", "re:"


@dataclass(frozen=True)
class SecondFormat(StoredTarget):
    """A target whose zero points are stored as they are."""


class Settings(NamedTuple):
    """The settings of one module, by the names of their keys in a config."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


class GptqReader(Reader):
    name = NAME
    quant_method = NAME
    beside = (FILE,)
    unlisted = _UNLISTED
    head_key = words.HEAD

    def packs(self, headers: Mapping[str, HeaderLike]) -> bool:
        return words.packed_along(headers) == words.INPUTS

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint: what has codes is quantized.

        Raises ModelError for another layout, and for tensors that do not fit the config.
        """
        check(GptqConfig, config, CONFIG_KEY)
        layout = config.get("checkpoint_format") or config.get("format") or NAME
        if layout not in (NAME, _SECOND) or config.get("is_marlin_format"):
            layout = layout if layout not in (NAME, _SECOND) else "marlin"
            raise ModelError(f"GPTQ format {layout!r} is not read here, only {NAME} and {_SECOND}", where=CONFIG_KEY)
        found = words.modules(headers)
        settings = _settings(config, found)
        kind = SecondFormat if layout == _SECOND else StoredTarget
        return StoredView({module: _stored(kind, module, settings[module], headers) for module in found})

    def left_out(self, config: Mapping[str, Any]) -> dict[str, list[str]]:
        listed = config.get("dynamic")
        skipped = [_MARK + text.removeprefix(_SKIP) for text in listed or () if text.startswith(_SKIP)]
        return {"dynamic": skipped} if isinstance(listed, dict) else {}

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        """Returns codes and scales; where groups are not runs of neighbours, with the columns in order of groups.

        Raises ModelError for symmetric codes with other zero points, and for groups of several sizes.
        """
        from quarkcli.numerics.packing import unpack_int32
        from quarkcli.numerics.quantize import QParams, Quantized

        local, spec = stored.own(tensors), stored.weight
        codes = unpack_int32(
            words.turned(local[words.CODES]), spec.format.bits, stored.shape[1], signed=spec.symmetric
        )  # fmt: skip
        zeros = _zero_points(local[words.ZEROS], stored)
        order = _order(local[_GROUPS], stored) if _GROUPS in local else None
        params = QParams(words.turned(local[words.SCALES]), zero_point=None if spec.symmetric else zeros)
        return Decoded(Quantized(codes if order is None else codes[:, order], params, order))


READER = GptqReader()


class Gptq(Writer):
    name = NAME
    reader = READER

    def refusals(self, plan: Plan) -> list[str]:
        return words.refusals(plan, self.name, _PLACES)

    def loaders(self, plan: Plan) -> set[str]:
        """Returns `vllm` where it loads the plan; transformers needs optimum and gptqmodel, which were not tried.

        It takes the bits and groups of some modules from `dynamic`, which is read here and not written.
        """
        refused = words.refusals(plan, self.name, _PLACES, mixed=True)
        return {"vllm"} if not refused and shared.vllm_loads(plan, _HOLDS, _EXPERTS) else set()

    def config_faults(self, config: Mapping[str, Any], server: str) -> list[str]:
        unordered = config.get("desc_act") is True and config.get("group_size") != words.WHOLE_ROW
        refused = ["desc_act is true: it refuses groups in order of activations"] if unordered else []
        return [*super().config_faults(config, server), *(refused if server == "vllm" else [])]

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        return _layout(target.name, target.weight, target.shape, target.dtype)

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        import torch

        from quarkcli.numerics.packing import pack_int32

        spec, (rows, cols) = target.weight, target.shape
        assert quantized.params.scale is not None
        groups, bits = words.groups(spec, cols), spec.format.bits
        # Half the range, less one.
        zeros = torch.full((groups, rows), (1 << (bits - 1)) - 1, dtype=torch.uint8)
        made = {
            words.CODES: words.turned(pack_int32(quantized.codes, bits)),
            words.ZEROS: pack_int32(zeros, bits),
            words.SCALES: words.turned(quantized.params.scale),
            _GROUPS: torch.arange(cols, dtype=torch.int32) // (cols // groups),
        }
        return {f"{target.name}.{local}": tensor for local, tensor in made.items()}

    def config(self, plan: Plan) -> dict[str, Any]:
        quantized = list(plan.quantized())
        first = quantized[0].weight if quantized else None
        return {
            "quant_method": NAME,
            "bits": first.format.bits if first else 4,
            "group_size": words.group_size(first) if first else words.WHOLE_ROW,
            "desc_act": False,
            "sym": True,
            words.HEAD: any(target.role == "head" for target in quantized),
            "checkpoint_format": NAME,
            "pack_dtype": "int32",
            "dynamic": {_SKIP + pattern: {} for pattern in _left_out(plan)},
        }

    def files(self, plan: Plan) -> dict[str, dict[str, Any]]:
        """Returns config.json's key, and the file in which the dialect's own tools look for it."""
        config = self.config(plan)
        return {CONFIG_FILE: {CONFIG_KEY: config}, FILE: config}


# --- tensors ---------------------------------------------------------------------------------------------------------


def _layout(module: str, spec: TensorSpec, shape: tuple[int, int], dtype: str) -> list[TensorInfo]:
    rows, cols = shape
    codes = TensorInfo(f"{module}.{words.CODES}", "I32", (cols * spec.format.bits // words.WORD_BITS, rows))
    groups = TensorInfo(f"{module}.{_GROUPS}", "I32", (cols,))
    return [codes, *words.scale_infos(module, spec, shape, dtype), groups]


def _zero_points(packed: Tensor, stored: StoredTarget) -> Tensor:
    """Returns the zero points [out, groups]. Raises ModelError where symmetric codes have another than half the range.

    Format `gptq` has them less one in every word of 2, 4 or 8 bits, with a borrow from the next where one is zero, as
    GPTQModel does it; of 3 bits each by itself. Releases of it differ there, so those of symmetric codes are not asked.
    """
    from quarkcli.numerics.packing import unpack_int32

    spec, bits = stored.weight, stored.weight.format.bits
    less = 0 if isinstance(stored, SecondFormat) else 1
    if bits == 3:
        zeros = (unpack_int32(packed, bits, stored.shape[0], signed=False) + less) & 7
        return words.turned(zeros)
    ones = sum(1 << at for at in range(0, words.WORD_BITS, bits))  # one in every field
    zeros = words.turned(unpack_int32(packed + less * ones, bits, stored.shape[0], signed=False))
    if spec.symmetric and bool((zeros != 1 << (bits - 1)).any()):
        what = "the config says that its codes are symmetric, and its zero points are not"
        raise ModelError(what, where=stored.name)
    return zeros


def _order(g_idx: Tensor, stored: StoredTarget) -> Tensor | None:
    """Returns the columns in order of their groups, None where they are. Raises ModelError for unequal groups."""
    import torch

    cols = stored.shape[1]
    size = stored.weight.group_size or cols
    if torch.equal(g_idx.long(), torch.arange(cols) // size):
        return None
    whole = g_idx.min() >= 0 and torch.equal(torch.bincount(g_idx.long()), torch.full((cols // size,), size))
    if not whole:
        raise ModelError(
            f"its {_GROUPS} does not put {size} inputs into each of {cols // size} groups", where=stored.name
        )
    return g_idx.argsort(stable=True)


# --- config ----------------------------------------------------------------------------------------------------------


def _left_out(plan: Plan) -> list[str]:
    """Returns expressions for the modules that are not quantized, none of which matches a quantized one.

    The head is left out unless `lm_head` is true.
    """
    left = [target.name for target in shared.unquantized(plan) if target.role != "head"]
    found = linear_patterns(left, plan.targets)
    return [text.removeprefix(_MARK) if text.startswith(_MARK) else rf"{re.escape(text)}$" for text in found]


def _settings(config: Mapping[str, Any], modules: list[str]) -> dict[str, Settings]:
    """Returns the settings of every module; the first entry of `dynamic` that matches speaks for it."""
    base = Settings(
        config.get("bits", 4), config.get("group_size", 128), config.get("sym", True), config.get("desc_act", False)
    )
    dynamic = config.get("dynamic") or {}
    patterns = {text: _MARK + text.removeprefix(_SKIP).removeprefix(_OVERRIDE) for text in dynamic}
    names = WrittenNames(patterns.values(), modules)
    found = {}
    for module in modules:
        text = next((text for text, pattern in patterns.items() if names.named(module, [pattern])), None)
        if text is not None and text.startswith(_SKIP):
            raise ModelError(f"it has codes, but the quantization config leaves it out ({text})", where=module)
        own = dynamic[text] if text is not None else {}
        found[module] = base._replace(**{key: own[key] for key in base._fields if own.get(key) is not None})
    return found


def _stored(
    kind: type[StoredTarget], module: str, settings: Settings, headers: Mapping[str, HeaderLike]
) -> StoredTarget:
    if settings.bits not in _READ_BITS:
        known = ", ".join(map(str, _READ_BITS))
        raise ModelError(f"GPTQ codes of {settings.bits} bits are not read here, only those of {known}", where=module)
    packed, rows = words.features(module, headers)
    if packed * words.WORD_BITS % settings.bits:
        raise ModelError(f"{packed} words do not hold codes of {settings.bits} bits", where=f"{module}.{words.CODES}")
    shape = (rows, packed * words.WORD_BITS // settings.bits)
    spec = words.read_spec(
        module, f"{'' if settings.sym else 'u'}int{settings.bits}", settings.group_size, shape[1], headers
    )
    wanted = _layout(module, spec, shape, "F16")
    if not settings.desc_act and f"{module}.{_GROUPS}" not in headers:  # groups are runs of neighbours
        wanted.pop()
    return kind(module, spec, None, shape, shared.check_headers(wanted, headers))


WRITER = Gptq()
