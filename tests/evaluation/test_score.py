"""How the tokens on which two models differ most are told."""

from __future__ import annotations

import torch

from quarkcli.evaluation.score import _Token, _told
from quarkcli.evaluation.windows import Windows


def test_a_token_without_text_is_shown_by_its_number():
    """Vocabularies may be padded, so that a model expects what its tokenizer does not know."""
    words = {0: "a", 1: "b", 2: "c"}
    rows = Windows(torch.tensor([[0, 1, 2]]), [], "here")
    found = _told(_Token(0.5, 0, 1, expected=281, got=2), rows, lambda ids: "".join(words.get(one, "") for one in ids))
    assert found == {
        "kl": 0.5, "window": 0, "position": 2,
        "context": "ab", "token": "c", "source_expects": "<token 281>", "expects": "c",
    }  # fmt: skip
