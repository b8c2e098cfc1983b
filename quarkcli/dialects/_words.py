"""Packs integer weights into 32-bit words as AutoAWQ and GPTQModel do, both transposed to [in, ...]. Torch-free.

A weight [out, in] is `qweight`, with `scales` [in / group, out] in the model's dtype and `qzeros` packed along the
outputs. Loaders take one number of bits and one size of groups for the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects import _shared as shared
from quarkcli.dialects.base import TensorInfo
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.spec import PerGroup, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32
CODES, ZEROS, SCALES = "qweight", "qzeros", "scales"
INPUTS, OUTPUTS = 0, 1  # dimensions of packed codes
HEAD = "lm_head"  # key of a config: is the head quantized
WHOLE_ROW = -1  # the group size of one scale per output row


def modules(headers: Mapping[str, HeaderLike]) -> list[str]:
    """Returns the modules that have packed codes, in file order."""
    suffix = f".{CODES}"
    return [name.removesuffix(suffix) for name in headers if name.endswith(suffix)]


def packed_along(headers: Mapping[str, HeaderLike]) -> int | None:
    """Returns the dimension that the codes of the first such module are packed along; None: nothing tells."""
    for module in modules(headers):
        codes, scales = headers[f"{module}.{CODES}"].shape, headers.get(f"{module}.{SCALES}")
        if scales is not None and len(codes) == len(scales.shape) == 2:
            return INPUTS if codes[1] == scales.shape[1] else OUTPUTS
    return None


def group_size(spec: TensorSpec) -> int:
    """Returns the size of groups as these dialects say it."""
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else WHOLE_ROW


def scheme_text(bits: int, group: int) -> str:
    """Returns bits and group size, as these dialects say it, in words."""
    return f"{bits} bits in " + ("whole rows" if group == WHOLE_ROW else f"groups of {group}")


def read_spec(
    module: str, short: str, size: int | None, features: int, headers: Mapping[str, HeaderLike]
) -> TensorSpec:
    """Returns the spec of a weight of `short` integers with `features` inputs. Raises ModelError."""
    scale = shared.header(headers, f"{module}.{SCALES}")
    where = "channel" if size == WHOLE_ROW else "group"
    if size is None or size == 0 or size < WHOLE_ROW or (size > 0 and features % size):
        raise ModelError(
            f"{features} input features do not hold whole groups of {size}", where=module, kind="E-SOURCE-CONTRADICTS"
        )
    return kinds.weight_spec(f"{short} {where}", kinds.scale_dtype(short, scale.dtype), size)


def features(module: str, headers: Mapping[str, HeaderLike]) -> tuple[int, int]:
    """Returns the two dimensions of the packed codes of a module. Raises ModelError."""
    shape = shared.header(headers, f"{module}.{CODES}").shape
    if len(shape) != 2:
        raise ModelError(
            f"packed codes of shape {list(shape)} are not a matrix", where=module, kind="E-SOURCE-CONTRADICTS"
        )
    return shape[0], shape[1]


def groups(spec: TensorSpec, cols: int) -> int:
    """Returns the number of scales of a row."""
    return cols // spec.group_size if spec.group_size else 1


def scale_infos(module: str, spec: TensorSpec, shape: tuple[int, int], dtype: str) -> list[TensorInfo]:
    """Returns packed zero points and scales; `dtype` is that of the scales."""
    rows, cols = shape
    count, words = groups(spec, cols), rows * spec.format.bits // WORD_BITS
    return [
        TensorInfo(f"{module}.{ZEROS}", "I32", (count, words)),
        TensorInfo(f"{module}.{SCALES}", dtype, (count, rows)),
    ]


def refusals(plan: Plan, dialect: str, places: shared.Places, *, mixed: bool = False) -> list[str]:
    """Returns the reasons a plan cannot be held, one sentence each. `mixed`: weights may differ in bits and groups."""
    found = shared.refusals(plan, dialect, places)
    reasons: dict[str, list[str]] = {}
    for run in plan.quantized_alike():
        if kinds.kinds_of(shared.pair_of(run[0])) in places.pairs:
            for reason in _reasons(run[0], dialect):
                reasons.setdefault(reason, []).extend(target.name for target in run)
    return found + shared.sentences(reasons) + ([] if mixed else _schemes(plan, dialect))


def _reasons(target: QuantizedTarget, dialect: str) -> Iterator[str]:
    spec, (rows, cols) = target.weight, target.shape
    for count, what in ((rows, "output"), (cols, "input")):
        if count * spec.format.bits % WORD_BITS:
            yield f"{count} {what} features do not fill 32-bit words of {spec.element} codes"
    assert spec.scale is not None
    if kinds.scale_text(spec, target.dtype) != target.dtype:
        yield f"{dialect} stores scales in the model's dtype {target.dtype}, not in {spec.scale.dtype}"


def _schemes(plan: Plan, dialect: str) -> list[str]:
    """Returns a sentence where weights differ in what is said once for all of them."""
    found: dict[str, list[str]] = {}
    for run in plan.quantized_alike():
        said = scheme_text(run[0].weight.format.bits, group_size(run[0].weight))
        found.setdefault(said, []).extend(target.name for target in run)
    if not found:
        return []
    usual = max(found, key=lambda said: len(found[said]))
    what = f"{dialect} has one scheme for all weights: {usual}"
    return shared.sentences({f"{what}, not {said}": names for said, names in found.items() if said != usual})


def transposed(tensor: Tensor) -> Tensor:
    """Returns a matrix transposed, in memory of its own."""
    return tensor.T.contiguous()
