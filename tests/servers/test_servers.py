"""What servers say of plans and checkpoints, and what a target that is named changes."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from quarkcli import dialects, servers
from quarkcli.cli import main
from quarkcli.disk import verify
from quarkcli.disk.verify import Asked
from quarkcli.errors import CheckError, ExitCode, ModelError, UsageError
from quarkcli.plan.fused import Servers
from tests import runs

DATA = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}


def test_members_are_found_by_their_files() -> None:
    assert set(servers.names()) == {"sglang", "tensorrt-llm", "transformers", "vllm"}
    assert all(member.name == name for name, member in zip(servers.names(), servers.servers(), strict=True))


def test_no_server_knows_a_dialect_by_name() -> None:
    """What a server makes of a dialect stands in the dialect's file."""
    files = list(Path(servers.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    words = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert len(files) > 3 and not words & set(dialects.names())


@pytest.mark.parametrize("target", ["tgi", "vlm", ""])
def test_a_server_without_rules_is_refused(target: Servers) -> None:
    with pytest.raises(UsageError, match="quark does not know what"):
        runs.prepare("demo", scheme="mxfp4", target=target)
    with pytest.raises(UsageError, match="quark does not know what"):
        verify.check("anywhere", Asked(target=target))


# (scheme, dialect, server, what it says; empty: it loads the plan)
VERDICTS = [
    ("nvfp4", "compressed-tensors", "vllm", ""),
    ("nvfp4", "quark", "transformers", "down: nvfp4"),
    ("nvfp4", "compressed-tensors", "sglang", ""),
    ("nvfp4", "quark", "sglang", "no class for down: nvfp4"),
    ("mxfp4", "quark", "sglang", ""),
    ("fp8", "quark", "sglang", ""),
    ("int8_dynamic", "compressed-tensors", "sglang", ""),
    ("int8_dynamic", "quark", "sglang", "no class for"),
    ("int4_wo_128", "compressed-tensors", "sglang", ""),
    ("mx6", "quark", "vllm", "mx6"),
    ("fp8_block128", "compressed-tensors", "vllm", "load k, q, v together: a tile of scales ends within one of them"),
]


@pytest.mark.parametrize(("scheme", "dialect", "target", "said"), VERDICTS)
def test_a_server_that_is_named_must_load_the_plan(scheme: str, dialect: str, target: str, said: str) -> None:
    data = DATA if scheme in runs.CALIBRATED else {}
    if not said:
        assert runs.prepare("demo", scheme=scheme, dialect=dialect, target=target, **data).dialect.name == dialect
        return
    with pytest.raises(ModelError, match=said) as caught:
        runs.prepare("demo", scheme=scheme, dialect=dialect, target=target, **data)
    assert caught.value.code == ExitCode.MODEL
    assert runs.prepare("demo", scheme=scheme, dialect=dialect, **data)  # auto only says what loads it


def test_auto_takes_a_dialect_that_the_target_loads() -> None:
    free = runs.prepare("demo", scheme="mxfp4")
    assert "sglang" not in free.dialect_reason
    assert runs.prepare("demo", scheme="mxfp4", target="sglang").dialect.name == "quark"


def test_verify_says_what_loads_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="mx6")
    found = verify.check(str(made.folder), Asked())
    assert "no known server loads it; for measurements only" in found
    assert any(line.startswith("SGLang") and line.endswith("(read, not run)") for line in found)
    assert not [line for line in verify.check(str(made.folder), Asked(target="none")) if "load" in line]
    assert main.main(["verify", str(made.folder), "--target", "vllm"]) == 8
    assert "vLLM 0.32 does not load it" in capsys.readouterr().err


def test_keys_that_vllm_needs(tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", dialect="quark")
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["exclude"] = ["*lm_head", "*mlp.router"]
    del config["quantization_config"]["export"]["kv_cache_group"]
    path.write_text(json.dumps(config))
    (made.folder / "quark" / "manifest.json").unlink()
    said = [line for line in verify.check(str(made.folder), Asked()) if line.startswith("vLLM")]
    assert said == [
        "vLLM 0.32 does not load it: quantization_config has no export.kv_cache_group (list): the class fails on it"
    ]
    config["quantization_config"]["export"]["kv_cache_group"] = []
    path.write_text(json.dumps(config))
    with pytest.raises(CheckError, match=r"(?m)exclude has patterns, and servers read them as names: \*mlp.router$"):
        verify.check(str(made.folder), Asked(target="vllm"))


@pytest.mark.parametrize(
    ("scheme", "degrees", "said"),
    [
        ("int4_wo_128", (1, 2), "384 inputs would cut scale groups of 128; these numbers fit: 1"),
        ("mxfp4", (1, 2, 8), "heads cannot be divided evenly; these numbers fit: 1, 2, 4"),
        ("fp8_block128", (2,), "384 inputs would cut tiles of 128; these numbers fit: 1"),
    ],
)
def test_degrees_of_tensor_parallel(scheme: str, degrees: tuple[int, ...], said: str, tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme=scheme)
    with pytest.raises(CheckError) as caught:
        verify.check(str(made.folder), Asked(tensor_parallel=degrees))
    assert said in str(caught.value)


def test_degrees_must_be_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "0", "1,x", "1,,2", "-1", "99999999999"):
        assert main.main(["verify", "anywhere", "--tp", text]) == 2
        assert "--tp" in capsys.readouterr().err


def test_what_nobody_knows_is_no_verdict() -> None:
    prepared = runs.prepare("demo", scheme="mxfp4")
    written = servers.Written("novel", {"quant_method": "novel"}, prepared.plan)
    lines = servers.verdicts("auto", written, is_there=True)
    assert (
        "SGLang 0.5.23 may load it: quark does not know what it loads in checkpoint format novel (read, not run)"
        in lines
    )
    assert lines[-1] == "no known server loads it; for measurements only"
    with pytest.raises(
        CheckError, match=r"vLLM 0\.32 may not load it: quark does not know what it loads in checkpoint format"
    ):
        servers.verdicts("vllm", written, is_there=True)
