"""Attention operands, outputs, biases and embeddings from plan to evaluation, against transformers with plain hooks.

Weights are cast to the dtype that they have already, so that only the slot in question differs from the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
import yaml
from torch import Tensor
from transformers.models.llama import modeling_llama

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import DataError, Stopped
from quarkcli.evaluation.run import evaluate
from quarkcli.job import run as job
from quarkcli.model.runner import Runner
from quarkcli.model.tokenizer import load_tokenizer
from tests import plain, runs, tiny

BF16: dict[str, Any] = {"element": "bf16"}
FP8: dict[str, Any] = {"element": "fp8_e4m3", "granularity": "tensor", "scale": {"dtype": "f32"}}
FP8_TOKEN: dict[str, Any] = {
    "element": "fp8_e4m3",
    "granularity": "token",
    "scale": {"dtype": "f32", "when": "dynamic"},
}
INT8: dict[str, Any] = {"element": "int8", "scale": {"dtype": "f32", "rule": "absmax"}}
Rows = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def any_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    plain.use(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 40_000)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with biases on its attention, which are not zero."""
    folder = runs.build("llama", tmp_path_factory.mktemp("biased") / "m", attention_bias=True)
    tensors = runs.read_all(folder)
    random = torch.Generator().manual_seed(3)
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensors[name].shape, generator=random).bfloat16()
    tiny.Checkpoint(folder, tensors).rewrite(tensors)
    return folder


def recipe(folder: Path, rows: Rows, **more: Any) -> Path:
    """A recipe with an entry per pattern."""
    listed = [{"quantizer_path": pattern, "cfg": cfg} for pattern, cfg in rows.items()]
    path = folder / "own.yaml"
    document = {"schema": "quark/recipe/1", "exclusions": "none", "quantize": {"quant_cfg": listed, **more}}
    path.write_text(yaml.safe_dump(document))
    return path


def made(source: Path | str, folder: Path, rows: Rows, text: Path | None, **options: Any) -> runs.Made:
    """Slots of single projections, which servers would fuse with others: for no server."""
    data = runs.data(text, 8) if text is not None else {}
    return runs.run(source, folder / "out", recipe=str(recipe(folder, rows)), target="none", **data, **options)


def fp8(x: Tensor, scale: Tensor | None = None, per_token: bool = False) -> Tensor:
    """e4m3 by torch's own cast; without a scale, 448 stands for the largest value of each token."""
    if scale is None:
        scale = (x.abs().amax(-1, keepdim=True) if per_token else x.abs().amax()).float() / 448
    return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def perplexity(model: Any, text: Path, window: int, tokens: int) -> float:
    """As `quark eval` defines it: windows without overlap, all positions but the first."""
    ids = torch.tensor(load_tokenizer(Path(model.name_or_path)).encode(text.read_text())[:tokens]).view(-1, window)
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), -1)
    return math.exp(-float(logs.gather(-1, ids[:, 1:, None]).double().mean()))


def measured(folder: Path, text: Path) -> float:
    result = evaluate(
        str(folder), text=str(text), window=64, max_tokens=512, dtype="float32", device="cpu", tell=lambda event: None
    )
    return float(result["perplexity"])


