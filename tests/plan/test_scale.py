"""A plan for DeepSeek-V3's real shapes: 46,000 weights, from headers alone, in seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quarkcli import dialects, family, memory
from quarkcli.cli import planview
from quarkcli.dialects.base import Writer
from quarkcli.disk import contents
from quarkcli.disk.headers import SINGLE
from quarkcli.disk.headers import Header as Stored
from quarkcli.disk.source import Source
from quarkcli.disk.writer import plan_files, tensor_bytes
from quarkcli.family import Layout
from quarkcli.job import forecast, preflight
from quarkcli.job import run as job
from quarkcli.job.options import Options
from quarkcli.plan.compose import Overrides
from quarkcli.plan.explain import explain
from quarkcli.plan.model import Plan
from quarkcli.plan.resolve import resolve
from quarkcli.recipe.recipe import from_scheme
from tests.forks import Forks
from tests.tiny import Header

HIDDEN, BLOCKS, DENSE, EXPERTS = 7168, 61, 3, 256
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": BLOCKS,
    "hidden_size": HIDDEN, "num_attention_heads": 128, "n_routed_experts": EXPERTS, "vocab_size": 129280,
}  # fmt: skip
BYTES = 2**30
TILES = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def mlp(prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, HIDDEN)
    yield f"{prefix}.up_proj.weight", (inner, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, inner)


def block(index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    name = f"model.layers.{index}"
    attention = f"{name}.self_attn"
    yield f"{name}.input_layernorm.weight", (HIDDEN,)
    yield f"{name}.post_attention_layernorm.weight", (HIDDEN,)
    yield f"{attention}.q_a_proj.weight", (1536, HIDDEN)
    yield f"{attention}.q_a_layernorm.weight", (1536,)
    yield f"{attention}.q_b_proj.weight", (128 * (128 + 64), 1536)
    yield f"{attention}.kv_a_proj_with_mqa.weight", (512 + 64, HIDDEN)
    yield f"{attention}.kv_a_layernorm.weight", (512,)
    yield f"{attention}.kv_b_proj.weight", (128 * (128 + 128), 512)
    yield f"{attention}.o_proj.weight", (HIDDEN, 128 * 128)
    if index < DENSE:
        yield from mlp(f"{name}.mlp", 18432)
        return
    yield f"{name}.mlp.gate.weight", (EXPERTS, HIDDEN)
    yield f"{name}.mlp.gate.e_score_correction_bias", (EXPERTS,)
    yield from mlp(f"{name}.mlp.shared_experts", 2048)
    for expert in range(EXPERTS):
        yield from mlp(f"{name}.mlp.experts.{expert}", 2048)


def deepseek_v3() -> dict[str, Header]:
    shapes = [("model.embed_tokens.weight", (129280, HIDDEN))]
    for index in range(BLOCKS + 1):  # the last one predicts a second token
        shapes += block(index)
    extra = f"model.layers.{BLOCKS}"
    shapes += [(f"{extra}.{leaf}.weight", (HIDDEN,)) for leaf in ("enorm", "hnorm", "shared_head.norm")]
    shapes += [(f"{extra}.{leaf}.weight", (129280, HIDDEN)) for leaf in ("embed_tokens", "shared_head.head")]
    shapes += [(f"{extra}.eh_proj.weight", (HIDDEN, 2 * HIDDEN))]
    shapes += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (129280, HIDDEN))]
    return {name: Header("BF16", shape) for name, shape in shapes}


HEADERS = deepseek_v3()


def published(folder: Path) -> Source:
    """The same as it was published: linears in fp8 with a scale per tile of 128 x 128, all else in 16 bits."""
    headers: dict[str, Stored] = {}
    for name, header in HEADERS.items():
        tiled = name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")
        headers[name] = Stored(name, "F8_E4M3" if tiled else "BF16", header.shape, SINGLE, 0, 0)
        if tiled:
            scale = f"{name}_scale_inv"
            headers[scale] = Stored(scale, "F32", tuple(-(-size // 128) for size in header.shape), SINGLE, 0, 0)
    config = {**CONFIG, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1, "quantization_config": TILES}
    return Source(folder, "deepseek", None, None, json.dumps(config), config, headers, {SINGLE: (1, 1)})


def prepared(scheme: str, **flags: Any) -> tuple[Layout, Plan, Writer, forecast.Forecast]:
    """What a job does between opening a model and reading its first weight."""
    name, model, inferred = family.for_checkpoint(CONFIG, HEADERS)
    layout = family.lay_out(name, model, inferred, CONFIG, HEADERS)
    family.check_fit(model, layout, CONFIG, HEADERS)
    plan = resolve(from_scheme(scheme), Overrides(**flags), layout)
    preflight.check_plan(plan)
    (dialect,) = dialects.choose("auto", plan)
    needs = preflight.data_needs(plan, [])
    size = forecast.forecast(
        plan, dialect, HEADERS, source_bytes=0, calibrated=bool(needs), tokens=0, hidden=HIDDEN, solving=0
    )
    dialects.warnings(dialect, plan)
    return layout, plan, dialect, size


@pytest.fixture(scope="module")
def nvfp4() -> tuple[Layout, Plan, Writer, forecast.Forecast]:
    return prepared("nvfp4", exclude=["*layers.7.*", "*layers.60.mlp.experts.200.*"])


def test_it_is_the_real_model() -> None:
    values = sum(tensor_bytes(header.dtype, header.shape) for header in HEADERS.values()) / 2
    main = sum(
        tensor_bytes(h.dtype, h.shape) for n, h in HEADERS.items() if not n.startswith(f"model.layers.{BLOCKS}.")
    ) / 2  # fmt: skip
    assert round(main / 1e9) == 671  # parameters as published, without the extra block
    assert values > main
    assert sum(".experts." in name for name in HEADERS) == 45_312


def peak() -> int:
    kept = prepared("nvfp4")
    assert kept
    return memory.peak_rss()


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_as_it_was_published(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the files has a fate, that of the 16-bit model for its weights; and it is known in seconds."""
    source = published(tmp_path)
    monkeypatch.setattr(job, "open_source", lambda *given: source)
    started = time.process_time()
    found = job.prepare(Options(model="deepseek", scheme=scheme, calib_data="builtin"))
    taken = time.process_time() - started
    fates = found.plan.fates()
    assert set(fates) == set(HEADERS) and len(HEADERS) == 46_183
    assert found.origin is not None
    scales = len(source.headers) - len(HEADERS)
    assert found.origin.tensors == 2 * len(found.origin.weights) == 2 * scales
    assert found.origin.stored() == "fp8_e4m3 tile 128x128"
    left = found.origin.left_alone(found.plan)
    quantized = {target.name for target in found.plan.quantized()} - found.plan.carried
    assert quantized | set(left) | found.plan.carried >= set(found.origin.weights)
    assert not left  # kv_a_proj_with_mqa ends within a tile, as the last of what servers fuse may
    assert {"kv_a_proj_with_mqa", "q_a_proj"} <= {name.rpartition(".")[2] for name in found.plan.carried}
    assert taken < 10  # under 5 on a machine that does nothing else


