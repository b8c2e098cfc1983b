"""What users get wrong: one plain message, the documented exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.cli import main
from quarkcli.disk import outputs
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.job import preflight
from quarkcli.recipe import catalog

SMALL = ("--calib-data", "rows.txt", "--calib-samples", "4", "--calib-seqlen", "32")
DATA_FREE = ("--scheme", "mxfp4")
CALIBRATED = ("--scheme", "nvfp4", *SMALL)
DOWN = "model.layers.2.mlp.down_proj"


class Refusal:
    """Runs command lines that must fail; `code`, `text` and `work` are those of the last one."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, code: int, *argv: str, command: str = "quantize", begun: bool = False) -> str:
        """The error's text. Checks code, form of the message, and that no directory is there that was not before."""
        before = self.names()
        out = () if "-o" in argv or command != "quantize" else ("-o", "out")
        self._capsys.readouterr()
        got = main.main([command, *argv, *out, *(("--log-level", "error") if command == "quantize" else ())])
        stdout, text = self._capsys.readouterr()
        assert got == code, text
        assert stdout == ""
        lines = text.splitlines()
        assert re.fullmatch(r"error: .* \[E-[A-Z-]+\]", lines[0])
        assert sum(line.startswith(("error: ", "hint: ")) for line in lines) <= 2
        assert "Traceback" not in text
        assert "internal error" not in text
        new = self.names() - before
        assert new == ({"out.partial"} if begun else set())
        return text

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUARK_DEBUG", raising=False)
    Path("rows.txt").write_text("some words that are worth nothing " * 200)
    return Refusal(tmp_path, capsys)


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight may be read."""

    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Source, "read_many", read)


def copy(change: Callable[[dict[str, torch.Tensor]], Any] | None = None, config: dict[str, Any] | None = None) -> Path:
    """`model`, the embedded model with other tensors or config keys; None removes a key."""
    target = Path("model")
    shutil.copytree(EMBEDDED, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        old = json.loads((target / "config.json").read_text())
        new = {key: value for key, value in {**old, **config}.items() if value is not None}
        (target / "config.json").write_text(json.dumps(new))
    return target


def split(model: Path) -> None:
    """Two shards and an index instead of one file."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(tensors)[:20], list(tensors)[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(model, weight_map)


def write_index(model: Path, weight_map: dict[str, str]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors header by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def recipe(text: str) -> str:
    Path("recipe.yaml").write_text(text)
    catalog.document.__globals__["_document"].cache_clear()
    return "recipe.yaml"


# ---- names on the command line


@pytest.mark.usefixtures("headers_only")
def test_a_misspelt_pattern_shows_near_misses_at_once(refused):
    refused(3, "--model", "demo", *DATA_FREE, "--exclude", "*dwn_proj")
    started = time.process_time()
    text = refused(3, "--model", "demo", *DATA_FREE, "--exclude", "*dwn_proj")
    assert time.process_time() - started < 1
    assert text.startswith("error: --exclude '*dwn_proj': '*dwn_proj' matches none of 30 modules [E-PATTERN-NOMATCH]\n")
    assert "'*down_proj'" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("flags", "code", "texts"),
    [
        (("--scheme", "nvpf4"), 2, ("unknown scheme 'nvpf4'", "nvfp4", "quark schemes list")),
        (("--scheme", "int4_fp"), 2, ("unknown scheme 'int4_fp'", "int4_fp8", "quark schemes list")),
        (("--recipe", "nvfp4-experts-kv"), 3, ("unknown recipe", "nvfp4_experts_only-kv_fp8", "quark recipes list")),
        (("--recipe", "my.yaml"), 3, ("my.yaml: no such recipe file", "quark recipes list")),
        (("--scheme", "mxfp4", "--recipe", "nvfp4"), 2, ("exclude each other",)),
        ((), 2, ("neither --scheme nor --recipe is given", "quark schemes list")),
        ((*DATA_FREE, "--algorithm", "gptqq"), 2, ("unknown algorithm 'gptqq'", "gptq")),
        ((*DATA_FREE, "--algorithm", "gptq,rtn"), 3, ("gptq and rtn", "keep one solver")),
        ((*DATA_FREE, "--dialect", "compressed"), 2, ("unknown checkpoint format 'compressed'", "compressed-tensors")),
        ((*DATA_FREE, "--kv-cache", "fp9"), 2, ("unknown KV cache scheme 'fp9'", "fp8")),
        ((*DATA_FREE, "--attention", "fp9"), 2, ("unknown attention scheme 'fp9'", "fp8", "quark schemes list")),
        ((*DATA_FREE, "--layer", "*down_proj=fp7"), 2, ("unknown scheme 'fp7'", "fp8")),
        (
            (*DATA_FREE, "--layer", "*down_prj=fp8", *SMALL),
            3,
            ("--layer '*down_prj=fp8'", "none of 30", "'*down_proj'"),
        ),
        ((*DATA_FREE, "--layer-type", "Conv2d=fp8", *SMALL), 3, ("--layer-type 'Conv2d=fp8'", "none of 30")),
        ((*DATA_FREE, "--exclude", "re:("), 3, ("--exclude 're:('", "not a regular expression")),
        (
            (*DATA_FREE, "--exclude", "*"),
            3,
            ("switches quantizers on, but all of them end switched off", "--exclude '*'"),
        ),
        ((*DATA_FREE, "--unprotect", "lmhead"), 3, ("unknown role (kind of tensor) 'lmhead'", "head")),
        ((*DATA_FREE, "--device", "tpu"), 2, ("--device", "tpu")),
        ((*DATA_FREE, "--nope", "1"), 2, ("no such option", "--nope")),
    ],
)
@pytest.mark.usefixtures("headers_only")
def test_names_that_do_not_exist(refused, flags, code, texts):
    text = refused(code, "--model", "demo", *flags)
    for part in texts:
        assert part in text


