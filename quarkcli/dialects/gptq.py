"""The gptq dialect: AutoGPTQ and GPTQModel write it, vLLM reads it.

Codes of 2, 3, 4 or 8 bits in words along the inputs, the lowest bits first; a code of 3 bits may lie across two words.
Symmetric codes are stored with half their range added. Format `gptq` stores zero points less one, `gptq_v2` as they
are. `g_idx` names the group of every input: with `desc_act` groups are not runs of neighbours. As GPTQModel and vLLM
0.32 (`quantization/auto_gptq.py`, `utils/gptq_utils.py`) have it; vLLM reads symmetric codes alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from quarkcli.dialects import _shared as shared
from quarkcli.dialects import _words as words
from quarkcli.dialects._documents import GptqConfig
from quarkcli.dialects._gptq_loaders import BARS, HOLDS, QUANTIZED, SGLANG, vllm_faults
from quarkcli.dialects._patterns import WrittenNames, linear_patterns
from quarkcli.dialects.base import (
    CONFIG_FILE,
    CONFIG_KEY,
    Bar,
    Classes,
    ConfigCheck,
    Decoded,
    NamesCheck,
    Reader,
    StoredTarget,
    StoredView,
    TensorInfo,
    Writer,
)
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Plan, QuantizedTarget, Target
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

NAME = "gptq"
FILE = "quantize_config.json"
_SECOND = "gptq_v2"
_READ_BITS = (2, 3, 4, 8)
_GROUPS = "g_idx"
_PLACES = shared.Places(HOLDS, attention=frozenset())
_EXPERTS = frozenset({("int4 group", "none"), ("int8 group", "none")})
# Roles that its own tools never quantize: they know the linears of every model's blocks.
_UNLISTED = frozenset({"embedding", "head", "router", "gates", "indexer", "mtp", "vision", "audio", "projector"})
_SKIP, _OVERRIDE, _MARK = "-:", "+:", "re:"
# Modules that vLLM fuses, and the name by which it looks for their bits and groups.
_FUSED = {
    "q_proj+k_proj+v_proj": "qkv_proj", "gate_proj+up_proj": "gate_up_proj",
    "q_a_proj+kv_a_proj_with_mqa": "fused_qkv_a_proj",
}  # fmt: skip
Scheme = tuple[int, int]  # bits, and the group size as the config has it


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
            raise ModelError(
                f"quark cannot read GPTQ format {layout!r}, only {NAME} and {_SECOND}",
                where=CONFIG_KEY,
                kind="E-SOURCE-FORMAT",
            )
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
            words.transposed(local[words.CODES]), spec.format.bits, stored.shape[1], signed=spec.symmetric
        )  # fmt: skip
        zeros = _zero_points(local[words.ZEROS], stored)
        order = _order(local[_GROUPS], stored) if _GROUPS in local else None
        params = QParams(words.transposed(local[words.SCALES]), zero_point=None if spec.symmetric else zeros)
        return Decoded(Quantized(codes if order is None else codes[:, order], params, order))


READER = GptqReader()


class Gptq(Writer):
    name = NAME
    reader = READER
    faults: ClassVar[Mapping[str, ConfigCheck]] = {"vllm": vllm_faults}
    own_names: ClassVar[Mapping[str, NamesCheck]] = {}  # vLLM asks which modules have codes, not which are left out
    classes: ClassVar[Mapping[str, Classes]] = {"sglang": SGLANG, "tensorrt-llm": shared.TENSORRT_LLM_NONE}
    bars: ClassVar[Mapping[str, tuple[Bar, ...]]] = BARS

    def refusals(self, plan: Plan) -> list[str]:
        return words.refusals(plan, self.name, _PLACES, mixed=True) + _unsaid(plan)

    def loaders(self, plan: Plan) -> set[str]:
        """Returns `vllm` where it loads the plan; transformers needs optimum and gptqmodel, which were not tried.

        It takes the bits and groups of some modules from `dynamic`, and which are quantized from names in the files.
        """
        refused = words.refusals(plan, self.name, _PLACES, mixed=True)  # others may say what is not said here
        found = shared.vllm_loads(plan, HOLDS, _EXPERTS) and not shared.vllm_names.quantized(plan)
        return {"vllm"} if not refused and found else set()

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
            words.CODES: words.transposed(pack_int32(quantized.codes, bits)),
            words.ZEROS: pack_int32(zeros, bits),
            words.SCALES: words.transposed(quantized.params.scale),
            _GROUPS: torch.arange(cols, dtype=torch.int32) // (cols // groups),
        }
        return {f"{target.name}.{local}": tensor for local, tensor in made.items()}

    def config(self, plan: Plan) -> dict[str, Any]:
        bits, size = _usual(plan)
        return {
            "quant_method": NAME,
            "bits": bits,
            "group_size": size,
            "desc_act": False,
            "sym": True,
            words.HEAD: any(target.role == "head" for target in plan.quantized()),
            "checkpoint_format": NAME,
            "pack_dtype": "int32",
            "dynamic": {_SKIP + pattern: {} for pattern in _left_out(plan)} | _overrides(plan),
            **({QUANTIZED: names} if (names := shared.vllm_names.with_parts(plan)) else {}),
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
        return words.transposed(zeros)
    ones = sum(1 << at for at in range(0, words.WORD_BITS, bits))  # one in every field
    zeros = words.transposed(unpack_int32(packed + less * ones, bits, stored.shape[0], signed=False))
    if spec.symmetric and bool((zeros != 1 << (bits - 1)).any()):
        what = "the config says that its codes are symmetric, and its zero points are not"
        raise ModelError(what, where=stored.name, kind="E-SOURCE-CONTRADICTS")
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
            f"its {_GROUPS} does not put {size} inputs into each of {cols // size} groups",
            where=stored.name,
            kind="E-SOURCE-CONTRADICTS",
        )
    return g_idx.argsort(stable=True)


# --- config ----------------------------------------------------------------------------------------------------------


def _left_out(plan: Plan) -> list[str]:
    """Returns expressions for the modules that are not quantized, none of which matches a quantized one.

    The head is left out unless `lm_head` is true.
    """
    left = [target.name for target in shared.unquantized(plan) if target.role != "head"]
    return _expressions([*left, *plan.matrices], [*plan.targets, *plan.matrices])


def _expressions(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    found = linear_patterns(names, universe)
    return [text.removeprefix(_MARK) if text.startswith(_MARK) else rf"{re.escape(text)}$" for text in found]


def _scheme(target: QuantizedTarget) -> Scheme:
    return target.weight.format.bits, words.group_size(target.weight)


def _usual(plan: Plan) -> Scheme:
    """Returns the bits and the group size that hold where nothing else is said: those of experts, else of most."""
    found, of_experts = Counter[Scheme](), Counter[Scheme]()
    for run in plan.quantized_alike():
        found[_scheme(run[0])] += len(run)
        if run[0].expert is not None:
            of_experts[_scheme(run[0])] += len(run)
    found = of_experts or found
    return found.most_common(1)[0][0] if found else (4, words.WHOLE_ROW)


def _others(plan: Plan) -> dict[Scheme, list[QuantizedTarget]]:
    """Returns the modules whose bits or groups are others, by these."""
    usual, found = _usual(plan), dict[Scheme, list[QuantizedTarget]]()
    if all(_scheme(run[0]) == usual for run in plan.quantized_alike()):
        return found
    for target in plan.quantized():
        if _scheme(target) != usual:
            found.setdefault(_scheme(target), []).append(target)
    return found


def _unsaid(plan: Plan) -> list[str]:
    """Returns the reasons for which other bits or groups cannot be said: servers look for the names of what they fuse.

    Experts are one module there, of one scheme.
    """
    reasons: dict[str, list[str]] = {}
    usual = words.scheme_text(*_usual(plan))
    for bits, size in (others := _others(plan)):
        for target in others[bits, size]:
            if target.expert is not None:
                what = f"{NAME} has one scheme for all experts, {usual}, not {words.scheme_text(bits, size)}"
                reasons.setdefault(what, []).append(target.name)
            elif "+" in target.group and _fused_name(target) is None:
                what = f"{NAME} has no name for the fused modules {target.group.rpartition('.')[2]}"
                reasons.setdefault(f"{what}, and so no other scheme for them", []).append(target.name)
    return shared.sentences(reasons)


def _overrides(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns the entries for modules of other bits or groups: by the names of the files, and of what vLLM fuses."""
    others = _others(plan)
    aliases = {scheme: {name for target in members if (name := _fused_name(target))}
               for scheme, members in others.items()}  # fmt: skip
    universe = {*plan.targets, *(name for names in aliases.values() for name in names)}
    return {
        _OVERRIDE + pattern: {"bits": bits, "group_size": size}
        for (bits, size), members in others.items()
        for pattern in _expressions([*(t.name for t in members), *sorted(aliases[bits, size])], universe)
    }