def test_memory(forks: Forks, tmp_path: Path) -> None:
    """In a process of its own, with everything that a job imports."""
    found = forks.value("tests.plan.test_scale.peak", cwd=tmp_path)
    assert 2**20 < found < BYTES


def test_equal_decisions_are_one_object(nvfp4: Any) -> None:
    _, plan, _, _ = nvfp4
    experts = [target for target in plan.quantized() if target.expert is not None]
    assert len({id(target.slots) for target in experts}) == 1
    assert len({id(decision.spec) for _, decision in plan.slots() if decision.spec is not None}) == 2
    assert len(plan.alike()) < 1500  # protected modules are named one by one
    assert sum(map(len, plan.alike())) == len(plan.targets)


@pytest.mark.slow
def test_sizes_are_those_of_every_part(nvfp4: Any) -> None:
    """Blocks that are alike are sized once; the sum is that of all of them, one by one."""
    _, plan, dialect, size = nvfp4
    owners = contents.part_targets(plan)
    files = dtypes = 0
    for part in plan.parts:
        infos = contents.part_infos(plan, dialect, part, HEADERS, owners)
        files += sum(file.size for file in plan_files(contents.slug(part), infos))
        dtypes += sum(tensor_bytes(info.dtype, info.shape) for info in infos)
    assert size.output_bytes == files
    assert sum(size.dtypes.values()) == dtypes


def test_what_people_see_of_it_is_short(nvfp4: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, plan, _, _ = nvfp4
    planview._modules(plan)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 15
    rows = planview.folded(planview.entries(plan))
    assert sum(row["count"] for row in rows) == len(plan.entries) > 4000
    assert sum(row["matches"] for row in rows) == sum(plan.matches)
    assert len(json.dumps(rows)) < 40_000
    routers = next(row for row in rows if row["pattern"] == "model.layers.*.mlp.gate.weight_quantizer")
    assert routers["count"] == routers["matches"] == BLOCKS - DENSE
    count = (BLOCKS - DENSE - 1) * EXPERTS - 1
    assert any(line.split()[0].endswith(".experts.*.gate_proj") and line.split()[1] == str(count) for line in lines)


def test_one_slot_is_explained(nvfp4: Any) -> None:
    _, plan, _, _ = nvfp4
    found = explain(plan, "model.layers.30.mlp.experts.255.up_proj")
    assert found.decided is not None and str(found.decided.entry.origin) == "scheme nvfp4"
    assert found.sharers == tuple(f"model.layers.30.mlp.experts.255.{leaf}_proj" for leaf in ("gate", "up"))
