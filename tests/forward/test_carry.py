"""Where hidden states wait, and what gives way when the device's memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quarkcli.errors import ResourceError
from quarkcli.forward import carry
from quarkcli.forward.carry import Carry
from quarkcli.forward.defaults import Offload
from quarkcli.forward.walk import SERVED, SOURCE
from tests.forward.test_walk import tight

GPU = torch.device("cuda")


class OnDevice(torch.Tensor):
    """A tensor that says it was moved to the host."""

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def hidden() -> torch.Tensor:
    return torch.ones(2, 3).as_subclass(OnDevice)


def is_hosted(states: torch.Tensor) -> bool:
    return not isinstance(states, OnDevice)


@pytest.mark.parametrize(
    ("offload", "free", "hosted"),
    [("auto", 10**9, False), ("auto", 10, True), ("none", 10, False), ("cpu", 10**9, True)],
)
def test_places(offload: Offload, free: int, hosted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "free", lambda device: free)
    parked = Carry(GPU, offload).park(SERVED, hidden(), 4)
    assert is_hosted(parked) == hosted
    assert torch.equal(parked.as_subclass(torch.Tensor), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_hold_the_values_and_leave_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    states = torch.randn(4, 7, 5).to(dtype)
    parked = Carry(torch.device("cpu"), "disk", tmp_path).park(SERVED, states.transpose(0, 1), 1)
    assert parked.data_ptr() != states.data_ptr()
    assert torch.equal(parked, states.transpose(0, 1)) and parked.dtype == dtype
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert list(tmp_path.iterdir()) == []


def test_streams_give_way_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "free", lambda device: 10**9)
    kept = Carry(GPU)
    streams = {SERVED: [hidden(), hidden()], SOURCE: [hidden()]}
    said = kept.give_way(streams)
    assert said is not None and "the quantized model move to RAM" in said
    assert all(map(is_hosted, streams[SERVED])) and not is_hosted(streams[SOURCE][0])
    assert is_hosted(kept.park(SERVED, hidden(), 1)) and not is_hosted(kept.park(SOURCE, hidden(), 1))
    said = kept.give_way(streams)
    assert said is not None and "the original model" in said and is_hosted(streams[SOURCE][0])
    assert kept.give_way(streams) is None
    assert "the quantized and the original model" in kept.tried()


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_only_auto_gives_way(offload: Offload) -> None:
    assert Carry(GPU, offload).give_way({SERVED: [hidden()]}) is None
    assert Carry(torch.device("cpu")).give_way({SERVED: [hidden()]}) is None


def test_the_ladder_of_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches shrink to a row, then the stream goes to the host, and only then it is an error that says so."""
    monkeypatch.setattr(carry, "free", lambda device: 10**9)
    walk, runner, said = tight(limit=4, batch=4)
    walk.carry = Carry(GPU)
    walk.start()
    runner.limit = 0
    with pytest.raises(ResourceError) as caught:
        walk.advance(0, None)  # type: ignore[arg-type]
    assert [text.split(": ")[1] for text in said] == [
        "4 -> 2 sequences at a time",
        "2 -> 1 sequences at a time",
        "hidden states of the quantized model move to RAM",
    ]
    assert "not enough GPU memory for one sequence of" in caught.value.what and "in RAM already" in caught.value.what


def test_what_gave_way_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "free", lambda device: 10**9)
    walk, runner, said = tight(limit=1, batch=1)
    walk.carry = Carry(GPU)
    walk.start()
    real, failed = runner._fit, []

    def once(states: torch.Tensor) -> torch.Tensor:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        return real(states)

    runner._fit = once  # type: ignore[method-assign]
    before = [states.clone() for states in walk.served]
    walk.advance(0, None)  # type: ignore[arg-type]
    assert len(said) == 1 and "RAM" in said[0]
    assert [torch.equal(now, then + 1) for now, then in zip(walk.served, before, strict=True)] == [True] * 8
