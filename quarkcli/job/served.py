"""Runs a part as it will be served: with weights decoded from the files, and quantized activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from quarkcli.dialects.base import Decoded, StoredTarget, Writer
from quarkcli.forward.activations import ActivationQuantizer, AttentionQuantizer, quantizing_handlers
from quarkcli.model.handlers import Handlers
from quarkcli.numerics.quantize import dequantize
from quarkcli.plan.model import Part, Plan, QuantizedTarget
from quarkcli.threads import Workers


def put_decoded(
    plan: Plan,
    dialect: Writer,
    part: Part,
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, Tensor],
    workers: Workers | None = None,
) -> None:
    """Overwrites the part's source tensors with what the packed ones decode to: no second copy of a block."""

    def put(target: QuantizedTarget) -> None:
        decoded = decode(dialect, target, packed)
        into = target.view.of(tensors[target.view.tensor])
        into.copy_(dequantize(decoded.weight, target.weight, into.dtype))
        if decoded.bias is not None and target.bias_spec is not None and target.bias is not None:
            tensors[target.bias].copy_(dequantize(decoded.bias, target.bias_spec).reshape(-1))

    for _ in (workers or Workers()).map(put, plan.quantized(part.index)):
        pass


def decode(dialect: Writer, target: QuantizedTarget, packed: Mapping[str, Tensor]) -> Decoded:
    """Returns the codes and scales that a server reads from a target's packed tensors, given by file name."""
    assert dialect.reader is not None
    places = dialect.places(target)
    names = tuple(places[info.name].tensor if info.name in places else info.name for info in dialect.infos(target))
    own = {name.removeprefix(f"{target.name}."): place for name, place in places.items()}
    stored = StoredTarget(
        target.name, target.weight, target.input, target.shape, names, target.output, target.bias_spec, own
    )  # fmt: skip
    return dialect.reader.decode(stored, {name: packed[name] for name in names})


def handlers(
    plan: Plan, part: Part, scales: Mapping[str, Tensor], loads: Callable[[str], bool]
) -> Handlers:  # fmt: skip
    """Returns the handlers that fake-quantize the activations of a block.

    scales   stored static scales by `Activation.key`
    loads    tells whether the model loads a file tensor: a weight that it does not load reads nothing
    """
    activations = (a for a in _activations(plan, part, scales) if loads(a.tensor))
    return quantizing_handlers(activations, _attentions(plan, part, scales))


def own_scales(target: QuantizedTarget, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the static scales of a target by slot kind."""
    return {kind: scales[f"{target.name}.{kind}"] for kind in ("input", "output") if f"{target.name}.{kind}" in scales}


def _activations(plan: Plan, part: Part, scales: Mapping[str, Tensor]) -> Iterator[ActivationQuantizer]:
    for target in plan.quantized(part.index):
        own, tensor = own_scales(target, scales), target.view.tensor
        layer, expert = target.expert or ("", None)
        if target.input is not None:
            down = target.role == "expert_down"
            yield ActivationQuantizer(tensor, target.input, own.get("input"), expert, down, layer)
        if target.output is not None:
            yield ActivationQuantizer(tensor, target.output, own.get("output"), output=True)


def _attentions(plan: Plan, part: Part, scales: Mapping[str, Tensor]) -> Iterator[AttentionQuantizer]:
    for module in plan.attention.values():
        if module.part == part.index and module.specs:
            own = {kind: scales[f"{module.name}.{kind}"] for kind in module.specs if f"{module.name}.{kind}" in scales}
            yield AttentionQuantizer(plan.targets[module.k_proj].view.tensor, module.specs, own)
