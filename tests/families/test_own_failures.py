"""Which failures of a family's tests are those of the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from quarkcli.errors import ModelError
from tests.families import models

TOLD = ModelError(f"LlamaForCausalLM (family llama, transformers {transformers.__version__}) fails: planted")


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("planted")


def test_a_model_that_runs_excuses_nothing() -> None:
    assert models.own_failure("llama") is None
    assert models.excused("llama", TOLD) is None


def test_a_model_that_fails_by_itself_excuses_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fails)
    assert models.excused("llama", TOLD) == "RuntimeError: planted"
    assert models.excused("llama", ModelError("no tensor in the files fills the parameters")) is None
    assert models.excused(None, TOLD) is None
    assert models.excused("mistral", TOLD) is None
