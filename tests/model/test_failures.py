"""What fails in a model's own code is an error of the model that names the library; what fails in ours is not."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from quarkcli.cli.main import main
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import ExitCode, ModelError
from quarkcli.events import silent
from quarkcli.forward import walk
from quarkcli.model import failures, library, skeleton, tokenizer
from quarkcli.model.handlers import Handlers
from quarkcli.model.record import Recorder
from tests import releases, runs, tiny
from tests.model.drive import record, runner_of, through
from tests.model.test_skeleton import CUSTOM_CODE, strange

FUNCTIONS = [
    node
    for node in ast.walk(ast.parse(CUSTOM_CODE))
    if isinstance(node, ast.FunctionDef) and node.name != "get_input_embeddings"  # nobody asks for them
]
ROOM = Path(library.__file__).parent
LLAMA = "transformers.models.llama.modeling_llama"


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("planted\nfailure")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda node: f"{node.name}-{node.lineno}")
def test_every_function_of_a_models_own_code_may_fail(
    function: ast.FunctionDef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    checkpoint = strange(source)
    lines = CUSTOM_CODE.splitlines()
    lines.insert(function.body[0].lineno - 1, 8 * " " + "raise RuntimeError('planted failure')")
    (source / "modeling_strange.py").write_text("\n".join(lines))
    with pytest.raises(ModelError, match=rf"transformers {transformers.__version__}.*: planted failure") as caught:
        through(runner_of(checkpoint, trust_remote_code=True), checkpoint, tiny.tokens())
    assert caught.value.code == ExitCode.MODEL
    assert str(source) in caught.value.where
    assert "no calibration data" in caught.value.hint
    if function.name == "forward":
        assert "model type strange, the model's own code in modeling_strange.py" in caught.value.what


def test_own_code_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    checkpoint = strange(source)
    (source / "modeling_strange.py").write_text(CUSTOM_CODE + "\nraise OSError('no such library')\n")
    with pytest.raises(ModelError, match="no such library"):
        runner_of(checkpoint, trust_remote_code=True)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("LlamaForCausalLM.__init__", "cannot be built from its config"),
        ("LlamaForCausalLM.get_decoder", "cannot be built from its config"),
        ("LlamaPreTrainedModel._init_weights", "fails when its buffers are filled"),
        ("LlamaModel.forward", "fails in its forward pass"),
        ("LlamaRotaryEmbedding.forward", "fails in its forward pass"),
        ("LlamaDecoderLayer.forward", "fails in decoder block 0"),
        ("LlamaMLP.forward", "fails in decoder block 0"),
    ],
)
def test_transformers_may_fail(place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    monkeypatch.setattr(f"{LLAMA}.{place}", fails)
    with pytest.raises(ModelError) as caught:
        through(runner_of(checkpoint), checkpoint, tiny.tokens())
    code = f"LlamaForCausalLM (family llama, transformers {transformers.__version__})"
    assert caught.value.what == f"{code} {said}: RuntimeError: planted failure"


def test_a_class_that_reads_what_is_not_loaded_is_no_defect_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says only that there are no values (Granite Docling)."""
    checkpoint = tiny.build("llama", tmp_path)
    monkeypatch.setattr(f"{LLAMA}.LlamaModel.forward", lambda *_, **__: torch.empty(1, device="meta").item())
    with pytest.raises(ModelError) as caught:
        through(runner_of(checkpoint), checkpoint, tiny.tokens())
    assert caught.value.what.endswith("; quark loads one part of the model at a time, and this class reads another")


