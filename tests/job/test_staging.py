"""Tensors go through small buffers piece by piece; here without a device, so that only the pieces are at stake."""

from __future__ import annotations

import pytest
import torch

from quarkcli.job.staging import Staging

TENSORS = {
    "whole": torch.arange(64, dtype=torch.int32).reshape(8, 8),
    "cut": torch.randn(37, 11),
    "sixteen": torch.randn(5, 9).bfloat16(),
    "eight": torch.randn(3, 7).to(torch.float8_e4m3fn),
    "one": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "turned": torch.randn(6, 10).T,
    "strided": torch.randn(12, 12)[::3, ::2],
}


@pytest.mark.parametrize("size", [16, 24, 2**20])
def test_values_arrive(size: int) -> None:
    staging = Staging("cpu", size)
    up = staging.up(TENSORS)
    assert list(up) == list(TENSORS)
    for name, tensor in TENSORS.items():
        for found in (up[name], staging.down(tensor)):
            assert found.shape == tensor.shape and found.dtype == tensor.dtype, name
            assert torch.equal(found.float(), tensor.float()), name
            assert found.is_contiguous()
    kept = {name: tensor.clone() for name, tensor in up.items()}
    staging.up({"later": torch.full((99,), 7.0)})  # buffers are used again, and nothing that arrived changes
    assert all(torch.equal(up[name].float(), kept[name].float()) for name in kept)


def test_buffers_are_made_once_and_when_they_are_needed() -> None:
    staging = Staging("cpu", 16)
    assert staging._buffers == []
    staging.up(TENSORS)
    first = staging._buffers
    staging.down(TENSORS["cut"])
    assert staging._buffers is first and len(first) == 2
