"""What a program has set for torch reaches no result, and is there again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import quarkcli
from quarkcli.api import checkpoints
from quarkcli.api.apart import apart
from quarkcli.evaluation import run as evaluating
from quarkcli.job import run as job

FRESH = {
    "dtype": torch.float32, "device": "cpu", "grad": True, "inference": False, "autocast": False,
    "gpu": "none", "cpu": "none",
}  # fmt: skip


def settings() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device().type,
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gpu": torch.backends.cuda.matmul.fp32_precision,
        "cpu": torch.backends.mkldnn.matmul.fp32_precision,
    }


@pytest.fixture
def disturbed() -> Iterator[dict[str, Any]]:
    """Settings of somebody's notebook, none of which is a fresh process's."""
    with ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        found = settings()
        assert all(found[name] != value for name, value in FRESH.items())
        yield found


CALLS: list[tuple[object, str, Callable[[Path], Any]]] = [
    (job, "run", lambda folder: quarkcli.quantize("demo", "fp8", output=folder / "out")),
    (evaluating, "evaluate", lambda folder: quarkcli.evaluate("demo")),
    (checkpoints, "compared", lambda folder: quarkcli.compare("demo", "demo")),
    (checkpoints.checks, "check", lambda folder: quarkcli.verify("demo")),
    (checkpoints.converting, "convert", lambda folder: quarkcli.convert(folder, "quark", folder / "out")),
]


@pytest.mark.parametrize(("module", "name", "call"), CALLS, ids=[name for _, name, _ in CALLS])
def test_work_sees_the_settings_of_a_fresh_process(
    module: object, name: str, call: Callable[[Path], Any], disturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    seen: list[dict[str, Any]] = []

    def stop(*given: Any, **options: Any) -> NoReturn:
        seen.append(settings())
        raise KeyError(name)

    monkeypatch.setattr(module, name, stop)
    monkeypatch.setattr(checkpoints.Source, "open", lambda *given, **options: None)
    monkeypatch.setattr(checkpoints, "_tell_unused_pickle", lambda *given: None)
    with pytest.raises(KeyError, match=name):
        call(tmp_path)
    exact = {"gpu": "ieee", "cpu": "ieee"}  # said, where a fresh process has nobody's word
    assert seen == [FRESH | exact]
    assert settings() == disturbed


def test_calls_of_several_threads_take_turns() -> None:
    """transformers sets the default dtype of the whole process while it builds a model."""
    entered = threading.Event()

    def enter() -> None:
        with apart():
            entered.set()

    other = threading.Thread(target=enter)
    with apart(), apart():  # a listener may call again
        other.start()
        assert not entered.wait(0.05)
    assert entered.wait(10)
    other.join()
