"""Losses of groups against the formula, written with the whole model and autograd; and against what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quarkcli.events import silent
from quarkcli.job import preflight
from quarkcli.job import rows as job_rows
from quarkcli.numerics.quantize import dequantize, fake_quantize, quantize, static_scale
from quarkcli.recipe.auto_quantize import Rule
from quarkcli.search.candidates import Candidate, Group, Space, groups
from quarkcli.search.losses import measure
from tests import runs

ROWS, LENGTH = 12, 48  # one batch, so that labels are drawn in one go


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "text.txt")


def space_of(source: Path, text: Path, schemes: tuple[str, ...], **options: Any) -> Space:
    data = runs.data(text, ROWS, LENGTH)
    found = tuple(Candidate(name, runs.prepare(source, scheme=name, **data, **options)) for name in schemes)
    return Space(found, [Rule(("*",), schemes, keep=False)])


def measured(space: Space, folder: Path) -> tuple[list[Group], dict[tuple[str, str], float], Tensor]:
    found, unjudged = groups(space, "auto")
    assert not unjudged
    settings = preflight.calibration(space.base.options, space.base.recipe, space.base.source, {"x": {"x"}})
    base = replace(space.base, calibration=settings)
    data = job_rows.token_rows(base, silent)
    assert data is not None
    return found, measure(space, base, found, data, "cpu", folder, silent), data.tokens


@contextmanager
def hooked(model: Any, pre: dict[str, Any]) -> Iterator[None]:
    """Functions on the inputs of modules while inside."""
    with ExitStack() as stack:
        for name, function in pre.items():
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda module, args, change=function: (change(args[0]), *args[1:]))
            stack.callback(hook.remove)
        yield


def block_outputs(model: Any, tokens: Tensor, kept: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what every block returns; `kept`: with gradients."""
    outputs: list[Tensor] = []

    def see(module: Any, args: Any, out: Any) -> None:
        out = out if isinstance(out, Tensor) else out[0]
        if kept:
            out.retain_grad()
        outputs.append(out)

    hooks = [layer.register_forward_hook(see) for layer in model.model.layers]
    logits = model(input_ids=tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, outputs


def gradients(model: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the blocks, and the gradients there of the log-probability of tokens drawn with seed 0."""
    logits, outputs = block_outputs(model, tokens, kept=True)
    scores = torch.log_softmax(logits.float(), -1)
    uniform = torch.rand(scores.shape[:-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rising = scores.detach().double().exp().cumsum(-1)
    labels = (rising < (uniform * rising[..., -1])[..., None]).sum(-1)
    scores.gather(-1, labels[..., None])[ROWS // 2 :].sum().backward()
    return [out.detach() for out in outputs], [out.grad for out in outputs]


def by_formula(space: Space, name: str, group: Group, model: Any, tokens: Tensor, at: Any) -> float:
    """1/2 mean over tokens of (g . dh)^2 with one group rounded to nearest, for linears.

    Ranges are of the first half of the rows, the mean is over the second.
    """
    outputs, grads = at
    plan = space.named(name).prepared.plan  # type: ignore[union-attr]
    block = next(part.block for part in plan.parts if part.index == group.part)
    changes, before = {}, {}
    for target in (plan.targets[each.name] for each in group.targets):
        weight = model.get_submodule(target.name).weight
        before[target.name] = weight.data
        amax = max(model.get_submodule(t.name).weight.abs().max() for t in group.targets)
        own = quantize(weight.data.bfloat16(), target.weight, amax=amax if target.weight.has_tensor_scale else None)
        weight.data = dequantize(own, target.weight).bfloat16().float()
        if target.input is not None:
            seen: list[Tensor] = []
            with hooked(model, {target.name: lambda x, seen=seen: (seen.append(x.abs().max()), x)[1]}):
                weight.data, mine = before[target.name], weight.data
                block_outputs(model, tokens[: ROWS // 2], kept=False)
                weight.data = mine
            scale = static_scale(seen[0], target.input) if target.input.is_static else None
            changes[target.name] = lambda x, spec=target.input, scale=scale: fake_quantize(x, spec, scale)
    with hooked(model, changes):
        moved = block_outputs(model, tokens, kept=False)[1][block] - outputs[block]
    for module, weight in before.items():
        model.get_submodule(module).weight.data = weight
    return float((moved * grads[block]).sum(-1)[ROWS // 2 :].double().square().mean() / 2)


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8", "int4_wo_128"])
def test_the_formula(scheme: str, text: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "source")
    space = space_of(source, text, (scheme,))
    found, losses, tokens = measured(space, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    at = gradients(model, tokens)
    with torch.no_grad():
        for group in found:
            expected = by_formula(space, scheme, group, model, tokens, at)
            assert losses[group.name, scheme] == pytest.approx(expected, rel=0.06), group.name  # states are bfloat16
    assert len(found) == 2 * 4
