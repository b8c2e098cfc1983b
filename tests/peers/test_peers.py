"""Checkpoints that other tools wrote: verified, decoded as those tools decode them, and quantized again.

Every folder of `tests/data/peers` with a `peer.json` is one; `make.py` makes them. What `known` says there of one
is an exception, with the reason: `verify` and servers' names, a part of a finding that is right; `job`, its options.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli import servers
from quarkcli.cli import main
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError
from quarkcli.job import convert
from tests import runs
from tests.peers import common

DATA = Path(__file__).parents[1] / "data" / "peers"
PEERS = sorted(path.parent.name for path in DATA.glob(f"*/{common.FACTS}"))
JOBS: dict[str, dict[str, Any]] = {
    "file to file": {"scheme": "nvfp4_weight_only"},
    "nvfp4": {"scheme": "nvfp4"},
    "gptq": {"scheme": "int4_wo_128", "algorithm": "gptq"},
}
ROWS = {"calib_samples": 4, "calib_seqlen": 64}


def facts(peer: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / peer / common.FACTS).read_text())
    return {"known": {}, **found}


def published(checkpoint: Checkpoint, name: str) -> str:
    """The name that a module has in published files of its family."""
    tensor = f"{name}.weight"
    return checkpoint.renamed.get(tensor, tensor).removesuffix(".weight")


def config(peer: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / peer / "config.json").read_text())
    return found


def first_of_each() -> set[str]:
    """The first in every form, by the word that loaders know it by."""
    return set({config(peer)["quantization_config"]["quant_method"]: peer for peer in reversed(PEERS)}.values())


FIRST = first_of_each()
OTHERS = {peer for peer in PEERS if config(peer)["model_type"] != "llama"}
OFTEN = {"file to file": set(PEERS), "nvfp4": FIRST | OTHERS, "gptq": FIRST}


def jobs() -> Iterable[Any]:
    """Every job on every one. In the normal run those that run the model are for the first in every form."""
    for peer in PEERS:
        for job in JOBS:
            marks = () if peer in OFTEN[job] else pytest.mark.slow
            yield pytest.param(peer, job, id=f"{peer}-{job}", marks=marks)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a text, for all of them."""
    folder = tmp_path_factory.mktemp("peers")
    common.tokenizer().save_pretrained(folder / "tokenizer")
    runs.text_file(folder / "text.txt")
    return folder


@pytest.fixture
def quantize(beside: Path, tmp_path: Path) -> Any:
    """Runs a job on a copy with a tokenizer."""

    def run(peer: str, job: str, name: str = "out", **options: Any) -> runs.Made:
        source = tmp_path / peer
        if not source.exists():
            shutil.copytree(DATA / peer, source)
            shutil.copytree(beside / "tokenizer", source, dirs_exist_ok=True)
        known = facts(peer)["known"].get("job", {})
        text = str(beside / "text.txt")
        return runs.run(source, tmp_path / name, calib_data=text, **{**JOBS[job], **ROWS, **known, **options})

    return run


def test_there_are_enough() -> None:
    assert len(PEERS) >= 25


@pytest.mark.parametrize("peer", PEERS)
def test_values_are_those_of_the_makers_decoder(peer: str) -> None:
    """Bit for bit in the dtype that it decodes to, and of no other weight."""
    told = facts(peer)
    checkpoint = Checkpoint(Source.open(str(DATA / peer)))
    dtype = getattr(torch, told["dtype"])
    found = {name: common.digest(checkpoint.weight(name).to(dtype)) for name in checkpoint.view.targets}
    assert found == {published(checkpoint, name): digest for name, digest in told["decoded"].items()}


@pytest.mark.parametrize("peer", PEERS)
def test_verify_raises_no_false_alarm(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = facts(peer)["known"].get("verify")
    code = main.main(["verify", str(DATA / peer)])
    said = capsys.readouterr()
    assert code == (8 if known else 0), said.err
    if known:
        assert known["finding"] in said.err and known["why"]


@pytest.mark.parametrize(
    ("peer", "server"), [(peer, name) for peer in PEERS for name in servers.names() if name in facts(peer)["known"]]
)
def test_what_a_server_does_not_load(peer: str, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = facts(peer)["known"][server]
    assert main.main(["verify", str(DATA / peer), "--target", server]) == 8
    assert known["finding"] in capsys.readouterr().err and known["why"]


@pytest.mark.parametrize(
    "peer",
    ["llmcompressor-w4a8", "gptqmodel-dynamic", "gptqmodel-awq", "llmcompressor-mixtral-fp8-dynamic"],
)
def test_what_vllm_loads(peer: str) -> None:
    """Integers in bytes with quantized inputs; other bits; zero points that the config denies; names of experts."""
    assert main.main(["verify", str(DATA / peer), "--target", "vllm"]) == 0


@pytest.mark.parametrize(("peer", "job"), jobs())
def test_it_is_a_source(quantize: Any, peer: str, job: str) -> None:
    made = quantize(peer, job)
    told = facts(peer)
    checkpoint = Checkpoint(Source.open(str(made.source)))
    assert set(made.prepared.origin.weights) == {published(checkpoint, name) for name in told["decoded"]}
    assert len(list(made.prepared.plan.quantized())) > 0
    assert main.main(["verify", str(made.folder), "--source", str(made.source)]) == 0


@pytest.mark.parametrize("peer", sorted(FIRST))
def test_a_killed_run_goes_on(quantize: Any, peer: str) -> None:
    runs.killed(2, lambda: quantize(peer, "gptq", resume="auto"))
    gone_on = quantize(peer, "gptq", resume="require")
    assert runs.same_files(gone_on.folder, quantize(peer, "gptq", "calm").folder)


def test_biases_of_experts_that_were_taken_apart() -> None:
    """They are one tensor in published files, gates and ups in turn."""
    folder = DATA / "llmcompressor-gpt-oss-w4a16"
    prefix = "model.layers.0.mlp.experts"
    tensors = runs.read_all(folder)
    both = [f"{prefix}.gate_up_proj_bias", f"{prefix}.down_proj_bias"]
    checkpoint = Checkpoint(Source.open(str(folder)))
    assert [checkpoint.headers[name].shape for name in both] == [(2, 256), (2, 128)]
    assert {
        checkpoint.renamed[f"{prefix}.{expert}.{leaf}_proj.bias"] for expert in (0, 1) for leaf in ("gate", "up")
    } == {both[0]}
    read = checkpoint.read_many(both)
    for expert in (0, 1):
        gate, up, down = (tensors[f"{prefix}.{expert}.{leaf}_proj.bias"] for leaf in ("gate", "up", "down"))
        assert torch.equal(read[both[0]][expert, ::2], gate) and torch.equal(read[both[0]][expert, 1::2], up)
        assert torch.equal(read[both[1]][expert], down)


def test_a_cache_with_a_scale_for_every_head_is_neither_run_nor_converted() -> None:
    """A job drops it, as every cache."""
    source = Source.open(str(DATA / "llmcompressor-fp8-kv-head"))
    checkpoint = Checkpoint(source)
    with pytest.raises(ModelError, match="its KV cache has a scale for every head, and quark cannot run that"):
        list(checkpoint.attention_quantizers(["model.layers.0.self_attn.k_proj.weight"]))
    with pytest.raises(ModelError, match="format quark has one for all"):
        convert.prepare(source, "quark")