def model(source: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval()


def attend(change: Callable[[str, Any, Tensor], Tensor]) -> Callable[..., Any]:
    """Attention written out; `change(kind, module, x)` for q, k, v and p."""

    def forward(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        q, k, v = (change(kind, module, x) for kind, x in (("q", q), ("k", k), ("v", v)))
        k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
        scores = q @ k.mT * scaling
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        p = change("p", module, scores.masked_fill(later, -torch.inf).float().softmax(-1))
        return (p.to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    return forward


class TestAttention:
    ROWS: ClassVar[Rows] = {f"*.{kind}_bmm_quantizer": FP8 for kind in "qkvp"}

    @pytest.mark.parametrize("kinds", ["q", "k", "v", "p", "qkvp"])
    def test_evaluates_as_attention_written_out(
        self, kinds: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = {name: cfg for name, cfg in self.ROWS.items() if name[2] in kinds}
        out = made("demo", tmp_path, rows, text)
        scales = {name: scale for name, scale in runs.read_all(out.folder).items() if name.endswith("_scale")}
        assert len(scales) == 4 * len(kinds)

        def change(kind: str, module: Any, x: Tensor) -> Tensor:
            scale = scales.get(f"model.layers.{module.layer_idx}.self_attn.{kind}_scale")
            return fp8(x, scale) if scale is not None else x

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend(change))
        expected = perplexity(model(out.source, attn_implementation="eager"), text, 64, 512)
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend(lambda kind, module, x: x))
        untouched = perplexity(model(out.source, attn_implementation="eager"), text, 64, 512)
        assert measured(out.folder, text) == pytest.approx(expected, rel=2e-6)
        assert expected != pytest.approx(untouched, rel=1e-4)

    def test_scales_are_those_of_what_is_multiplied(
        self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the first block, which reads the same activations before and after quantization."""
        seen: dict[str, float] = {}

        def watch(kind: str, module: Any, x: Tensor) -> Tensor:
            if module.layer_idx == 0:
                seen[kind] = max(seen.get(kind, 0.0), float(x.abs().max()))
            return x

        out = made("demo", tmp_path, self.ROWS, text)
        rows = load_rows(out, text)
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend(watch))
        with torch.no_grad():
            model(out.source, torch.bfloat16, attn_implementation="eager")(input_ids=rows, use_cache=False)
        written = runs.read_all(out.folder)
        assert seen["p"] == 1.0  # the first token has nothing but itself to look at
        for kind in "qkvp":
            scale = float(written[f"model.layers.0.self_attn.{kind}_scale"])
            assert scale == pytest.approx(seen[kind] / 448, rel=1e-6)

    def test_a_cache_of_nvfp4_has_a_global_scale_per_layer(
        self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, float] = {}

        def watch(kind: str, module: Any, x: Tensor) -> Tensor:
            if module.layer_idx == 0:
                seen[kind] = max(seen.get(kind, 0.0), float(x.abs().max()))
            return x

        data = runs.data(text, 8)
        out = runs.run("demo", tmp_path / "out", scheme="mxfp4", kv_cache="nvfp4", **data)
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend(watch))
        rows = load_rows(out, text)
        with torch.no_grad():
            model(out.source, torch.bfloat16, attn_implementation="eager")(input_ids=rows, use_cache=False)
        written = runs.read_all(out.folder)
        assert "model.layers.0.self_attn.q_scale" not in written
        for kind in "kv":
            scale = float(written[f"model.layers.0.self_attn.{kind}_scale"])
            assert scale == pytest.approx(seen[kind] / (6 * 448), rel=1e-6)
        assert measured(out.folder, text) != measured(runs.run("demo", tmp_path / "w", scheme="mxfp4").folder, text)

    def test_dynamic_operands_need_no_data(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = made("demo", tmp_path, {"*.p_bmm_quantizer": FP8_TOKEN}, None)
        assert out.report["calibration"] is None
        change = attend(lambda kind, module, x: fp8(x, per_token=True) if kind == "p" else x)
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", change)
        expected = perplexity(model(out.source, attn_implementation="eager"), text, 64, 512)
        assert measured(out.folder, text) == pytest.approx(expected, rel=2e-6)

    def test_what_nothing_reaches_is_named(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Attention that computes its softmax out of sight, as a fused kernel does."""

        def fused(prepared: job.Prepared, data: Any, device: str, *more: Any) -> Runner:
            return Runner(prepared.source.folder, prepared.source.headers, device=device)

        monkeypatch.setattr(job, "runner_of", fused)
        with pytest.raises(DataError) as caught:
            made("demo", tmp_path, {"*.p_bmm_quantizer": FP8}, text)
        assert caught.value.where == "model.layers.0.self_attn.p"
        assert not (tmp_path / "out").exists()


def load_rows(out: runs.Made, text: Path) -> Tensor:
    """The rows that a run was calibrated with."""
    from quarkcli.forward import data

    settings = out.prepared.calibration
    assert settings is not None
    tokenizer = load_tokenizer(out.source)
    return data.load(
        str(text), tokenizer, samples=settings.samples, seqlen=settings.seqlen, seed=settings.seed, column=None,
        asked=True, allow_short=False, offline=True,
    ).tokens  # fmt: skip


class TestOutputs:
    @pytest.mark.parametrize("cfg", [FP8, FP8_TOKEN], ids=["static", "dynamic"])
    def test_evaluate_as_hooks_on_the_source(self, cfg: dict[str, Any], text: Path, tmp_path: Path) -> None:
        leaves = ("v_proj", "down_proj", "lm_head")
        rows = {f"*{leaf}.weight_quantizer": BF16 for leaf in leaves} | {
            f"*{leaf}.output_quantizer": cfg for leaf in leaves
        }
        out = made("demo", tmp_path, rows, text if cfg is FP8 else None)
        written = runs.read_all(out.folder)
        hand = model(out.source)
        untouched = perplexity(hand, text, 64, 512)
        for name, part in hand.named_modules():
            if name.endswith(leaves):
                scale = written.get(f"{name}.output_scale")
                assert (scale is not None) == (cfg is FP8)
                part.register_forward_hook(lambda module, args, y, scale=scale: fp8(y, scale, per_token=True))
        expected = perplexity(hand, text, 64, 512)
        assert expected != pytest.approx(untouched, rel=1e-4)
        assert measured(out.folder, text) == pytest.approx(expected, rel=2e-6)

    def test_scales_are_those_of_what_modules_return(self, text: Path, tmp_path: Path) -> None:
        rows = {"*up_proj.weight_quantizer": BF16, "*up_proj.output_quantizer": FP8}
        out = made("demo", tmp_path, rows, text)
        hand, seen = model(out.source, torch.bfloat16), []
        hand.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: seen.append(y.abs().max()))
        with torch.no_grad():
            hand(input_ids=load_rows(out, text), use_cache=False)
        scale = float(runs.read_all(out.folder)["model.layers.0.mlp.up_proj.output_scale"])
        assert scale == pytest.approx(float(max(seen)) / 448, rel=1e-6)


class TestBiases:
    ROWS: ClassVar[Rows] = {"*[qk]_proj.weight_quantizer": BF16, "*q_proj.bias_quantizer": INT8}
    Q = "model.layers.0.self_attn.q_proj.bias"

    def test_are_coded_and_read_back(self, biased: Path, tmp_path: Path) -> None:
        out = made(biased, tmp_path, self.ROWS, None)
        source, written = runs.read_all(biased), runs.read_all(out.folder)
        assert self.Q not in written
        bias = source[self.Q].double()
        scale = float(bias.abs().max()) / 127
        assert float(written[f"{self.Q}.scale"]) == pytest.approx(scale, rel=1e-6)
        codes = (bias / float(written[f"{self.Q}.scale"])).round()
        assert torch.equal(written[f"{self.Q}.codes"].reshape(-1).double(), codes)
        checkpoint = Checkpoint(Source.open(str(out.folder)))
        assert checkpoint.headers[self.Q].shape == tuple(bias.shape)
        back = checkpoint.read_many([self.Q], torch.float32)[self.Q]
        torch.testing.assert_close(back.double(), codes * float(written[f"{self.Q}.scale"]), rtol=1e-6, atol=0)
        kept = self.Q.replace("q_proj", "k_proj")
        assert runs.same_bytes(written[kept], source[kept])

    def test_the_forecast_counts_them(self, biased: Path, tmp_path: Path) -> None:
        out = made(biased, tmp_path, self.ROWS, None)
        size = sum(file.stat().st_size for file in out.folder.glob("*.safetensors"))
        assert out.report["size"]["output_bytes"] == size == out.prepared.forecast.output_bytes

    def test_the_walk_goes_on_with_decoded_ones(
        self, biased: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[Tensor] = []
        original = Runner.load_block

        def spy(self: Runner, i: int, tensors: Mapping[str, Tensor]) -> None:
            original(self, i, tensors)
            if i == 0:
                loaded.append(tensors[TestBiases.Q].clone())

        monkeypatch.setattr(Runner, "load_block", spy)
        out = made(biased, tmp_path, self.ROWS | {"*k_proj.input_quantizer": FP8}, text)
        before, after = loaded
        assert torch.equal(before, runs.read_all(biased)[self.Q])
        back = Checkpoint(Source.open(str(out.folder))).read_many([self.Q])[self.Q]
        assert torch.equal(after, back)
        assert not torch.equal(after, before)

    def test_a_broken_one_is_named(self, biased: Path, tmp_path: Path) -> None:
        tensors = runs.read_all(biased)
        tensors[self.Q][5] = float("nan")
        folder = runs.build("llama", tmp_path / "m", attention_bias=True)
        tiny.Checkpoint(folder, tensors).rewrite(tensors)
        with pytest.raises(DataError) as caught:
            made(folder, tmp_path, self.ROWS, None)
        assert str(caught.value.where).startswith(self.Q)


class TestEmbedding:
    ROWS: ClassVar[Rows] = {"model.embed_tokens.weight_quantizer": {"element": "int4", "granularity": {"group": 32}}}

    def expected(self, out: runs.Made) -> Tensor:
        """Codes times scales, by hand."""
        written = runs.read_all(out.folder)
        codes, scale = (written[f"model.embed_tokens.weight.{key}"].double() for key in ("codes", "scale"))
        return codes * scale.repeat_interleave(32, dim=1)

    @pytest.mark.parametrize("family", ["llama", "llama_tied"])
    def test_is_what_a_server_sees_in_walk_and_evaluation(
        self, family: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = runs.build(family, tmp_path / "m", hidden_size=128)
        seen: list[Tensor] = []
        original = Runner.load_outside

        def spy(self: Runner, tensors: Mapping[str, Tensor]) -> None:
            seen.append(tensors["model.embed_tokens.weight"].float())
            original(self, tensors)

        monkeypatch.setattr(Runner, "load_outside", spy)
        out = made(
            source, tmp_path, self.ROWS | {"*v_proj.weight_quantizer": BF16, "*v_proj.input_quantizer": FP8}, text
        )
        monkeypatch.undo()
        plain.use(monkeypatch)
        decoded = self.expected(out)
        assert seen
        assert all(torch.allclose(one.double(), decoded, rtol=1e-6, atol=0) for one in seen)
        tied = family == "llama_tied"
        assert any("lm_head with it" in text for text in out.report["warnings"]) == tied
        hand = model(source)
        with torch.no_grad():
            hand.model.embed_tokens.weight.copy_(decoded)
        for name, scale in runs.read_all(out.folder).items():
            if name.endswith("input_scale"):
                part = hand.get_submodule(name.removesuffix(".input_scale"))
                part.register_forward_pre_hook(lambda module, args, scale=scale: (fp8(args[0], scale),))
        assert measured(out.folder, text) == pytest.approx(perplexity(hand, text, 64, 512), rel=2e-6)

    def test_scales_are_measured_behind_it(self, text: Path, tmp_path: Path) -> None:
        rows = self.ROWS | {"*v_proj.weight_quantizer": BF16, "*v_proj.input_quantizer": FP8}
        out = made("demo", tmp_path, rows, text)
        hand, seen = model(out.source, torch.bfloat16), []
        with torch.no_grad():
            hand.model.embed_tokens.weight.copy_(self.expected(out))
            first = hand.model.layers[0].self_attn.v_proj
            first.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
            hand(input_ids=load_rows(out, text), use_cache=False)
        scale = float(runs.read_all(out.folder)["model.layers.0.self_attn.v_proj.input_scale"])
        assert scale == pytest.approx(float(max(seen)) / 448, rel=1e-6)


def test_an_embedding_has_nothing_to_solve(text: Path, tmp_path: Path) -> None:
    rows = {"*.weight_quantizer": {"element": "int4", "granularity": {"group": 32}}}
    source = recipe(tmp_path, rows)
    solved = runs.run("demo", tmp_path / "gptq", recipe=str(source), algorithm="gptq", **runs.data(text, 8))
    rounded = runs.run("demo", tmp_path / "rtn", recipe=str(source))
    one, other = (runs.read_all(some.folder) for some in (solved, rounded))
    same = {name for name in one if runs.same_bytes(one[name], other[name])}
    assert "model.embed_tokens.weight.codes" in same
    assert "lm_head.weight.codes" not in same
    assert "model.layers.0.mlp.up_proj.weight.codes" not in same


def test_a_run_stopped_after_every_part_has_the_same_bytes(biased: Path, text: Path, tmp_path: Path) -> None:
    """All slots at once; each part is worked on by a process that only knows the journal."""
    rows = {
        "*.weight_quantizer": INT8, "*.input_quantizer": FP8, "*.output_quantizer": FP8, "*.bias_quantizer": INT8,
        "*_bmm_quantizer": FP8,
    }  # fmt: skip
    options: dict[str, Any] = {"recipe": str(recipe(tmp_path, rows)), **runs.data(text, 8)}
    whole = runs.run(biased, tmp_path / "whole", **options)
    stops = 0
    while True:
        try:
            cut = runs.run(biased, tmp_path / "cut", resume="auto", time_budget=1e-9, **options)
            break
        except Stopped:
            stops += 1
    assert stops == len(whole.prepared.plan.parts) - 1
    assert runs.same_files(whole.folder, cut.folder)
    assert {name.rpartition(".")[2] for name in runs.read_all(whole.folder)} >= {
        "q_scale", "k_scale", "v_scale", "p_scale", "input_scale", "output_scale",
    }  # fmt: skip
    again = runs.run(biased, tmp_path / "again", recipe=str(whole.folder / "quark" / "recipe.yaml"))
    assert runs.same_files(whole.folder, again.folder)
