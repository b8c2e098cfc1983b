"""awq: against words packed here bit by bit from AutoAWQ's description, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quarkcli import dialects
from quarkcli.dialects import awq
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.disk.verify import directory
from quarkcli.errors import ModelError
from quarkcli.numerics.quantize import dequantize
from quarkcli.spec import PerChannel, PerGroup, ScaleSpec, TensorSpec
from tests import runs
from tests.dialects.plans import Module, linears, llama, plan
from tests.dialects.test_roundtrip import headers

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 32, "zero_point": True}
UINT4 = TensorSpec("uint4", PerGroup(32), ScaleSpec("model", "half_range"), "int")


def words(matrix: np.ndarray) -> torch.Tensor:
    """Words of rows of 4-bit numbers: the nibble at bit 4 j holds column ORDER[j] of its eight."""
    rows, cols = matrix.shape
    packed = np.zeros((rows, cols // 8), np.uint32)
    for row in range(rows):
        for col in range(cols):
            at = ORDER.index(col % 8)
            packed[row, col // 8] |= np.uint32(matrix[row, col]) << np.uint32(4 * at)
    return torch.from_numpy(packed.view(np.int32).copy())


def made_by_hand(group: int, inputs: int = 64, outputs: int = 16) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of one module, and the weight [out, in] that they mean."""
    rng = np.random.default_rng(0)
    size = inputs if group == -1 else group
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(0, 16, (inputs // size, outputs))
    scales = rng.uniform(0.01, 0.1, (inputs // size, outputs)).astype(np.float16)
    weight = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        for o in range(outputs):
            weight[o, i] = np.float32(codes[i, o] - zeros[i // size, o]) * np.float32(scales[i // size, o])
    tensors = {"qweight": words(codes), "qzeros": words(zeros), "scales": torch.from_numpy(scales)}
    return {f"m.{name}": tensor for name, tensor in tensors.items()}, torch.from_numpy(weight)


@pytest.mark.parametrize("group", [32, 64, -1])
def test_what_autoawq_packs(group: int) -> None:
    tensors, weight = made_by_hand(group)
    config = {**CONFIG, "q_group_size": group, "modules_to_not_convert": ["gate"]}
    reader = dialects.reader(config, headers(tensors))
    assert reader is not None and reader.name == "awq"
    stored = reader.view(config, headers(tensors)).targets["m"]
    assert stored.shape == (16, 64) and stored.input is None
    assert stored.weight.granularity == (PerChannel(0) if group == -1 else PerGroup(group))
    assert torch.equal(dequantize(reader.decode(stored, tensors).weight, stored.weight), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "quark cannot read AWQ version 'gemv', only"),
        ({"version": "GEMV_FAST"}, "quark cannot read AWQ version 'GEMV_FAST', only"),
        ({"w_bit": 3}, "quark cannot read AWQ codes of 3 bits, only those of"),
        ({"q_group_size": 48}, "64 input features do not hold whole groups of 48"),
        ({"q_group_size": None}, "do not hold whole groups of None"),
        ({"w_bit": "4"}, "w_bit must be a whole number"),
        ({"q_group_size": 64}, r"m\.qzeros: found I32 \[2, 2\], but the quantization config asks for I32 \[1, 2\]"),
    ],
)
def test_what_is_not_read(change: dict, message: str) -> None:
    tensors, _ = made_by_hand(32)
    with pytest.raises(ModelError, match=message):
        awq.READER.view({**CONFIG, **change}, headers(tensors))


def test_zero_points_are_needed_whatever_the_config_says_of_them() -> None:
    tensors, weight = made_by_hand(32)
    config = {**CONFIG, "zero_point": False}
    stored = awq.READER.view(config, headers(tensors)).targets["m"]
    assert torch.equal(dequantize(awq.READER.decode(stored, tensors).weight, stored.weight), weight)
    del tensors["m.qzeros"]
    with pytest.raises(ModelError, match="without zero points"):
        awq.READER.view(config, headers(tensors))


REFUSED = {
    "symmetric": (TensorSpec("int4", PerGroup(32), ScaleSpec("model", "half_range")), "awq cannot hold weight int4"),
    "whole scales": (TensorSpec("uint4", PerGroup(32), ScaleSpec("f32", "half_range"), "int"), "scales in the model's"),
    "narrow words": (UINT4, "12 output features do not fill 32-bit words of uint4 codes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_hold(case: str) -> None:
    spec, reason = REFUSED[case]
    shape = (12, 64) if case == "narrow words" else (64, 64)
    made = plan([Module("model.layers.0.mlp.up_proj", shape, "up")], lambda module: (spec, None))
    assert [reason in text for text in awq.WRITER.refusals(made)] == [True]
    assert awq.WRITER.loaders(made) == set()


def test_one_scheme_for_all() -> None:
    other = TensorSpec("uint4", PerChannel(0), ScaleSpec("model", "half_range"), "int")
    made = plan(
        llama(1), lambda m: None if m.role in ("embedding", "head") else (other if m.role == "o" else UINT4, None)
    )
    assert awq.WRITER.refusals(made) == [
        "model.layers.0.self_attn.o_proj: awq has one scheme for all weights: 4 bits in groups of 32, "
        "not 4 bits in whole rows"
    ]


def test_what_is_left_out_is_named_by_parts() -> None:
    """vLLM leaves out whatever has an entry in its name."""
    made = plan(llama(1), linears((UINT4, None)))
    assert awq.WRITER.config(made)["modules_to_not_convert"] == ["lm_head"]
    assert not awq.WRITER.config(made)["lm_head"]
    modules = [Module("m.gate", (64, 64), "router"), Module("m.gate_proj", (64, 64), "gate")]
    made = plan(modules, linears((UINT4, None)))
    assert awq.WRITER.refusals(made) == [
        "m.gate: awq excludes modules by parts of their names, and that would exclude m.gate_proj too"
    ]


def test_a_run_is_verified_and_decodes_to_what_compressed_tensors_holds(tmp_path: Path) -> None:
    """The head too, which servers find by a key of its own."""
    given = {"scheme": "uint4_wo_32", "include": ("lm_head",)}
    made = [runs.run("demo", tmp_path / name, dialect=name, **given) for name in ("awq", "compressed-tensors")]
    ours, theirs = (Checkpoint(Source.open(str(one.folder))) for one in made)
    assert set(ours.view.targets) == set(theirs.view.targets) and "lm_head" in ours.view.targets
    for name in ours.view.targets:
        assert torch.equal(ours.weight(name), theirs.weight(name)), name
    assert ours.source.config["quantization_config"]["lm_head"] is True
    assert any("lists exactly the" in line for line in directory(str(made[0].folder), source=str(made[0].source)))
