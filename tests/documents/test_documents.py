"""Documents of others: one plain error with the place for what does not fit, before anything is read of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quarkcli.cli import summary
from quarkcli.cli.main import main
from quarkcli.dialects import readers, writers
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.documents import text
from quarkcli.documents.model import Config
from quarkcli.documents.report import Report
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from tests.golden import sources

HUGE = "9" * 5000
ODD: tuple[Any, ...] = (-1, "x", [["a"]], {"a": 1}, 1.5, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":\n 1,}', r"f\.json:2:[34]: not valid JSON"),  # Python 3.13 names the comma
        (b'{"a": "\xe9"}', r"f\.json: not valid JSON: .*utf-8"),
        (b"[" * 100_000, r"f\.json: not valid JSON: nested too deep"),
        (b'{"a": %s}' % HUGE.encode(), r"f\.json: not valid JSON: .*4300 digits"),
        (b'{"a": {"b": [1, "\\ud800"]}}', "has half a surrogate pair, which UTF-8 does not allow"),
        (b'{"a": {"\\udfff": 1}}', "has half a surrogate pair, which UTF-8 does not allow"),
        (b'{"a": 1, "a": 2}', r"f\.json: not valid JSON: a name appears twice"),
        (b'["a"]', r"f\.json: must hold a JSON object"),
    ],
)
def test_texts(content: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        text.parse(content, "f.json", unique=True)
        text.parse_object(content, "f.json")


def test_a_whole_surrogate_pair_is_a_letter() -> None:
    assert text.parse_object(b'{"a": "\\ud83d\\ude00"}', "f") == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, r"^f: architectures must be a list, not 'LlamaForCausalLM'$"),
        ({"architectures": ["A", None, 3]}, r"^f: architectures\.1 must be a text, not None \(and 1 more\)$"),
        (
            {"text_config": {"llm_config": {"num_hidden_layers": "2"}}},
            r"text_config\.llm_config\.num_hidden_layers must be",
        ),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers: Input should be less than or equal to 100000"),
        ({"num_hidden_layers": True}, r"num_hidden_layers must be a whole number, not True"),
        ({"quantization_config": []}, r"quantization_config must be an object, not \[\]"),
        ({"dtype": {"a": 1}}, "dtype must be a text"),
        ({"quantization_config": {"quant_method": {"a": 1}}}, r"quantization_config\.quant_method must be a text"),
    ],
)
def test_shapes_say_the_path(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check(Config, config, "f")


def test_what_nobody_reads_may_be_anything() -> None:
    check(Config, {"vision_config": 3, "rope_scaling": [None], "architectures": None, "text_config": {"x": []}}, "f")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each dialect, in the first of some schemes that it holds: the first has a cache too."""
    folder = tmp_path_factory.mktemp("made")
    experts = str(sources.build("fused", folder / "source", 4096))
    choices = [
        ["--model", "demo", "--recipe", "fp8-kv_fp8"],
        *(["--model", "demo", "--scheme", scheme] for scheme in ("fp8", "int4_wo_128", "uint4_wo_128")),
        ["--model", experts, "--scheme", "mxfp4_weight_only", "--exclude", "*self_attn*"],
    ]
    data = ["--calib-data", "builtin", "--calib-samples", "2", "--calib-seqlen", "16"]
    found = {}
    for name in (dialect.name for dialect in writers()):
        out = ["--dialect", name, "-o", str(folder / name), "-q"]
        needed = (data if "fp8" in choice[-1] else [] for choice in choices)
        assert any(main(["quantize", *c, *d, *out]) == 0 for c, d in zip(choices, needed, strict=True)), name
        found[name] = folder / name
    return found


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = tree if isinstance(tree, dict) else range(min(len(tree), 2)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((*at, key), *places(tree[key], (*at, key)))]


@pytest.mark.parametrize("dialect", [dialect.name for dialect in readers()])
def test_every_value_of_a_quantization_config_of_another_kind(dialect: str, checkpoints: dict[str, Path]) -> None:
    """A view of the checkpoint, or one ModelError: for each of several hundred changes."""
    found = next(member for member in readers() if member.name == dialect)
    source = Source.open(str(checkpoints[dialect]))
    whole = json.dumps(source.config["quantization_config"])
    refused = 0
    for place in places(json.loads(whole)):
        for value in (*ODD, None):
            changed = json.loads(whole)
            inner = changed
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = value
            try:
                found.view(changed, source.headers)
            except ModelError:
                refused += 1
    count = len(places(json.loads(whole)))
    assert refused > (100 if count > 30 else 2 * count)


def test_every_value_of_a_report(checkpoints: dict[str, Path]) -> None:
    """The report as Markdown, or one ModelError."""
    report = json.loads((next(iter(checkpoints.values())) / "quark" / "report.json").read_text())
    for rows in ("tensors", "parts", "sites"):
        report[rows] = report[rows][1:2]  # they are alike
    whole = json.dumps(report)
    refused = 0
    for place in places(json.loads(whole)):
        for value in (*ODD, None, float("inf"), 10**400):
            changed = json.loads(whole)
            inner = changed
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = value
            try:
                check(Report, changed, "report.json")
            except ModelError:
                refused += 1
            else:
                assert summary.markdown(changed)
    assert refused > 200


def test_a_report_without_what_it_shows() -> None:
    with pytest.raises(ModelError, match=r"^f: 'schema' is missing \(and \d+ more\)$"):
        check(Report, {}, "f")


@pytest.mark.parametrize("change", [b'"hidden_size": 128', b'"vocab_size": 4096'])
def test_numbers_that_python_does_not_read(change: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_bytes(path.read_bytes().replace(change, change.split(b":")[0] + b": " + HUGE.encode()))
    for argv in (["inspect"], ["plan", "--scheme", "mxfp4", "--model"]):
        assert main([*argv, str(tmp_path / "m")]) == 4
        assert "config.json: not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize("content", [f"a: {HUGE}", f"a: -{HUGE}", f'{{"a": {HUGE}}}', 'a: "\\ud800"', "a: caf\udce9"])
def test_recipes_with_texts_and_numbers_that_are_none(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    for argv in (["recipes", "show"], ["plan", "--model", "demo", "--recipe"]):
        assert main([*argv, str(path)]) == 3
        assert "r.yaml" in capsys.readouterr().err
