"""What a job does when the device's memory runs out, beyond smaller batches, and where hidden states may wait."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.algorithms.gptq import GPTQ
from quarkcli.errors import ResourceError
from quarkcli.events import Event, Message
from quarkcli.job import device
from quarkcli.job import run as job
from quarkcli.job.forecast import device_floor
from quarkcli.job.options import Options
from tests import runs


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("qwen3_moe", tmp_path_factory.mktemp("model") / "m", torch.bfloat16)


def quantized(model: Path, out: Path, heard: list[Event] | None = None, **options: Any) -> dict[str, bytes]:
    given: dict[str, Any] = {"scheme": "int4_wo_32", "algorithm": "gptq"} | options
    tell = heard.append if heard is not None else lambda event: None
    job.run(
        Options(model=str(model), output=out, device="cpu", calib_data="builtin", calib_samples=16, calib_seqlen=64,
                **given), tell,
    )  # fmt: skip
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}


def test_experts_are_solved_one_by_one(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of experts solved together, and the log says it once."""
    calm = quantized(mixture, tmp_path / "calm")
    real, sizes = GPTQ.solve_many, []

    def tight(self: GPTQ, problems: Any) -> Any:
        sizes.append(len(problems))
        if len(problems) > 1:
            for problem in problems:  # what a solver forgets on its way is still there the second time
                problem.moment.cross_val = problem.moment.gram_val = None
            raise torch.OutOfMemoryError("of the test")
        return real(self, problems)

    monkeypatch.setattr(GPTQ, "solve_many", tight)
    heard: list[Event] = []
    assert quantized(mixture, tmp_path / "out", heard) == calm
    said = [event.text for event in heard if isinstance(event, Message) and "one by one" in event.text]
    assert len(said) == 1 and said[0].startswith("not enough GPU memory: experts are quantized one by one, not")
    assert len([size for size in sizes if size > 1]) == 1


def test_one_problem_that_does_not_fit_is_an_error(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tight(self: GPTQ, problems: Any) -> Any:
        raise torch.OutOfMemoryError("of the test")

    monkeypatch.setattr(GPTQ, "solve_many", tight)
    with pytest.raises(torch.OutOfMemoryError):  # the command line says which flags help, exit 6
        quantized(mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["gptq", "qronos"])
def test_hidden_states_in_files(mixture: Path, tmp_path: Path, algorithm: str) -> None:
    """The same bytes, of one stream and of two, and no file is left."""
    calm = quantized(mixture, tmp_path / "calm", algorithm=algorithm)
    assert quantized(mixture, tmp_path / "out", algorithm=algorithm, offload="disk") == calm
    assert [file.name for file in tmp_path.rglob("hidden-*")] == []


# ---- --max-gpu-mem, with a device of the test's own


class Device:
    """A device of 1 GB; the shares of its memory that were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shares: list[float] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *given: (10**9, 10**9))
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.shares.append)


def forecast(model: Path) -> Any:
    return job.prepare(Options(str(model), scheme="mxfp4")).forecast


def test_a_limit_holds_inside_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = Device(monkeypatch).shares
    with pytest.raises(KeyError), device.limit("cuda", 25 * 10**7):
        assert shares == [0.25]
        raise KeyError
    assert shares == [0.25, 1.0]
    with device.limit("cuda", None), device.limit("cpu", 1), device.limit("cuda", 10**10):
        assert shares == [0.25, 1.0, 1.0]


def test_a_block_that_no_limit_holds(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    size = copy.copy(forecast(mixture))
    device.check("cuda", size, None)
    device.check("cuda", size, device_floor(size))
    device.check("cpu", size, 1)
    with pytest.raises(ResourceError) as caught:
        device.check("cuda", size, device_floor(size) - 1)
    assert caught.value.where == "--max-gpu-mem" and f"{device_floor(size):,}" in caught.value.what
