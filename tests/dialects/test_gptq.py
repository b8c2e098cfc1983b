"""gptq: against words packed here bit by bit from the format's description, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quarkcli import dialects
from quarkcli.dialects import gptq
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.disk.verify import directory
from quarkcli.errors import ModelError
from quarkcli.job import convert
from quarkcli.numerics.quantize import dequantize
from quarkcli.spec import PerChannel, PerGroup, ScaleSpec, TensorSpec
from tests import runs
from tests.dialects.plans import Module, int4, linears, llama, moe, plan
from tests.dialects.test_roundtrip import headers
from tests.plan import layouts

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
INT8 = TensorSpec("int8", PerGroup(32), ScaleSpec("model", "half_range"))


def words(column: np.ndarray, bits: int) -> list[int]:
    """Words of a run of numbers, one stream of bits, the lowest first: of 3 bits, 32 numbers lie in three words."""
    stream = 0
    for place, number in enumerate(column.tolist()):
        stream |= number << (bits * place)
    return [stream >> (32 * word) & 0xFFFFFFFF for word in range(len(column) * bits // 32)]


def packed(matrix: np.ndarray, bits: int, *, down: bool) -> torch.Tensor:
    """Words of a matrix, along its columns or its rows."""
    lines = matrix.T if down else matrix
    found = np.array([words(line, bits) for line in lines], np.uint32)
    return torch.from_numpy(np.ascontiguousarray(found.T if down else found).view(np.int32))


def made_by_hand(
    bits: int, *, sym: bool, group: int = 32, second: bool = False, shuffled: bool = False, lowest: int = 1
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of one module, and the weight [out, in] that they mean. `lowest`: of the zero points."""
    inputs, outputs, top = 96 if group != 64 else 128, 32, 1 << bits
    rng = np.random.default_rng(bits)
    size = inputs if group == -1 else group
    g_idx = np.arange(inputs) // size
    g_idx = rng.permutation(g_idx) if shuffled else g_idx
    codes = rng.integers(0, top, (inputs, outputs))
    zeros = rng.integers(lowest, top, (inputs // size, outputs))
    zeros = np.full_like(zeros, top // 2) if sym else zeros
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    weight = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        for o in range(outputs):
            weight[o, i] = np.float32(codes[i, o] - zeros[g_idx[i], o]) * np.float32(scales[g_idx[i], o])
    tensors = {
        "qweight": packed(codes, bits, down=True),
        "qzeros": packed(zeros if second else zeros - 1, bits, down=False),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return {f"m.{name}": tensor for name, tensor in tensors.items()}, torch.from_numpy(weight)


def read(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[Any, Any, torch.Tensor]:
    reader = dialects.reader(config, headers(tensors))
    assert reader is not None and reader.name == "gptq"
    stored = reader.view(config, headers(tensors)).targets["m"]
    decoded = reader.decode(stored, tensors)
    return stored, decoded, dequantize(decoded.weight, stored.weight)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_gptqmodel_packs(bits: int, sym: bool, second: bool, shuffled: bool) -> None:
    for group in (32, 64, -1):
        tensors, weight = made_by_hand(bits, sym=sym, group=group, second=second, shuffled=shuffled)
        config = {**CONFIG, "bits": bits, "group_size": group, "sym": sym, "desc_act": shuffled}
        config["checkpoint_format"] = "gptq_v2" if second else "gptq"
        stored, decoded, values = read(config, tensors)
        assert torch.equal(values, weight)
        assert stored.weight.element == f"{'' if sym else 'u'}int{bits}"
        assert stored.weight.granularity == (PerChannel(0) if group == -1 else PerGroup(group))
        assert (decoded.weight.order is not None) == (shuffled and group != -1)


def test_zero_points_of_zero_as_gptqmodel_stores_them() -> None:
    """One is taken from every field of a word at once, and borrows from the next where a zero point is zero."""
    tensors, weight = made_by_hand(4, sym=False, second=True, lowest=0)
    tensors["m.qzeros"] = tensors["m.qzeros"] - 0x11111111
    assert torch.equal(read({**CONFIG, "sym": False}, tensors)[2], weight)


def test_without_the_groups_of_inputs() -> None:
    tensors, weight = made_by_hand(4, sym=True)
    del tensors["m.g_idx"]
    assert torch.equal(read(CONFIG, tensors)[2], weight)
    with pytest.raises(ModelError, match="g_idx"):
        read({**CONFIG, "desc_act": True}, tensors)


def test_settings_of_single_modules() -> None:
    """The first that matches speaks, from the start of a name; what it does not say holds as for all."""
    tensors, weight = made_by_hand(8, sym=True, group=64)
    dynamic = {"-:n$": {}, r"+:.*m$": {"bits": 8, "group_size": 64}, "m": {"bits": 2}}
    assert torch.equal(read({**CONFIG, "dynamic": dynamic}, tensors)[2], weight)
    with pytest.raises(ModelError, match=r"m: it has codes, but the quantization config excludes it \(-:m\)"):
        read({**CONFIG, "dynamic": {"-:m": {}, **dynamic}}, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, "quark cannot read GPTQ format 'marlin', only gptq and gptq_v2"),
        ({"format": "bitblas"}, "quark cannot read GPTQ format 'bitblas'"),
        ({"is_marlin_format": True}, "quark cannot read GPTQ format 'marlin'"),
        ({"bits": 5}, "quark cannot read GPTQ codes of 5 bits, only those of 2, 3, 4, 8"),
        ({"bits": 8}, "48 input features do not hold whole groups of 32"),
        ({"group_size": 0}, "do not hold whole groups of 0"),
        ({"sym": "yes"}, "sym must be true or false"),
        ({"dynamic": {"+:(": {}}}, "quantization_config"),
        (
            {"checkpoint_format": "gptq_v2"},
            "m: the config says that its codes are symmetric, and its zero points are not",
        ),
    ],
)
def test_what_is_not_read(change: dict[str, Any], message: str) -> None:
    tensors, _ = made_by_hand(4, sym=True)
    with pytest.raises(ModelError, match=message):
        read({**CONFIG, **change}, tensors)


def test_groups_of_other_sizes_are_not_read() -> None:
    tensors, _ = made_by_hand(4, sym=True)
    tensors["m.g_idx"] = torch.zeros(96, dtype=torch.int32)
    with pytest.raises(ModelError, match="its g_idx does not put 32 inputs into each of 3 groups"):
        read(CONFIG, tensors)


def test_vllm_refuses_groups_in_order_of_activations() -> None:
    config = {**CONFIG, "desc_act": True}
    assert gptq.WRITER.config_faults(config, "vllm") == [
        "desc_act is true, and it does not load groups in the order of activations"
    ]
    assert gptq.WRITER.config_faults({**config, "group_size": -1}, "vllm") == []
    assert gptq.WRITER.config_faults(CONFIG, "vllm") == []


def test_what_is_left_out_is_told_by_expressions() -> None:
    made = plan(llama(2), lambda m: (int4(), None) if m.role in ("gate", "up", "down") else None)
    assert gptq.WRITER.refusals(made) == [] and gptq.WRITER.loaders(made) == {"vllm"}
    config = gptq.WRITER.config(made)
    assert list(config["dynamic"]) == [
        rf"-:(.*\.)?layers\.\d+\.self_attn\.{leaf}_proj$" for leaf in ("q", "k", "v", "o")
    ]  # fmt: skip
    assert config["lm_head"] is False
    mixed = plan(llama(1), lambda m: ((INT8 if m.role == "down" else int4()), None) if m.role != "embedding" else None)
    assert gptq.WRITER.config(mixed)["lm_head"] is True
    assert gptq.WRITER.refusals(mixed) == []
    assert gptq.WRITER.config(mixed)["dynamic"] == {
        r"+:(.*\.)?layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 32}
    }
    asymmetric = TensorSpec("uint4", PerGroup(32), ScaleSpec("model", "half_range"), "int")
    assert "gptq cannot hold weight uint4" in gptq.WRITER.refusals(plan(llama(1), linears((asymmetric, None))))[0]


def test_other_bits_and_groups_are_said_by_the_names_of_files_and_of_what_vllm_fuses(tmp_path: Path) -> None:
    """vLLM asks for `qkv_proj`, by the first entry that matches from the start; GPTQModel for each module."""
    layers = ["*self_attn.[qkv]_proj=int4_wo_32", "model.layers.1.mlp.down_proj=int4_wo_64"]
    made = runs.run("demo", tmp_path / "out", scheme="int4_wo_128", dialect="gptq", layers=layers,
                    exclude=["model.layers.2.*"])  # fmt: skip
    assert made.prepared.dialect.loaders(made.prepared.plan) == {"vllm"}
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (4, 128)

    def asked(module: str) -> object:
        """As vLLM's `get_dynamic_override` finds the group size."""
        for entry, values in config["dynamic"].items():
            if re.match(entry[2:], module):
                return False if entry.startswith("-:") else values["group_size"]
        return config["group_size"]

    sizes = {"self_attn.qkv_proj": 32, "self_attn.q_proj": 32, "self_attn.o_proj": 128, "mlp.gate_up_proj": 128,
             "mlp.down_proj": 128}  # fmt: skip
    for name, size in sizes.items():
        assert asked(f"model.layers.0.{name}") == size, name
        if name not in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            assert asked(f"model.layers.2.{name}") is False
    assert asked("model.layers.1.mlp.down_proj") == 64 and asked("language_model.model.layers.1.mlp.down_proj") == 64
    view = Checkpoint(Source.open(str(made.folder))).view.targets
    found = {name: stored.weight.group_size for name, stored in view.items()}
    wanted = {target.name: target.weight.group_size for target in made.prepared.plan.quantized()}
    assert found == wanted and set(found.values()) == {32, 64, 128}
    assert directory(str(made.folder), source=str(made.source))


def test_other_schemes_that_no_name_is_known_for_are_refused() -> None:
    def choose(module: Module) -> tuple[TensorSpec, None] | None:
        other = module.role == "expert_down" or module.name.endswith("layers.0.self_attn.q_proj")
        return (INT8 if other else int4(), None) if module.role not in ("embedding", "head", "router") else None

    (first,) = gptq.WRITER.refusals(plan(moe(layers=1, experts=2), choose))
    assert first == ("model.layers.0.mlp.experts.0.down_proj (and 1 more): gptq has one scheme for all experts, "
                     "4 bits in groups of 32, not 8 bits in groups of 32")  # fmt: skip
    unknown = [replace(module, group=f"{module.name.rpartition('.')[0]}.a_proj+b_proj") for module in llama(1)]
    (reason,) = gptq.WRITER.refusals(plan(unknown, choose))
    assert "no name for the fused modules a_proj+b_proj" in reason


def test_a_run_is_verified_and_decodes_to_what_compressed_tensors_holds(tmp_path: Path) -> None:
    given = {"scheme": "int4_wo_32"}
    made = [runs.run("demo", tmp_path / name, dialect=name, **given) for name in ("gptq", "compressed-tensors")]
    ours, theirs = (Checkpoint(Source.open(str(one.folder))) for one in made)
    assert set(ours.view.targets) == set(theirs.view.targets)
    for name in ours.view.targets:
        assert torch.equal(ours.weight(name), theirs.weight(name)), name
    tensors = runs.read_all(made[0].folder)
    assert {int(word) for word in tensors["model.layers.0.mlp.up_proj.qzeros"].unique()} == {0x77777777}
    assert directory(str(made[0].folder), source=str(made[0].source))


def test_columns_in_another_order_are_quantized_again_and_not_converted(tmp_path: Path) -> None:
    """A checkpoint with `desc_act`: read as it decodes, wherever its columns lie; no other dialect can say it."""
    made = runs.run("demo", tmp_path / "made", scheme="int4_wo_32", dialect="gptq", verify=False)
    before = Checkpoint(Source.open(str(made.folder)))
    name = "model.layers.1.mlp.down_proj"
    wanted = before.weight(name)
    tensors = runs.read_all(made.folder)
    order = torch.randperm(wanted.shape[1], generator=torch.Generator().manual_seed(0))
    codes = before.decode(before.view.targets[name]).weight.codes[:, order] + 8
    tensors[f"{name}.qweight"] = packed(codes.T.numpy().astype(np.int64), 4, down=True)
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order].contiguous()
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for file in [*made.folder.glob("tokenizer*"), made.folder / "config.json"]:
        text = file.read_text().replace('"desc_act": false', '"desc_act": true')
        (source / file.name).write_text(text)
    checkpoint = Checkpoint(Source.open(str(source)))
    assert torch.equal(checkpoint.weight(name), wanted[:, order])
    runs.run(source, tmp_path / "again", scheme="nvfp4_weight_only")
    with pytest.raises(ModelError, match="does not keep its order of columns") as caught:
        convert.convert(Source.open(str(source)), "compressed-tensors", tmp_path / "out")
    assert caught.value.where == name


def test_schemes_are_counted_once_however_many_modules_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of other bits are refused one by one; looking at all weights for each took a large model a minute."""
    counted = []
    real = gptq._usual
    monkeypatch.setattr(gptq, "_usual", lambda plan: counted.append(plan) or real(plan))
    found = layouts.plan("int4_wo_64", layouts.MIXTRAL, layers=["*experts.1.*=int8_dynamic"])
    assert gptq._unsaid(found)
    assert len(counted) <= 2
