"""Families whose class transformers lacks, calibrated through the code that their checkpoints ship."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from quarkcli.errors import ModelError
from quarkcli.events import silent
from quarkcli.job.rows import token_rows
from tests import runs
from tests.families.test_all_families import check_accounts, written

CODE = Path(__file__).parent / "remote"
CLASSES = {"qwen": ("QWenConfig", "QWenLMHeadModel"), "chatglm": ("ChatGLMConfig", "ChatGLMForConditionalGeneration")}
# The first linear of block 0 and the last.
FIRST = {
    "qwen": "transformer.h.0.attn.c_attn",
    "chatglm": "transformer.encoder.layers.0.self_attention.query_key_value",
}
LAST = {"qwen": "transformer.h.0.mlp.c_proj", "chatglm": "transformer.encoder.layers.0.mlp.dense_4h_to_h"}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def shipped(file: str, folder: Path) -> Path:
    """A checkpoint with its modeling file beside it."""
    written(file, folder)
    module = f"modeling_{file}"
    shutil.copy(CODE / f"{module}.py", folder)
    config, model = CLASSES[file]
    data = json.loads((folder / "config.json").read_text())
    data |= {"architectures": [model], "dtype": "bfloat16"}
    data["auto_map"] = {"AutoConfig": f"{module}.{config}", "AutoModelForCausalLM": f"{module}.{model}"}
    (folder / "config.json").write_text(json.dumps(data))
    runs.tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def largest_inputs(folder: Path, rows: list[torch.Tensor], names: list[str]) -> dict[str, float]:
    """The largest magnitude that modules read, in the whole model, built and run without quark."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    model.load_state_dict(runs.read_all(folder))
    found = dict.fromkeys(names, 0.0)

    def note(name: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            found[name] = max(found[name], float(args[0].abs().max()))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad():
        for row in rows:
            model.eval()(row)
    return found


@pytest.mark.parametrize("file", sorted(CLASSES))
def test_calibrated_through_own_code(file: str, text: Path, tmp_path: Path) -> None:
    source = shipped(file, tmp_path / "source")
    data = runs.data(text, 8, 32)
    with pytest.raises(ModelError, match=rf"modeling_{file}\.py") as caught:
        runs.run(source, tmp_path / "never", scheme="fp8", **data)
    assert "--trust-remote-code" in caught.value.hint
    made = runs.run(source, tmp_path / "out", scheme="fp8", trust_remote_code=True, **data)
    assert made.report["model"]["family"] == file
    assert (made.folder / f"modeling_{file}.py").is_file()
    rows = token_rows(made.prepared, silent).tokens
    scales = runs.read_all(made.folder)
    for name, amax in largest_inputs(source, [rows], [FIRST[file], LAST[file]]).items():
        assert float(scales[f"{name}.input_scale"]) == pytest.approx(amax / 448, rel=1e-2)  # other batches, in bfloat16
    check_accounts(runs.run(source, tmp_path / "nvfp4", scheme="nvfp4", trust_remote_code=True, **data))


def test_padding_is_left_out_where_tokens_come_first(tmp_path: Path) -> None:
    source = shipped("chatglm", tmp_path / "source")
    tensors = runs.read_all(source)
    end = runs.tokenizer().eos_token_id
    tensors["transformer.embedding.word_embeddings.weight"][end] = torch.eye(128)[5]  # large once it is normed
    tensors["transformer.encoder.layers.0.input_layernorm.weight"][5] = 1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    talks = [{"prompt": "a" * 3, "completion": "b"}, *({"prompt": "c" * 60, "completion": "d" * n} for n in (1, 9, 20))]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    data = {"calib_data": str(chats), "calib_samples": 4, "calib_seqlen": 200, "calib_batch": 3}
    made = runs.run(source, tmp_path / "out", scheme="fp8", trust_remote_code=True, **data)
    found = token_rows(made.prepared, silent)
    assert found is not None and found.mask is not None and found.token_count < found.tokens.numel()
    real = [row[mask][None] for row, mask in zip(found.tokens, found.mask, strict=True)]
    scales = runs.read_all(made.folder)
    for name, amax in largest_inputs(source, real, [FIRST["chatglm"], LAST["chatglm"]]).items():
        assert float(scales[f"{name}.input_scale"]) == pytest.approx(amax / 448, rel=1e-2)
