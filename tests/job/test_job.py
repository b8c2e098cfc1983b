"""The whole job on the embedded model: what lies in the directory, and that the same inputs give the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from quarkcli.cli import summary
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.journal import Journal
from quarkcli.disk.source import Source
from quarkcli.errors import QuarkError
from quarkcli.events import Event, Message, PartDone, Phase
from quarkcli.job import device as devices
from quarkcli.job import run as job
from quarkcli.job.run import Options
from quarkcli.model.runner import Runner
from quarkcli.plan.compose import Overrides
from quarkcli.spec import TensorSpec
from tests import runs

SCHEMES = ("fp8", "int4_wo_128", "mxfp4", "nvfp4")
DIALECTS = ("compressed-tensors", "quark")
CALIBRATED = {"fp8", "nvfp4"}
PAIRS = [(scheme, dialect) for scheme in SCHEMES for dialect in DIALECTS]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small calibration text."""
    path = tmp_path_factory.mktemp("data") / "rows.txt"
    chosen = random.Random(0)
    words = ["the", "value", "of", "a", "class", "is", "what", "its", "names", "return", "in", "this", "module"]
    path.write_text(" ".join(chosen.choice(words) for _ in range(4000)))
    return str(path)


def options(rows: str, output: Path, scheme: str | None = None, **more: Any) -> Options:
    settings: dict[str, Any] = {"model": "demo", "scheme": scheme, "output": output, "offline": True, "device": "cpu"}
    if scheme in CALIBRATED or more.get("algorithm"):
        settings |= {"calib_data": rows, "calib_samples": 8, "calib_seqlen": 64}
    return Options(**settings | more)