def test_no_cuda_device(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = refused(6, "--model", "demo", *DATA_FREE, "--device", "cuda")
    assert text == "error: --device cuda: no CUDA device is available [E-DEVICE-NONE]\nhint: use --device cpu\n"


# ---- recipes


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("schema: quark/recipe/1\nquantize:\n  schem: nvfp4\n", ":3:3", "unknown key 'schem' (did you mean 'scheme'?)"),
        ("schema: quark/recipe/1\nquantize:\n  scheme: nvfp4\n  scheme: fp8\n", ":4:3", "duplicate key 'scheme'"),
        ("schema: quark/recipe/1\nquantize: [\n", ":3:1", ""),
        ("schema: quark/recipe/2\nquantize: {scheme: fp8}\n", ":1:1", "'quark/recipe/2' is unknown"),
        ("quantize: {scheme: fp8}\n", ":1:12", "begin a native recipe with 'schema: quark/recipe/1'"),
        ("schema: quark/recipe/1\nquantize:\n  scheme: nvpf4\n", ":3:3", "unknown scheme 'nvpf4'"),
        ("schema: quark/recipe/1\nquantize: {}\n", ":2:1", "scheme and quant_cfg exclude each other"),
        (
            "schema: quark/recipe/1\nquantize:\n  quant_cfg:\n  - quantizer_path: '*weight_quantizer'\n"
            "    cfg: {element: fp4_e2m2, granularity: {group: 32}, scale: {dtype: e8m0}}\n",
            ":5:5",
            "fp4_e2m1",
        ),
        (
            "schema: quark/recipe/1\nquantize:\n  quant_cfg:\n  - quantizer_path: '*weight_quantizer'\n",
            ":4:5",
            "neither cfg nor enable is given",
        ),
        (
            "schema: quark/recipe/1\nquantize:\n  scheme: mxfp4\n  algorithm: [{method: gptq, damping: 1}]\n",
            ":4:15",
            "no parameter 'damping'",
        ),
        (
            "schema: quark/recipe/1\nquantize:\n  scheme: mxfp4\n  algorithm: [{method: gptq}, {method: rtn}]\n",
            ": ",
            "keep one solver",
        ),
        ("schema: quark/recipe/1\nquantize: {scheme: mxfp4, algorithm: gptqq}\n", ":2:27", "unknown algorithm 'gptqq'"),
        (
            "schema: quark/recipe/1\nquantize: {scheme: mxfp4, kv_cache: fp9}\n",
            ":2:27",
            "unknown KV cache scheme 'fp9'",
        ),
        ("schema: quark/recipe/1\nquantize: {scheme: mxfp4, attention: fp9}\n", ":2:27", "attention scheme 'fp9'"),
        ("schema: quark/recipe/1\nquantize: {scheme: mxfp4}\ncalibration: {samples: -1}\n", ":3:15", "samples"),
    ],
)
@pytest.mark.usefixtures("headers_only")
def test_bad_recipes_are_shown_with_their_place(refused, text, where, what):
    got = refused(3, "--model", "demo", "--recipe", recipe(text))
    assert what in got
    if where:
        assert f"recipe.yaml{where}" in got


