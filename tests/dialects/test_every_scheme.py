"""Every scheme in every dialect: refused with a reason, or read back with the same codes and scales, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch

from quarkcli import dialects
from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects.base import Writer
from quarkcli.disk.contents import Packed, packed_infos
from quarkcli.family import WeightView
from quarkcli.numerics.quantize import Quantized, quantize, static_scale
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes.native import to_spec
from quarkcli.spec import PerChannel, PerGroup, ScaleSpec, TensorSpec
from tests.dialects.plans import Module, Pair, attention_modules, linears, llama, moe, plan
from tests.dialects.test_roundtrip import TEXTS, bits, headers, weight_of

EXPERTS, HIDDEN, INNER = 3, 128, 256


def schemes() -> Iterator[tuple[str, Pair]]:
    """The built-in ones, and integers of every width and place that dialects of servers have."""
    for name, path in sorted(catalog.files("schemes").items()):
        data = catalog.document(path).data
        given = data.get("input")
        yield name, (to_spec(data["weight"]), to_spec(given) if given else None)
    for element in ("int2", "int3", "int4", "int8", "uint2", "uint3", "uint4", "uint8"):
        for where in (PerGroup(32), PerGroup(128), PerChannel(0)):
            zero = "int" if element.startswith("u") else "none"
            name = f"{element}_{getattr(where, 'size', 'channel')}"
            yield name, (TensorSpec(element, where, ScaleSpec("model", "half_range"), zero), None)


def dense(pair: Pair) -> Plan:
    return plan(llama(layers=1, hidden=HIDDEN, mlp=INNER, kv=64), linears(pair))


def gpt_oss(pair: Pair) -> Plan:
    """Experts as gpt-oss stores them; nothing else is quantized."""
    block = "model.layers.0"
    modules = [Module("model.embed_tokens", (128, HIDDEN), "embedding"), *attention_modules(block, HIDDEN, 64)]
    modules.append(Module(f"{block}.mlp.router", (EXPERTS, HIDDEN), "router"))
    prefix = f"{block}.mlp.experts"
    for expert in range(EXPERTS):
        for start, leaf in enumerate(("gate", "up")):
            view = WeightView(f"{prefix}.gate_up_proj", expert, transpose=True, rows=(start, 2 * INNER, 2))
            modules.append(_expert(prefix, expert, leaf, (INNER, HIDDEN), view))
        view = WeightView(f"{prefix}.down_proj", expert, transpose=True)
        modules.append(_expert(prefix, expert, "down", (HIDDEN, INNER), view))
    return plan(modules, lambda module: pair if module.expert else None)


def _expert(prefix: str, index: int, leaf: str, shape: tuple[int, int], view: WeightView) -> Module:
    group = f"{prefix}.{index}.{'down' if leaf == 'down' else 'gate_up'}"
    return Module(f"{prefix}.{index}.{leaf}_proj", shape, f"expert_{leaf}", (prefix, index), group, view)


def write(writer: Writer, made: Plan) -> tuple[dict[str, Quantized], dict[str, torch.Tensor]]:
    """Codes by weight, and the tensors of the files."""
    codes, packed = {}, Packed(writer, made.quantized())
    for seed, item in enumerate(made.quantized()):
        codes[item.name] = quantize(weight_of(item, seed), item.weight)
        static = {"input": static_scale(torch.tensor(3.25), item.input)} if item.input and item.input.is_static else {}
        packed.put(item, writer.tensors(item, codes[item.name], static))
    assert {info.name: (info.dtype, tuple(info.shape)) for info in packed_infos(writer, made.quantized())} == {
        name: (TEXTS[tensor.dtype], tuple(tensor.shape)) for name, tensor in packed.tensors.items()
    }
    return codes, packed.tensors


@pytest.mark.parametrize("build", [dense, gpt_oss])
@pytest.mark.parametrize("name", [writer.name for writer in dialects.writers()])
def test_refused_or_read_back(name: str, build: Callable[[Pair], Plan]) -> None:
    writer = dialects.writer(name)
    held = []
    for scheme, pair in schemes():
        made = build(pair)
        if writer.refusals(made):
            assert all(len(reason) > 20 for reason in writer.refusals(made))
            with pytest.raises(dialects.ConfigError):
                dialects.choose(name, made)
            continue
        if writer.reader is None:
            continue
        held.append(scheme)
        codes, tensors = write(writer, made)
        view = writer.reader.view(json.loads(json.dumps(writer.config(made))), headers(tensors))
        assert set(view.targets) == set(codes), scheme
        for item in made.quantized():
            stored = view.targets[item.name]
            assert kinds.kinds_of((stored.weight, stored.input)) == kinds.kinds_of((item.weight, item.input)), scheme
            assert (stored.shape, stored.weight.group_size) == (item.shape, item.weight.group_size)
            again, wanted = writer.reader.decode(stored, tensors).weight, codes[item.name]
            assert again.codes.dtype == wanted.codes.dtype and torch.equal(bits(again.codes), bits(wanted.codes)), (
                scheme
            )
            assert again.order is None
            for one, other in (
                (again.params.scale, wanted.params.scale),
                (again.params.zero_point, wanted.params.zero_point),
            ):
                assert (one is None) == (other is None), scheme
                if one is not None and other is not None:
                    assert one.shape == other.shape and torch.equal(bits(one), bits(other)), scheme
    if build is gpt_oss or name != "mxfp4":
        assert held


def test_vllm_loads_experts_by_turns_in_their_own_dialect_alone() -> None:
    """Its gpt-oss class raises for those that are written one by one, or leaves them as they were allocated."""
    loaded, others = set(), set()
    for scheme, pair in schemes():
        turns = gpt_oss(pair)
        routed = plan(moe(hidden=HIDDEN, inner=INNER), lambda module, pair=pair: pair if module.expert else None)
        for writer in dialects.writers():
            loaded |= {(writer.name, scheme)} if "vllm" in writer.loaders(turns) else set()
            others |= {(writer.name, scheme)} if "vllm" in writer.loaders(routed) else set()
    assert loaded == {("mxfp4", "mxfp4_weight_only")}
    assert len(others) > 40
