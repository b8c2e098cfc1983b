"""Finds unexpected tensors: adapters, codes without their config, tensors of no model. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from quarkcli.errors import ModelError
from quarkcli.family.lists import tower
from quarkcli.family.schema import HeaderLike

_ADAPTERS = re.compile(
    "(?:^|\\.)(lora_[A-Za-z]\\w*|base_layer|modules_to_save|original_module|ia3_l|hada_[tw]\\w*|lokr_[tw]\\w*|vera_lambda_\\w+|oft_[rs]|boft_[rs]|adalora_\\w+|randlora_\\w+|base_model\\.model)(?:\\.|$)",
    re.MULTILINE,
)
_CODES = re.compile(
    "\\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\\.\\w+|weight_packed|weight_scale_inv|weight_scale)$",
    re.MULTILINE,
)
_TOOLS = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ", "SCB": "bitsandbytes", "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes", "nested_absmax": "bitsandbytes", "nested_quant_map": "bitsandbytes",
    "weight_packed": "compressed-tensors", "weight_scale_inv": "fp8", "weight_scale": "fp8 or int8",
}  # fmt: skip


def check_leftovers(headers: Mapping[str, HeaderLike]) -> None:
    """Raises ModelError for tensors of an adapter, for codes of a quantized model, and for empty tensors."""
    everything = "\n".join(headers)
    found = _ADAPTERS.search(everything)
    if found:
        names = [name for name in headers if _ADAPTERS.search(name)]
        raise ModelError(
            f"holds an adapter that is not merged: {_listed(names)}",
            hint="merge it first (merge_and_unload of peft, then save_pretrained) and quantize the result",
            kind="E-MODEL-LEFTOVERS",
        )
    check_codes(headers)
    empty = [f"{name} {list(header.shape)}" for name, header in headers.items() if 0 in header.shape]
    if empty:
        raise ModelError(
            f"{len(empty)} tensor{'s have' if len(empty) > 1 else ' has'} no values: {_listed(empty, count=False)}",
            hint="save the model again with its full state: its shards (FSDP, ZeRO-3) were not gathered",
            kind="E-MODEL-LEFTOVERS",
        )
    double = [name for name, header in headers.items() if header.dtype == "F64" and len(header.shape) > 1]
    if double:
        raise ModelError(
            f"these tensors are in double precision (F64): {_listed(double)}",
            hint="save it as BF16 or F32 first: from_pretrained(..., dtype=torch.bfloat16), then save_pretrained",
            kind="E-MODEL-DTYPE",
        )


def check_codes(headers: Mapping[str, HeaderLike]) -> None:
    """Raises ModelError for codes of a quantized model; it is asked where config.json has no quantization_config."""
    found = _CODES.search("\n".join(headers))
    if found:
        names = [name for name in headers if _CODES.search(name)]
        tool = _TOOLS.get(found[1], "bitsandbytes")
        raise ModelError(
            f"holds codes of {tool}, and config.json has no quantization_config that says so: {_listed(names)}",
            hint="add the quantization_config again, or give the original model: this one is quantized already",
            kind="E-MODEL-LEFTOVERS",
        )


# Roles that say nothing of what a tensor is.
NO_ROLES = frozenset({"parameter", "linear", "other"})


def surprises(roles: Mapping[str, str], headers: Mapping[str, HeaderLike], unlisted: Sequence[str]) -> Iterator[str]:
    """Yields warnings of tensors that stay as they are and that somebody should look at.

    roles     role of every tensor, see `Layout.tensor_roles`
    unlisted  tensors that the index does not name. Raises ModelError for those of a role: it cannot be told whether
              they are the model's
    """
    known = [name for name in unlisted if roles.get(name, "other") not in NO_ROLES]
    if known:
        raise ModelError(
            f"these tensors are in the files but not in the index: {_listed(known)}",
            hint="download the index again, or save the model again: it is incomplete or of another model",
            kind="E-MODEL-INDEX",
        )
    if unlisted:
        yield (
            "these tensors are in the files but not in the index, and are copied as they are: "
            f"{_listed(list(unlisted))}"
        )
    odd = [
        f"{name} {list(header.shape)}"
        for name, header in headers.items()
        if name.endswith(".weight") and len(header.shape) > 2 and roles.get(name) in NO_ROLES and not tower(name)
    ]
    if odd:
        yield f"these tensors are no matrices and of no known role, and are kept as they are: {_listed(odd)}"


def _listed(names: list[str], *, count: bool = True) -> str:
    more = ", ..." if len(names) > 5 else ""
    return ", ".join(names[:5]) + more + (f" ({len(names)} tensors)" if count and len(names) > 1 else "")