@pytest.mark.usefixtures("headers_only")
def test_entry_without_a_match_is_named_by_its_line(refused):
    path = recipe(
        "schema: quark/recipe/1\nquantize:\n  quant_cfg:\n  - {quantizer_path: '*', enable: false}\n"
        "  - quantizer_path: '*dwn_proj.weight_quantizer'\n"
        "    cfg: {element: fp4_e2m1, granularity: {group: 32}, scale: {dtype: e8m0, rule: even}}\n"
    )
    text = refused(3, "--model", "demo", "--recipe", path)
    assert "recipe.yaml:5:5: '*dwn_proj.weight_quantizer' matches none of" in text
    assert "down_proj" in text.splitlines()[1]


# ---- the model's files


def remove_shard(model: Path) -> None:
    split(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\0\0")


def point_outside(model: Path) -> None:
    split(model)
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_index(model, weight_map | {"lm_head.weight": "../secret.safetensors"})


def point_to_root(model: Path) -> None:
    point_outside(model)
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_index(model, weight_map | {"lm_head.weight": "/etc/secret.safetensors"})


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def bad_dtype(model: Path) -> None:
    edit_header(model / "model.safetensors", lambda header: header["lm_head.weight"].update(dtype="BF61"))


def other_shape(model: Path) -> None:
    edit_header(model / "model.safetensors", lambda header: header["lm_head.weight"].update(shape=[1, 2]))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": [\n  "LlamaForCausalLM",\n}')


def quantized(model: Path) -> None:
    text = json.loads((model / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(text))


def lost_block(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2." not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (remove_shard, ("model-00002-of-00002.safetensors", "missing")),
        (truncate, ("model.safetensors", "its header says")),
        (cut_header, ("model.safetensors", "does not fit a file of 2 bytes")),
        (point_outside, ("of lm_head.weight is outside the model directory",)),
        (point_to_root, ("of lm_head.weight is outside the model directory",)),
        (only_pickles, ("pytorch_model.bin", "foreign code", "safetensors")),
        (bad_dtype, ("lm_head.weight has the unknown dtype 'BF61'", "model.safetensors")),
        (other_shape, ("lm_head.weight has", "model.safetensors")),
        (no_config, ("no config.json",)),
        (broken_config, ("config.json:3:1: not valid JSON",)),
        (quantized, ("quantized with 'bitsandbytes', which quark cannot read", "use one of these methods")),
        (lost_block, ("model.layers.*: decoder block 2 of 4 has no tensors",)),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.usefixtures("headers_only")
def test_a_model_that_cannot_be_used(refused, damage, texts, command):
    damage(copy())
    text = refused(4, "--model", "model", *DATA_FREE, command=command)
    for part in texts:
        assert part in text


@pytest.mark.usefixtures("headers_only")
def test_fp8_weights_without_a_config_are_no_weights(refused):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.float8_e4m3fn)

    copy(change)
    text = refused(4, "--model", "model", *DATA_FREE)
    assert f"{DOWN}.weight: is stored as F8_E4M3" in text
    assert f"--exclude '{DOWN}'" in text


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    for layer in (1, 2):
        for name, shape in (("gate_proj", (400, 128)), ("up_proj", (400, 128)), ("down_proj", (128, 400))):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.usefixtures("headers_only")
def test_a_width_that_the_group_does_not_divide(refused):
    copy(narrow, {"block_configs": [0, 1, 1, 0]})  # a config that says so: those two blocks are of another kind
    text = refused(4, "--model", "model", "--scheme", "int4_wo_128")
    assert text.startswith(
        "error: model.layers.1.mlp.down_proj.weight_quantizer: its 400 input features are not a multiple of group size "
        "128 (remainder 16); 2 modules have this width [E-GROUP-SIZE]\nhint: use --exclude '*down_proj'"
    )
    assert "--layer '*down_proj=fp8'" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("flags", [DATA_FREE, ("--scheme", "int4_wo_128"), ("--scheme", "fp8", *SMALL), CALIBRATED])
def test_weights_that_are_no_numbers_are_named(refused, value, flags):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight"][3, 5] = value

    copy(change)
    text = refused(7, "--model", "model", *flags, begun=True)
    assert f"{DOWN}.weight" in text
    assert "[3, 5]" in text


# ---- foreign code, tokenizer


def foreign(model: Path) -> None:
    """A model whose class comes with its own code, which leaves a mark when it runs."""
    code = "from pathlib import Path\nPath('ran').touch()\nclass Own: pass\n"
    for name in ("configuration_own.py", "modeling_own.py"):
        (model / name).write_text(code)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (model / "config.json").write_text(json.dumps(config))


def test_custom_code_does_not_run_without_the_flag(refused):
    foreign(copy())
    text = refused(4, "--model", "model", *CALIBRATED)
    assert "--trust-remote-code" in text
    assert "modeling_own" in text or "code" in text
    assert not Path("ran").exists()


def test_a_data_free_plan_needs_no_model_class(refused, capsys):
    foreign(copy())
    assert main.main(["quantize", "--model", "model", *DATA_FREE, "-o", "out", "-q"]) == 0
    assert not Path("ran").exists()
    assert (Path("out") / "modeling_own.py").is_file()
    warnings = json.loads((Path("out") / "quark" / "report.json").read_text())["warnings"]
    assert any("no family file for model type 'own'" in warning for warning in warnings)


def test_a_calibrated_plan_needs_a_tokenizer(refused):
    model = copy()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    text = refused(4, "--model", "model", *CALIBRATED)
    assert "there are no tokenizer files" in text
    assert "hint: add the tokenizer's files; only a scheme that needs no calibration data, such as mxfp4" in text
    assert main.main(["quantize", "--model", "model", *DATA_FREE, "-o", "out", "-q"]) == 0


# ---- calibration


def test_an_empty_file(refused):
    Path("empty.jsonl").touch()
    text = refused(7, "--model", "demo", "--scheme", "nvfp4", "--calib-data", "empty.jsonl")
    assert "empty.jsonl: the calibration file is empty" in text
    assert '{"text": "..."}' in text


def test_a_file_that_does_not_exist(refused):
    text = refused(5, "--model", "demo", "--scheme", "nvfp4", "--calib-data", "nope.jsonl")
    assert "nope.jsonl: there is no such calibration file" in text


def test_fewer_rows_than_asked_for(refused, capsys):
    flags = ("--scheme", "nvfp4", "--calib-data", "rows.txt", "--calib-samples", "400", "--calib-seqlen", "64")
    text = refused(7, "--model", "demo", *flags)
    assert "rows.txt: " in text
    assert "rows of 64 tokens, 400 asked for" in text
    assert "--allow-short" in text
    assert main.main(["quantize", "--model", "demo", *flags, "--allow-short", "-o", "out", "-q"]) == 0
    report = json.loads((Path("out") / "quark" / "report.json").read_text())
    assert report["calibration"]["rows"] < 400
    assert any("rows of 64 tokens, 400 wanted" in warning for warning in report["warnings"])


def test_text_shorter_than_a_row(refused):
    Path("short.txt").write_text("three words only")
    text = refused(7, "--model", "demo", "--scheme", "nvfp4", "--calib-data", "short.txt")
    assert "fewer than one window of 512" in text
    assert "--calib-seqlen" in text


@pytest.mark.parametrize(
    ("flags", "what"), [((), "none of the columns body, id"), (("--calib-column", "txt"), "'txt'")]
)
def test_columns_that_are_not_there(refused, flags, what):
    Path("rows.jsonl").write_text("\n".join(json.dumps({"body": "words " * 50, "id": row}) for row in range(9)))
    small = ("--calib-data", "rows.jsonl", "--calib-samples", "2", "--calib-seqlen", "8")
    text = refused(7, "--model", "demo", "--scheme", "nvfp4", *small, *flags)
    assert what in text
    assert "body, id" in text
    assert "rows.jsonl" in text


def test_a_length_beyond_the_model(refused):
    text = refused(7, "--model", "demo", "--scheme", "nvfp4", "--calib-data", "rows.txt", "--calib-seqlen", "4096")
    assert "--calib-seqlen 4096 is more than the model's 2048 positions" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flags", [CALIBRATED, ("--scheme", "int4_wo_128", "--algorithm", "gptq", *SMALL)])
def test_activations_that_are_no_numbers(refused, dtype, flags):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        norm = "model.layers.1.post_attention_layernorm.weight"
        tensors[norm] = torch.full((128,), torch.finfo(dtype).max, dtype=dtype)

    copy(change, {"dtype": str(dtype).removeprefix("torch.")})
    text = refused(7, "--model", "model", *flags, begun=True)
    assert "model.layers.1.mlp" in text


# ---- disk and directories


@pytest.mark.usefixtures("headers_only")
def test_too_little_space_is_said_before_the_work(refused, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 1000)
    text = refused(6, "--model", "demo", *DATA_FREE)
    assert text.startswith("error: out: ")
    assert "bytes needed, 1,000 free" in text


@pytest.mark.usefixtures("headers_only")
def test_too_little_memory_is_said_before_the_work(refused, monkeypatch):
    monkeypatch.setattr(preflight, "_total_memory", lambda: 1000)
    text = refused(6, "--model", "demo", *DATA_FREE)
    assert "bytes of memory, and this machine has 1,000" in text


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("call", [3, 20])
def test_a_disk_that_fills_up_in_the_middle(refused, monkeypatch, name, call):
    real, count = getattr(os, name), iter(range(1, 1000))

    def full(*arguments: Any) -> None:
        if next(count) >= call:
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        text = refused(
            6, "--model", "demo", *DATA_FREE, begun=(name, call) != ("fsync", 3)
        )  # not before the first part
    assert "the disk is full" in text
    assert "hint: free some space, then run the same command again to continue" in text
    assert not list(Path().rglob(".writing-*"))
    assert main.main(["quantize", "--model", "demo", *DATA_FREE, "-o", "out", "-q"]) == 0
    assert ("resuming: " in (Path("out") / "quark" / "quark.log").read_text()) == (call > 3)  # else nothing was done


def test_side_files_that_do_not_fit(refused, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "the disk is full" in refused(6, "--model", "demo", *DATA_FREE, begun=True)


@pytest.mark.usefixtures("headers_only")
def test_an_output_that_cannot_be_written(refused, monkeypatch):
    Path("file").touch()
    assert "file is not a directory" in refused(2, "--model", "demo", *DATA_FREE, "-o", "file/out")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    text = refused(6, "--model", "demo", *DATA_FREE)
    assert "cannot be written to" in text
    assert "-o" in text


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("model", "is inside the model's directory, or contains it"),
        ("model/out", "is inside the model's directory, or contains it"),
        (".", "is inside the model's directory, or contains it"),
        ("full", "something that is not a checkpoint of quark"),
        ("file", "something that is not a checkpoint of quark"),
        ("done", "a finished checkpoint"),
    ],
)
@pytest.mark.usefixtures("headers_only")
def test_outputs_that_are_taken(refused, output, what):
    model = copy()
    Path("file").write_text("mine")
    Path("full").mkdir()
    (Path("full") / "thesis.tex").touch()
    Path("done", "quark").mkdir(parents=True)
    (Path("done") / outputs.MANIFEST).touch()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    text = refused(2, "--model", "model", *DATA_FREE, "-o", output)
    assert what in text
    assert "-o" in text
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert model.is_dir()


@pytest.mark.usefixtures("headers_only")
def test_an_unfinished_output_of_another_run(refused):
    Path("out.partial").mkdir()
    (Path("out.partial") / "notes.txt").touch()
    text = refused(2, "--model", "demo", *DATA_FREE)
    assert "out.partial" in text
    assert "--resume never" in text


# ---- access


@pytest.mark.usefixtures("headers_only")
@pytest.mark.parametrize("model", ["meta-llama/Not-A-Model", "./nothing", "/nothing/here", "a b"])
def test_models_that_cannot_be_reached(refused, model):
    text = refused(5, "--model", model, *DATA_FREE, "--offline")
    assert "no such directory" in text
    assert model in text


def test_a_token_is_never_shown(refused, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert "secret" not in refused(5, "--model", "meta-llama/Not-A-Model", *DATA_FREE)


def test_a_file_is_no_model(refused):
    text = refused(5, "--model", "rows.txt", *DATA_FREE)
    assert "is a file; give the directory" in text