@pytest.fixture(scope="module")
def made(rows: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A checkpoint per scheme and dialect."""
    folder = tmp_path_factory.mktemp("made")
    out = {}
    for scheme, dialect in PAIRS:
        out[scheme, dialect] = folder / f"{scheme}-{dialect}"
        job.run(options(rows, out[scheme, dialect], scheme, dialect=dialect))
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


# ---- the directory


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_everything_a_server_and_a_person_needs_is_there(made, scheme, dialect):
    folder = made[scheme, dialect]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shards = {f"model-{part}.safetensors" for part in ("embed", "tail", *(f"block-{i:05d}" for i in range(4)))}
    assert present == shards | {
        "README.md", "config.json", "generation_config.json", "model.safetensors.index.json",
        "quantization_config.json", "tokenizer.json", "tokenizer_config.json",
        "quark/recipe.yaml", "quark/report.json", "quark/report.html", "quark/manifest.json", "quark/quark.log",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (EMBEDDED / name).read_bytes()
    assert not folder.with_name(f"{folder.name}.partial").exists()


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_index_is_true(made, scheme, dialect):
    """Every tensor is where the index says, safetensors reads it, and total_size is the bytes of all of them."""
    folder = made[scheme, dialect]
    index = read(folder, "model.safetensors.index.json")
    found, total = {}, 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                found[name] = path.name
                total += tensor.numel() * tensor.element_size()
                if tensor.is_floating_point():
                    assert torch.isfinite(tensor.float()).all(), name
    assert found == index["weight_map"]
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_config_is_the_sources_with_one_key_more(made, scheme, dialect):
    folder = made[scheme, dialect]
    config, source = read(folder, "config.json"), read(EMBEDDED, "config.json")
    assert list(config) == [*source, "quantization_config"]
    assert {key: config[key] for key in source} == source
    assert config["quantization_config"] == read(folder, "quantization_config.json")
    assert config["quantization_config"]["quant_method"] == dialect


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_what_is_not_quantized_is_kept_byte_for_byte(made, scheme, dialect):
    folder = made[scheme, dialect]
    report = read(folder, "quark/report.json")
    source, output = Source.open(str(EMBEDDED)), Source.open(str(folder))
    assert len(report["kept"]) == 11  # nine norms, embedding, head
    for name in report["kept"]:
        assert torch.equal(source.read(name).view(torch.uint8), output.read(name).view(torch.uint8)), name


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_manifest_names_every_file_with_its_true_hash(made, scheme, dialect):
    folder = made[scheme, dialect]
    manifest = read(folder, "quark/manifest.json")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == present - {"quark/manifest.json", "quark/quark.log"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert manifest["schema"] == "quark/manifest/1"
    assert manifest["source"]["headers"] == Source.open(str(EMBEDDED)).header_digest()


# What a checkpoint format stores beside the codes and scales of a weight.
BESIDE = re.compile(r"\.(weight_shape|weight_zero_point|input_\w+)$|norm")


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_effective_bits_are_the_bytes_of_codes_and_scales(made, scheme, dialect):
    """Of the files; none of these schemes has zero points."""
    stored = {name: t.nbytes for name, t in runs.read_all(made[scheme, dialect]).items() if ".layers." in name}
    of_formats = sum(count for name, count in stored.items() if not BESIDE.search(name))
    with safe_open(EMBEDDED / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "_proj" in name]  # noqa: SIM118 - no mapping
        weights = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    bits = read(made[scheme, dialect], "quark/report.json")["size"]["effective_bits"]
    assert bits == pytest.approx(8 * of_formats / weights, abs=5e-5)  # rounded to four digits


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_report_says_what_was_done(made, rows, scheme, dialect):
    folder = made[scheme, dialect]
    report = read(folder, "quark/report.json")
    assert report["schema"] == "quark/report/2"
    assert report["model"]["family"] == "llama"
    assert report["recipe"] == {"name": scheme, "file": None}
    assert report["algorithms"] == ["rtn"]
    assert report["dialect"]["name"] == dialect
    sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert report["size"]["output_bytes"] == sizes
    assert report["size"]["source_bytes"] == (EMBEDDED / "model.safetensors").stat().st_size
    tensors = read(folder, "model.safetensors.index.json")["metadata"]["total_size"]
    assert sum(report["size"]["bytes_by_dtype"].values()) == tensors
    bits = {"fp8": 8.0, "int4_wo_128": 4.125, "mxfp4": 4.25, "nvfp4": 4.5}[scheme]
    assert report["size"]["effective_bits"] == pytest.approx(bits, abs=0.01)  # scales of whole tensors on top
    assert sorted(report["modules_by_scheme"].values()) == [2, 28]
    layer = "model.layers.*"
    fused = {f"{layer}.self_attn.q_proj+k_proj+v_proj": 4, f"{layer}.mlp.gate_proj+up_proj": 4}
    assert report["shared_scales"] == (fused if scheme in {"fp8", "nvfp4"} else {})  # others have no tensor scale
    assert report["device"] == "cpu"
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 50_000_000
    assert report["checks"]
    assert report["experts"]["share_quantized"] is None
    if scheme not in CALIBRATED:
        assert report["calibration"] is None
        return
    calibration = report["calibration"]
    assert (calibration["source"], calibration["rows"], calibration["seqlen"]) == (rows, 8, 64)
    assert calibration["tokens"] == 512


# Relative error of rounding normal weights [256, 384], computed with numpy and ml_dtypes alone: 0.0264, 0.1115, 0.1152
# (exponents rounded down), 0.0951. The embedded model's weights are close to normal.
LOSS = {"fp8": (0.022, 0.030), "int4_wo_128": (0.10, 0.125), "mxfp4": (0.10, 0.125), "nvfp4": (0.09, 0.10)}


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_loss_is_what_the_format_costs(made, scheme, dialect):
    loss = read(made[scheme, dialect], "quark/report.json")["loss"]
    low, high = LOSS[scheme]
    assert low < loss["mean_weight_error"] < high
    assert len(loss["weight_errors"]) == 28
    blocks = {f"model.layers.{index}" for index in range(4)} if scheme in {"fp8", "nvfp4"} else set()
    assert set(loss["output_errors"]) == blocks


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_log_has_every_phase_and_part(made, scheme, dialect):
    lines = (made[scheme, dialect] / "quark" / "quark.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line) for line in lines)
    texts = [line.split(" ", 1)[1] for line in lines]
    work = "calibrate+quantize" if scheme in CALIBRATED else "quantize"
    phases = [text.removeprefix("phase: ") for text in texts if text.startswith("phase: ")]
    assert phases == ["resolve", "check", work, "finalize", "verify"]
    parts = [text.split(" ")[0:2] for text in texts if text.startswith("[")]
    names = ["embed", *(f"model.layers.{index}" for index in range(4)), "tail"]
    assert parts == [[f"[{number}/6]", name] for number, name in enumerate(names, 1)]


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_card_can_be_published(made, scheme, dialect):
    text = (made[scheme, dialect] / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["base_model"] == "tiny-llama"
    assert front["base_model_relation"] == "quantized"
    assert set(front["tags"]) >= {"quark", scheme}
    assert dialect in body
    assert "vllm serve" in body


def test_both_dialects_hold_the_same_numbers(made):
    """Decoded by their readers, weights agree bit for bit where the format has no reciprocal global scale."""
    from quarkcli.disk.checkpoint import Checkpoint

    name = "model.layers.1.mlp.down_proj"
    for scheme in SCHEMES:
        first, second = (Checkpoint(Source.open(str(made[scheme, d]))).weight(name) for d in DIALECTS)
        torch.testing.assert_close(first, second, rtol=2e-7 if scheme == "nvfp4" else 0, atol=0)


# ---- the same again


@pytest.mark.parametrize(("scheme", "dialect"), PAIRS)
def test_the_resolved_recipe_repeats_the_job(made, rows, tmp_path, scheme, dialect):
    folder = made[scheme, dialect]
    recipe = str(folder / "quark" / "recipe.yaml")
    report = job.run(options(rows, tmp_path / "again", recipe=recipe))
    assert hashes(tmp_path / "again") == hashes(folder)
    assert report["dialect"]["name"] == dialect
    assert read(tmp_path / "again", "config.json") == read(folder, "config.json")


def test_the_resolved_recipe_repeats_flags_as_well(rows, tmp_path):
    overrides = Overrides(
        exclude=["*layers.0.*"], layers=["*down_proj=fp8"], unprotect=["head"], kv_cache="fp8", layer_types=[]
    )
    first = options(rows, tmp_path / "first", "nvfp4", overrides=overrides, dialect="quark")
    job.run(first)
    job.run(options(rows, tmp_path / "second", recipe=str(tmp_path / "first" / "quark" / "recipe.yaml")))
    assert hashes(tmp_path / "second") == hashes(tmp_path / "first")
    first_text = (tmp_path / "first" / "quark" / "recipe.yaml").read_text()
    assert (tmp_path / "second" / "quark" / "recipe.yaml").read_text() == first_text


def test_the_report_says_where_rules_acted(rows, tmp_path):
    overrides = Overrides(
        exclude=["*layers.0.*"], layers=["*down_proj=fp8"], unprotect=["head"], kv_cache="fp8", min_kv_scale=0.01
    )
    report = job.run(options(rows, tmp_path / "out", "nvfp4", overrides=overrides))
    decided = report["decided_by"]
    assert decided["--exclude '*layers.0.*'"] == {"on": 0, "off": 7 * 4}
    assert decided["--layer '*down_proj=fp8'"] == {"on": 3 * 2, "off": 3 * 2}
    assert decided["--min-kv-scale 0.01"] == {"on": 8, "off": 0}
    assert decided["scheme nvfp4"] == {"on": (3 * 6 + 1) * 2, "off": (3 * 6 + 1) * 2}
    assert sum(counts["on"] + counts["off"] for counts in decided.values()) == 30 * 4 + 4 * 4
    assert report["shared_scales"] == {
        "model.layers.*.self_attn.q_proj+k_proj+v_proj": 3,
        "model.layers.*.mlp.gate_proj+up_proj": 3,
    }
    assert "--layer '*down_proj=fp8': 6 quantizers on, 6 quantizers off" in summary.markdown(report)


@pytest.mark.parametrize(("scheme", "algorithm"), [("mxfp4", None), ("nvfp4", None), ("int4_wo_128", "gptq")])
def test_same_inputs_same_files(rows, tmp_path, scheme, algorithm):
    """Byte for byte, whatever the caller's random numbers and however rows are batched; those are left as they are."""
    seen = []
    for name, batch in (("a", None), ("b", 3)):
        torch.manual_seed(ord(name))
        random.seed(name)
        before = torch.get_rng_state(), random.getstate()
        job.run(options(rows, tmp_path / name, scheme, algorithm=algorithm, calib_batch=batch))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        seen.append(read(tmp_path / name, "quark/manifest.json")["files"])
    different = {name for name in seen[0] if seen[0][name] != seen[1][name]}
    assert different <= {"quark/report.json", "quark/report.html"}  # times and peaks, if anything


def test_another_seed_chooses_other_rows(rows, tmp_path, made):
    job.run(options(rows, tmp_path / "out", "nvfp4", seed=1))
    assert hashes(tmp_path / "out") != hashes(made["nvfp4", "compressed-tensors"])


# ---- what a user's machine does


def test_files_follow_the_umask(rows, tmp_path):
    before = os.umask(0o027)
    try:
        job.run(options(rows, tmp_path / "out", "nvfp4"))
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), (path, oct(mode))