def _fused_name(target: Target) -> str | None:
    """Returns the name of the module that vLLM fuses it into; None where it stands alone, or none is known."""
    parent, _, members = target.group.rpartition(".")
    return f"{parent}.{_FUSED[members]}" if members in _FUSED else None


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
            raise ModelError(
                f"it has codes, but the quantization config excludes it ({text})",
                where=module,
                kind="E-SOURCE-CONTRADICTS",
            )
        own = dynamic[text] if text is not None else {}
        found[module] = base._replace(**{key: own[key] for key in base._fields if own.get(key) is not None})
    return found


def _stored(
    kind: type[StoredTarget], module: str, settings: Settings, headers: Mapping[str, HeaderLike]
) -> StoredTarget:
    if settings.bits not in _READ_BITS:
        known = ", ".join(map(str, _READ_BITS))
        raise ModelError(
            f"quark cannot read GPTQ codes of {settings.bits} bits, only those of {known}",
            where=module,
            kind="E-SOURCE-FORMAT",
        )
    packed, rows = words.features(module, headers)
    if packed * words.WORD_BITS % settings.bits:
        raise ModelError(
            f"{packed} words do not hold codes of {settings.bits} bits",
            where=f"{module}.{words.CODES}",
            kind="E-SOURCE-CONTRADICTS",
        )
    shape = (rows, packed * words.WORD_BITS // settings.bits)
    spec = words.read_spec(
        module, f"{'' if settings.sym else 'u'}int{settings.bits}", settings.group_size, shape[1], headers
    )
    wanted = _layout(module, spec, shape, "F16")
    if not settings.desc_act and f"{module}.{_GROUPS}" not in headers:  # groups are runs of neighbours
        wanted.pop()
    return kind(module, spec, None, shape, shared.check_headers(wanted, headers))


WRITER = Gptq()