def test_a_head_that_is_called_decoder_is_not_the_text_model() -> None:
    """ModernBERT: its class gives its head for the decoder, in which no blocks were found."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**sizes))
    assert skeleton.find_blocks(model) == "model.layers"
    assert dict(skeleton.text_modules(model)).keys() >= {"", "model"}


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_user_reads_whose_failure_it_is(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"{LLAMA}.LlamaMLP.forward", fails)
    arguments = {
        "quantize": ["--model", "demo", "--scheme", "fp8", "--calib-data", "builtin", "-o", str(tmp_path / "out")],
        "eval": [str(EMBEDDED)],
    }
    assert main([command, *arguments[command], "--device", "cpu"]) == ExitCode.MODEL
    said = " ".join(capsys.readouterr().err.split())
    assert f"transformers {transformers.__version__}" in said and "planted failure" in said
    assert "defect of quark" not in said
    assert not (tmp_path / "out").exists()


def test_the_mapping_of_names_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    monkeypatch.setattr("quarkcli.model.names.get_model_conversion_mapping", fails)
    with pytest.raises(ModelError, match="does not say which parameters it has"):
        runner_of(checkpoint)


def test_experts_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    runner = runner_of(checkpoint)
    runner.load_block(0, checkpoint.pick(runner.block_tensors(0)))
    name = next(name for name in runner.block_tensors(0) if "experts" in name)
    experts = runner.expert_module(name)
    assert experts is not None
    monkeypatch.setattr(type(experts), "_apply_gate", fails)
    with pytest.raises(ModelError, match="fails in its experts"):
        runner.expert_hidden(experts, 0, torch.ones(1, tiny.BASE["hidden_size"]))


def test_a_tokenizer_may_fail(tmp_path: Path) -> None:
    class Broken:
        encode = fails

    with pytest.raises(ModelError, match=rf"transformers {transformers.__version__}.*planted failure"):
        tokenizer.Tokenizer(Broken()).encode("text")


def test_a_tokenizer_in_a_path_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"model\xff")
    runs.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model").rename(folder)
    with pytest.raises(ModelError) as caught:
        tokenizer.load_tokenizer(folder)
    assert caught.value.hint.startswith("rename the directory")


def test_another_release_is_named_where_the_installed_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    monkeypatch.setattr(f"{LLAMA}.LlamaModel.forward", fails)
    runner = runner_of(checkpoint)
    for version, hinted in (("5.99.0", True), (library.TESTED, False)):
        monkeypatch.setattr(failures.transformers, "__version__", version)  # the one that is asked, were there two
        with pytest.raises(ModelError, match=f"transformers {version}") as caught:
            record(runner, checkpoint, tiny.tokens())
        assert (f"pip install 'transformers=={library.TESTED}'" in caught.value.hint) == hinted


def test_own_code_names_the_release_it_was_saved_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    checkpoint = strange(source).patch_config(transformers_version="4.31.0")
    (source / "modeling_strange.py").write_text(CUSTOM_CODE.replace("self.embed(input_ids)", "self.nothing"))
    with pytest.raises(ModelError, match=r"fails in its forward pass: AttributeError") as caught:
        through(runner_of(checkpoint, trust_remote_code=True), checkpoint, tiny.tokens())
    assert "saved with transformers 4.31.0" in caught.value.hint


def test_the_release_that_is_named_is_the_locked_one() -> None:
    pins = [Requirement(line) for line in releases.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert {pin.name: str(pin.specifier) for pin in pins}["transformers"] == f"=={library.TESTED}"


# ---- what is not the model's


def test_a_defect_in_a_handler_stays_a_defect(tmp_path: Path) -> None:
    """Through a module of ours that is not this room's: the walk's own code raises under the model's forward."""
    checkpoint = tiny.build("llama", tmp_path)
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.pick(runner.block_tensors(0)))
    name = "model.layers.0.mlp.down_proj.weight"

    def ours(_: torch.Tensor) -> None:
        walk.Walk.masks(None)  # type: ignore[arg-type]

    with runner.handlers(0, Handlers(linear={name: ours})), pytest.raises(AttributeError):
        runner.run_block(0, recording, recording.hidden)


def test_a_defect_is_one_while_the_form_of_a_block_is_learned(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> None:
            walk.Walk.masks(None)  # type: ignore[arg-type]

    with pytest.raises(AttributeError):
        runner_of(tiny.build("llama", tmp_path))._recorder.learn_form(Block(), (torch.ones(2, 1),), {})


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_memory_that_runs_out_is_not_the_models(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.build("llama", tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"{LLAMA}.LlamaMLP.forward", full)
    with pytest.raises(type(error)) as caught:
        through(runner_of(checkpoint), checkpoint, tiny.tokens())
    assert caught.value is error


def test_out_of_memory_still_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner = runner_of(checkpoint)
    forward = Recorder._forward
    monkeypatch.setattr(
        Recorder, "_forward", lambda self, visit, tokens, mask: forward(self, visit, _at_most(tokens, 1), mask)
    )
    walking = walk.Walk(runner, lambda: checkpoint.tensors, tiny.tokens(), None, 2, silent)
    walking.start()
    assert walking.batch == 1


def _at_most(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    if len(tokens) > rows:
        raise torch.OutOfMemoryError
    return tokens


# ---- by construction


def test_foreign_code_runs_quietly_only_where_its_failures_are_told() -> None:
    """`quiet` is what every call into transformers stands in; each is inside `ModelCode` or has its own `except`."""
    loose = []
    for path in ROOM.glob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = {id(node) for part in ast.walk(tree) if isinstance(part, ast.Try) for node in ast.walk(part)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.With) or not any(_calls(item.context_expr, "quiet") for item in node.items):
                continue
            inside = any(isinstance(part, ast.Try) for part in ast.walk(node))
            if id(node) not in guarded and not inside and not _only_loads(node):
                loose.append(f"{path.name}:{node.lineno}")
    assert loose == []


def _calls(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _only_loads(node: ast.With) -> bool:
    """True for a body of calls to `load_config` and `model_class`, which tell their failures themselves."""
    calls = [part for part in ast.walk(ast.Module(node.body, [])) if isinstance(part, ast.Call)]
    return all(isinstance(call.func, ast.Name) and call.func.id in {"load_config", "model_class"} for call in calls)