def test_the_source_is_never_touched(rows, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(EMBEDDED, source)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(source.rglob("*"))}
    folder = source.stat().st_mtime_ns
    job.run(options(rows, tmp_path / "out", "nvfp4", model=str(source), algorithm="gptq"))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(source.rglob("*"))} == before
    assert source.stat().st_mtime_ns == folder


def test_side_files_of_the_source_come_along(rows, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(EMBEDDED, source)
    (source / "LICENSE").write_text("do what you like")
    (source / "README.md").write_text("# the source's card")
    (source / "chat_template.jinja").write_bytes(b"{{ x }}\r\n")
    (source / "extra" / "deep").mkdir(parents=True)
    (source / "extra" / "deep" / "notes.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / "quark").mkdir()
    (source / "quark" / "report.json").write_text("of another run")
    job.run(options(rows, tmp_path / "out", "mxfp4", model=str(source)))
    out = tmp_path / "out"
    for name in ("LICENSE", "chat_template.jinja", "extra/deep/notes.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "quark" / "source_README.md").read_text() == "# the source's card"
    assert "# model, mxfp4" in (out / "README.md").read_text()
    assert not (out / "pytorch_model.bin").exists()
    assert read(out, "quark/report.json")["schema"] == "quark/report/2"


def test_one_part_is_in_memory_at_a_time(rows, tmp_path, monkeypatch):
    """Parts are read one by one, each tensor once."""
    seen: list[tuple[Path, tuple[str, ...]]] = []
    real = Source.read_many

    def read_many(self: Source, names: Any) -> Any:
        seen.append((self.folder, tuple(names)))
        return real(self, names)

    monkeypatch.setattr(Source, "read_many", read_many)
    prepared = job.prepare(options(rows, tmp_path / "out", "mxfp4"))
    assert seen == []
    job.run(options(rows, tmp_path / "out", "mxfp4"))
    read = [name for folder, names in seen if folder == EMBEDDED for name in names]
    assert read == [name for part in prepared.plan.parts for name in part.tensors]


def test_a_data_free_plan_runs_nothing(rows, tmp_path, monkeypatch):
    def run(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(Runner, "__init__", run)
    job.run(options(rows, tmp_path / "out", "int4_wo_128"))


# ---- out of memory


class Heard(list[Event]):
    """A listener."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self if isinstance(event, Message) and event.level == "warning"]


def limit_batch(monkeypatch: pytest.MonkeyPatch, most: int, name: str = "run_block") -> list[int]:
    """A device that runs out of memory above `most` rows. Returns the sizes that went through."""
    real, sizes = getattr(Runner, name), []

    def call(self: Runner, *arguments: Any, **keywords: Any) -> Any:
        rows = arguments[-1].shape[0] if name == "run_block" else arguments[0].shape[0]
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(rows)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Runner, name, call)
    return sizes


@pytest.mark.parametrize("most", [2, 3])
def test_out_of_device_memory_halves_the_batch_and_says_so(rows, tmp_path, monkeypatch, made, most):
    sizes = limit_batch(monkeypatch, most)
    heard = Heard()
    report = job.run(options(rows, tmp_path / "out", "nvfp4"), heard)
    assert max(sizes) == 2
    assert "not enough GPU memory: 4 -> 2 sequences at a time" in heard.warnings
    assert "not enough GPU memory: 4 -> 2 sequences at a time" in report["warnings"]
    assert hashes(tmp_path / "out") == hashes(made["nvfp4", "compressed-tensors"])


@pytest.mark.parametrize("seqlen", [400, 100])  # 5 and 20 rows in one forward: halves do not fit into halves
def test_batches_that_are_no_power_of_two(rows, tmp_path, monkeypatch, seqlen):
    settings = {"calib_samples": 7, "calib_seqlen": seqlen}
    job.run(options(rows, tmp_path / "calm", "nvfp4", **settings))
    with monkeypatch.context() as patch:
        sizes = limit_batch(patch, 3)
        job.run(options(rows, tmp_path / "out", "nvfp4", **settings))
    assert 1 <= max(sizes) <= 3
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


@pytest.mark.parametrize("name", ["run_block", "record"])
def test_a_resumed_run_may_have_less_memory_than_the_one_before(rows, tmp_path, monkeypatch, name):
    """The hidden states on disk are in batches of five; what goes on with it can only run two rows."""
    settings = {"calib_samples": 7, "calib_seqlen": 400}
    job.run(options(rows, tmp_path / "calm", "nvfp4", **settings))
    real = Journal.finish

    def stop(self: Journal, part: str, *arguments: Any) -> None:
        real(self, part, *arguments)
        if part == "model.layers.1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", stop)
        job.run(options(rows, tmp_path / "out", "nvfp4", **settings))
    sizes = limit_batch(monkeypatch, 2, name)
    job.run(options(rows, tmp_path / "out", "nvfp4", **settings))
    assert max(sizes) == 2
    assert hashes(tmp_path / "out") == hashes(tmp_path / "calm")


def test_memory_for_not_even_one_row(rows, tmp_path, monkeypatch):
    limit_batch(monkeypatch, 0)
    with pytest.raises(QuarkError) as caught:
        job.run(options(rows, tmp_path / "out", "nvfp4"))
    assert caught.value.code == 6
    assert "not enough GPU memory for one sequence of 64 tokens" in caught.value.what
    assert "--calib-seqlen" in caught.value.hint
    assert not (tmp_path / "out").exists()


# ---- events


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_events_tell_the_whole_story_in_order(rows, tmp_path, scheme):
    heard = Heard()
    job.run(options(rows, tmp_path / "out", scheme), heard)
    work = "calibrate+quantize" if scheme in CALIBRATED else "quantize"
    assert [e.name for e in heard if isinstance(e, Phase)] == ["resolve", "check", work, "finalize", "verify"]
    parts = [event for event in heard if isinstance(event, PartDone)]
    assert [(part.index, part.total) for part in parts] == [(index, 6) for index in range(1, 7)]
    assert [part.label for part in parts] == ["kept", scheme, scheme, scheme, scheme, "kept"]
    assert [part.error is not None for part in parts] == [False, True, True, True, True, False]
    assert parts[-1].eta == 0
    assert all(part.rss > 0 and part.gpu == 0 for part in parts)
    assert heard.warnings == []


def test_the_plan_is_shown_before_any_weight_is_read(rows, tmp_path, monkeypatch):
    order: list[str] = []
    real = Source.read_many
    monkeypatch.setattr(Source, "read_many", lambda self, names: order.append("read") or real(self, names))
    job.run(options(rows, tmp_path / "out", "mxfp4"), planned=lambda prepared: order.append(prepared.recipe.name))
    assert order[0] == "mxfp4"
    assert order.count("mxfp4") == 1


def test_warnings_are_told_once_and_are_in_the_report(rows, tmp_path):
    heard = Heard()
    given = options(rows, tmp_path / "out", "mxfp4", calib_seqlen=64, overrides=Overrides(layers=["*q_proj=fp8"]))
    given.calib_data, given.calib_samples, given.allow_short = rows, 5000, True
    given.target = "none"  # q apart from k and v is refused otherwise
    report = job.run(given, heard)
    assert len(heard.warnings) == len(set(heard.warnings)) >= 2
    assert report["warnings"] == heard.warnings
    assert any("5000 wanted" in text for text in heard.warnings)
    assert sum("that servers multiply together have more than one scheme" in text for text in heard.warnings) == 1


# ---- the way of a GPU, on a CPU


def test_reading_ahead_and_writing_behind_give_the_same_files(rows, tmp_path, monkeypatch, made):
    """`cpu:0` is not `cpu`: parts go there and back through the buffers of a device."""
    monkeypatch.setattr(devices, "device", lambda asked: "cpu:0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (10**12, 10**12))
    for scheme in ("mxfp4", "nvfp4"):
        job.run(options(rows, tmp_path / scheme, scheme))
        assert hashes(tmp_path / scheme) == hashes(made[scheme, "compressed-tensors"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_is_what_is_done(made, rows, tmp_path, scheme):
    prepared = job.prepare(options(rows, tmp_path / "out", scheme))
    report = read(made[scheme, "compressed-tensors"], "quark/report.json")
    assert prepared.dialect.name == "compressed-tensors"
    assert prepared.forecast.output_bytes == report["size"]["output_bytes"]
    assert prepared.plan.kept == report["kept"]
    assert all(isinstance(target.weight, TensorSpec) for target in prepared.plan.quantized())
    assert bool(prepared.needs) == (scheme in CALIBRATED)
    assert not (tmp_path / "out").exists()
