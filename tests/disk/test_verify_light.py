"""`quark verify` without a source: no torch, and little memory whatever the size of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quarkcli.disk import manifest
from quarkcli.disk.headers import Header
from quarkcli.disk.source import Source
from quarkcli.disk.values import to_floats, values

HIDDEN, WIDTH, LAYERS, VOCABULARY = 4096, 11008, 2, 40000
LIMIT = 300_000_000
SCRIPT = """
import sys
from quarkcli import memory
from quarkcli.cli.main import main
code = main(["verify", sys.argv[1], *sys.argv[2:]])
print("torch" in sys.modules, memory.peak_rss(), file=sys.stderr)
sys.exit(code)
"""


def test_a_gigabyte_is_read_in_pieces(tmp_path: Path) -> None:
    assert sparse(tmp_path) > 1_000_000_000
    (tmp_path / "quark").mkdir()
    manifest.write(tmp_path, {}, {})
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "files have the hashes of the manifest" in done.stdout
    assert "scales of 14 weights are finite and positive" in done.stdout
    assert "vLLM 0.32 loads it" in done.stdout
    torch, peak = done.stderr.splitlines()[-1].split()
    assert torch == "False"
    assert int(peak) < LIMIT, peak


def sparse(folder: Path) -> int:
    """A Llama in fp8 of which only scales take room on the disk: holes of files read as zeros. Returns its bytes."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes | None]] = {
        "model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN), None),
        "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN), None),
        "model.norm.weight": ("BF16", (HIDDEN,), None),
    }
    one = np.float32(0.01).tobytes()
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = ("BF16", (HIDDEN,), None)
        shapes = {f"self_attn.{leaf}_proj": (HIDDEN, HIDDEN) for leaf in "qkvo"}
        shapes |= {"mlp.gate_proj": (WIDTH, HIDDEN), "mlp.up_proj": (WIDTH, HIDDEN), "mlp.down_proj": (HIDDEN, WIDTH)}
        for leaf, shape in shapes.items():
            tensors[f"{block}.{leaf}.weight"] = ("F8_E4M3", shape, None)
            tensors[f"{block}.{leaf}.weight_scale"] = ("F32", (1,), one)
            tensors[f"{block}.{leaf}.input_scale"] = ("F32", (1,), one)
    header, position, sizes = {}, 0, {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    for name, (dtype, shape, _) in tensors.items():
        end = position + int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (_, _, content) in tensors.items():
            if content is not None:
                stream.seek(8 + len(text) + header[name]["data_offsets"][0])
                stream.write(content)
        stream.truncate(8 + len(text) + position)
    eight = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": eight, "input_activations": eight, "format": "float-quantized"}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 32,
        "tie_word_embeddings": False, "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return position


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
     ("F8_E5M2FNUZ", "float8_e5m2fnuz"), ("F8_E8M0", "float8_e8m0fnu"), ("U8", "float8_e8m0fnu"),
     ("BF16", "bfloat16"), ("F16", "float16")],
)  # fmt: skip
def test_every_code_is_read_as_torch_reads_it(dtype: str, name: str) -> None:
    import torch

    wide = dtype in ("BF16", "F16")
    raw = (np.arange(65536, dtype=np.uint16) if wide else np.arange(256, dtype=np.uint8)).view(np.uint8)
    expected = torch.from_numpy(raw.copy()).view(getattr(torch, name)).float().numpy()
    assert np.array_equal(to_floats(raw, dtype).astype(np.float32), expected, equal_nan=True)


def test_a_summary_of_values(tmp_path: Path) -> None:
    numbers = np.ones(3_000_000, np.float32)
    numbers[[5, 2_000_000, 2_999_999]] = [-1, np.nan, np.inf]
    numbers[7:9] = 0
    (tmp_path / "file").write_bytes(b"head" + numbers.tobytes())
    header = Header("x", "F32", (3_000_000,), "file", 4, 4 + numbers.nbytes)
    status = (tmp_path / "file").stat()
    second, only = (Header(name, "F32", (), "file", 4 + at, 8 + at) for name, at in (("y", 4), ("z", 20)))
    headers = {header.name: header for header in (header, second, only)}
    source = Source(tmp_path, "", None, None, "", {}, headers, {"file": (status.st_size, status.st_mtime_ns)})
    every = values(source, ["z", "x", "y", "x"])
    assert (every["y"].only, every["z"].only, len(every)) == (1.0, -1.0, 3)
    found = every["x"]
    assert (found.nans, found.infinities, found.zeros, found.negatives) == (1, 1, 2, 1)
    assert (found.first, found.count, found.only) == (2_000_000, 3_000_000, None)
    assert found.fault() == "NaN and infinite and zero and negative"
    assert found.fault(signed=True) == "NaN and infinite and zero"
