"""Quantized checkpoints as sources: the same bytes as from their 16-bit form, and nothing of their own is left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import dialects
from quarkcli.cli import main, planview, summary
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError, QuarkError
from quarkcli.evaluation.run import evaluate
from quarkcli.family import without_quantization
from quarkcli.recipe import catalog
from tests import runs
from tests.consumers.loading import decompress
from tests.products import each_once

READ = [writer.name for writer in dialects.writers() if writer.reader is not None]
ROWS = {"calib_samples": 8, "calib_seqlen": 64}
JOBS: dict[str, dict[str, Any]] = {
    "nvfp4": {"scheme": "nvfp4", **ROWS},
    "gptq": {"scheme": "int4_wo_128", "algorithm": "gptq", **ROWS},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Sources:
    """Quantized sources and their 16-bit forms, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = str(runs.text_file(folder / "rows.txt"))
        self.made: dict[tuple[str, ...], Path] = {}

    def model(self, name: str) -> str:
        folder = self.folder / name
        if name != "demo" and not folder.exists():
            runs.build(name, folder)
        return name if name == "demo" else str(folder)

    def of(self, model: str, scheme: str, dialect: str, **options: Any) -> Path:
        key = model, scheme, dialect, *map(str, options.items())
        if key not in self.made:
            output = self.folder / f"source-{len(self.made)}"
            self.made[key] = runs.run(
                self.model(model), output, scheme=scheme, dialect=dialect, calib_data=self.text, **ROWS, **options
            ).folder
        return self.made[key]

    def held(self, dialect: str) -> Path:
        """A source in the first scheme that a dialect holds, of the first model."""
        for model, exclude in (("demo", []), ("gpt_oss", []), ("gpt_oss", ["*self_attn*"])):
            for scheme in catalog.files("schemes"):
                try:
                    return self.of(model, scheme, dialect, exclude=exclude)
                except QuarkError:
                    continue
        raise AssertionError(f"{dialect} holds no scheme")

    def plain(self, source: Path) -> Path:
        """The same model in 16 bits: every tensor as it is decoded."""
        folder = source.with_name(f"{source.name}-plain")
        if not folder.exists():
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "quark", "quantization*"))
            config = json.loads((source / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(without_quantization(config)))
            checkpoint = Checkpoint(Source.open(str(source)))
            save_file(checkpoint.read_many(checkpoint.headers), folder / "model.safetensors")
        return folder

    def job(self, source: Path, output: Path, **options: Any) -> runs.Made:
        return runs.run(source, output, calib_data=self.text, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def unordered(value: Any) -> Any:
    """The same with lists sorted: files may hold the same tensors in another order."""
    if isinstance(value, dict):
        return {key: unordered(item) for key, item in value.items()}
    return sorted(map(str, value)) if isinstance(value, list) else value


@pytest.mark.parametrize(("dialect", "job"), each_once(READ, list(JOBS)))
def test_the_bytes_are_those_of_the_decoded_model(sources, tmp_path, dialect, job):
    source = sources.held(dialect)
    made = sources.job(source, tmp_path / "out", **JOBS[job])
    plain = sources.job(sources.plain(source), tmp_path / "plain", **JOBS[job])
    assert runs.same_files(made.folder, plain.folder)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made.folder, plain.folder)]
    assert unordered(configs[0]) == unordered(configs[1])
    assert plain.prepared.origin is None
    assert made.report["source"]["tensors"] > len(made.report["source"]["weights"]) > 0


@pytest.mark.parametrize(("model", "scheme"), [("qwen3_moe", "fp8"), (runs.FUSED, "int4_wo_128"), ("gpt_oss", "mxfp4")])
def test_experts(sources, tmp_path, model, scheme):
    source = sources.of(model, scheme, "compressed-tensors")
    made = sources.job(source, tmp_path / "out", **JOBS["nvfp4"])
    plain = sources.job(sources.plain(source), tmp_path / "plain", **JOBS["nvfp4"])
    assert runs.same_files(made.folder, plain.folder)
    experts = [target for target in made.prepared.plan.quantized() if target.expert is not None]
    assert len(experts) == 2 * 4 * 3


@pytest.mark.parametrize(
    ("model", "leaf"),
    [("qwen3_moe", "0.gate_proj.weight"), ("gpt_oss", "gate_up_proj"), (runs.FUSED, "0.up_proj.weight")],
)
def test_decoded_experts_have_the_form_of_published_files(sources, tmp_path, model, leaf):
    source = sources.of(model, "mxfp4", "compressed-tensors")
    made = sources.job(
        source, tmp_path / "out", scheme="int4_wo_128", algorithm="smoothquant,rtn", exclude=["*.experts.*"], **ROWS
    )
    assert len(made.report["source"]["decoded"]) == 2 * 4 * 3
    assert f"model.layers.0.mlp.experts.{leaf}" in runs.read_all(made.folder)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block128", "int4_wo_128", "uint4_wo_128", "int8", "mxfp4", "nvfp4"])
def test_values_are_those_of_the_library_that_made_the_format(sources, scheme):
    """In the model's dtype, bit for bit."""
    source = sources.of("demo", scheme, "compressed-tensors")
    checkpoint = Checkpoint(Source.open(str(source)))
    wanted = decompress(source, runs.read_all(source))
    assert len(wanted) == 28
    for name, values in wanted.items():
        found = checkpoint.read_many([f"{name}.weight"])[f"{name}.weight"]
        assert runs.same_bytes(found, values.to(torch.bfloat16)), name


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize("model", ["demo", "gpt_oss"])
def test_mxfp4_becomes_nvfp4_with_every_value(sources, tmp_path, model, algorithm):
    source = sources.of(model, "mxfp4", "compressed-tensors")
    made = sources.job(source, tmp_path / "out", **JOBS["nvfp4"], algorithm=algorithm)
    ours, theirs = (Checkpoint(Source.open(str(folder))) for folder in (made.folder, source))
    names = [target.name for target in made.prepared.plan.quantized()]
    assert made.report["exact"] == dict.fromkeys(names, 0)
    for name in names:
        assert torch.equal(ours.weight(name), theirs.weight(name)), name
    assert made.report["loss"]["mean_weight_error"] == 0
    assert f"{len(names)} of {len(names)} weights keep every value: they are codes times powers of two" in "".join(
        summary.lines({"": made.report}, [])
    )


def test_a_killed_run_goes_on(sources, tmp_path):
    source, out = sources.held(READ[0]), tmp_path / "out"
    runs.killed(3, lambda: sources.job(source, out, **JOBS["gptq"], resume="auto"))
    gone_on = sources.job(source, out, **JOBS["gptq"], resume="require")
    assert runs.same_files(gone_on.folder, sources.job(source, tmp_path / "calm", **JOBS["gptq"]).folder)


def test_a_source_that_changed_is_not_gone_on_with(sources, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources.held(READ[0]), source)
    runs.killed(3, lambda: sources.job(source, out, scheme="mxfp4", resume="auto"))
    file = next(path for path in sorted(source.glob("*.safetensors")) if "block" in path.name)
    save_file(load_file(file), file)  # the same codes at another time
    with pytest.raises(QuarkError, match="changed"):
        sources.job(source, out, scheme="mxfp4", resume="require")


@pytest.mark.parametrize("dialect", READ)
def test_every_tensor_of_a_weight_is_needed(sources, tmp_path, dialect):
    whole = sources.held(dialect)
    stored = next(iter(Checkpoint(Source.open(str(whole))).view.targets.values()))
    for tensor in stored.tensors:
        source = tmp_path / tensor
        shutil.copytree(whole, source)
        (source / "model.safetensors.index.json").unlink()
        for file in source.glob("*.safetensors"):
            save_file({name: value for name, value in load_file(file).items() if name != tensor}, file)
        checkpoint = opened(source)
        if checkpoint is not None and stored.name in checkpoint.view.targets:  # one that says nothing, such as an order
            assert torch.equal(checkpoint.weight(stored.name), Checkpoint(Source.open(str(whole))).weight(stored.name))
            continue
        with pytest.raises(ModelError) as refused:
            runs.prepare(source, scheme="mxfp4")
        module = stored.name.rpartition(".experts.")[0] if stored.places else stored.name
        assert module in str(refused.value), tensor


def opened(source: Path) -> Checkpoint | None:
    """The checkpoint, None where its reader refuses it."""
    try:
        return Checkpoint(Source.open(str(source)))
    except ModelError:
        return None


def change(source: Path, to: Path, config: Any = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy with another quantization_config, or with other tensors of the first block."""
    shutil.copytree(source, to)
    text = json.loads((to / "config.json").read_text())
    text["quantization_config"] = config if config is not None else text["quantization_config"]
    (to / "config.json").write_text(json.dumps(text))
    (to / "model.safetensors.index.json").unlink()
    file = to / "model-block-00000.safetensors"
    save_file(load_file(file) | (tensors or {}), file)
    return to


def refused(source: Path) -> str:
    with pytest.raises(ModelError) as error:
        runs.prepare(source, scheme="mxfp4")
    assert error.value.code == 4
    return f"{error.value}; {error.value.hint}"


def test_what_is_not_read_is_refused_by_name(sources, tmp_path):
    text = refused(change(sources.held(READ[0]), tmp_path / "source", {"quant_method": "bitsandbytes"}))
    assert "which quark cannot read" in text
    assert all(reader.name in text for reader in dialects.readers())


def test_a_config_without_codes_is_refused(sources, tmp_path):
    source = sources.held(READ[0])
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    (plain := tmp_path / "plain").mkdir()
    shutil.copytree(sources.plain(source), plain, dirs_exist_ok=True)
    text = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**text, "quantization_config": config}))
    assert "its config says that it is quantized, but no tensor in its files is" in refused(plain)


def test_scales_that_no_config_speaks_of_are_refused(sources, tmp_path):
    extra = {f"{Q_PROJ.rpartition('.')[0]}.k_scale": torch.ones(1)}
    text = refused(change(sources.held(READ[0]), tmp_path / "source", None, extra))
    assert f"{next(iter(extra))}: the quantization config does not mention this tensor" in text


def test_turned_weights_are_refused(sources, tmp_path):
    source = sources.of("demo", "int4_wo_128", "compressed-tensors", algorithm="hadamard,rtn")
    assert "rotated together with their inputs" in refused(source)


def test_a_quantized_cache_is_dropped(sources, tmp_path):
    source = sources.of("demo", "fp8", "compressed-tensors", kv_cache="fp8")
    made = sources.job(source, tmp_path / "out", scheme="int4_wo_128")
    assert not [name for name in runs.read_all(made.folder) if re.search(r"[kv]_scale|input_scale", name)]
    assert json.loads((made.folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None
    assert made.report["source"]["dropped"] == {
        "its quantization of inputs and outputs": 28,
        "static scales of that": 28,
        "its scales of attention and the KV cache": 8,
    }


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "qronos"])
def test_weights_that_are_left_alone_keep_their_codes(sources, tmp_path, algorithm):
    """Where the target dialect can say it: a mixed checkpoint, with which calibration goes on as it is served."""
    source = sources.of("demo", "int8_dynamic", "compressed-tensors")
    job = {"scheme": "int4_wo_128", "exclude": ["*self_attn*"], "algorithm": algorithm, **ROWS}
    made = sources.job(source, tmp_path / "out", **job)
    assert "of its weights are not changed and keep their codes and scales" in "\n".join(planview.header(made.prepared))
    facts = planview.as_json(made.prepared)["source"]
    assert len(facts["carried"]) == 16 and not facts["decoded"]
    ours, theirs = runs.read_all(made.folder), runs.read_all(source)
    same = [name for name in theirs if ".self_attn." in name]
    assert len(same) == 32
    assert all(runs.same_bytes(ours[name], theirs[name]) for name in same)
    inputs = [Checkpoint(Source.open(str(f))).view.targets[Q_PROJ].input for f in (made.folder, source)]
    assert inputs[0] is not None and inputs[0] == inputs[1]
    assert main.main(["verify", str(made.folder), "--source", str(source)]) == 0
    resolved = made.folder / "quark" / "recipe.yaml"
    again = sources.job(source, tmp_path / "again", recipe=str(resolved))
    assert runs.same_files(again.folder, made.folder)


@pytest.mark.parametrize(("scheme", "algorithm"), [("fp8", "rtn"), ("fp8", "gptq"), ("int8", "rtn"), ("nvfp4", "gptq")])
@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
def test_static_scales_of_inputs_go_with_the_codes(sources, tmp_path, dialect, scheme, algorithm):
    """No data is asked for on their account, and calibration goes on with inputs as they are served."""
    source = sources.of("demo", scheme, dialect)
    job = {"scheme": "int4_wo_128", "exclude": ["*self_attn*"], "algorithm": algorithm, **ROWS}
    made = sources.job(source, tmp_path / "out", dialect=dialect, **job)
    assert (made.prepared.calibration is not None) == (algorithm == "gptq")
    facts = made.report["source"]
    assert len(facts["carried"]) == 16 and sum(facts["dropped"].values()) == 12 * 2  # those of the MLPs
    ours, theirs = runs.read_all(made.folder), runs.read_all(source)
    same = [name for name in theirs if ".self_attn." in name]
    assert len([name for name in same if "input" in name.rpartition(".")[2] and "zero_point" not in name]) == 16
    assert all(runs.same_bytes(ours[name], theirs[name]) for name in same)
    views = [Checkpoint(Source.open(str(folder))).view.targets for folder in (made.folder, source)]
    assert views[0][Q_PROJ].input == views[1][Q_PROJ].input is not None
    assert main.main(["verify", str(made.folder), "--source", str(source)]) == 0


def test_static_scales_of_inputs_that_the_dialect_cannot_say_are_dropped_and_the_plan_says_so(sources, tmp_path):
    source = sources.of("demo", "mxfp4_fp8", "quark")
    made = sources.job(source, tmp_path / "out", scheme="int4_wo_128", exclude=["*self_attn*"],
                       dialect="compressed-tensors")  # fmt: skip
    facts = made.report["source"]
    assert len(facts["carried"]) == 16 and facts["dropped"]["static scales of that"] == 28
    (line,) = [line for line in facts["said"] if "lose the static scales" in line]
    assert line.startswith("16 of these") and "vLLM would not load" in line
    assert not [name for name in runs.read_all(made.folder) if "input_scale" in name]


def test_some_keep_their_codes_where_a_server_would_not_load_others(sources, tmp_path):
    """Tiles of k and v end within the fused module, that of o does not."""
    source = sources.of("demo", "fp8_block128", "compressed-tensors")
    made = sources.job(source, tmp_path / "out", scheme="int4_wo_128", exclude=["*self_attn*"])
    facts = made.report["source"]
    assert facts["carried"] == [f"model.layers.{index}.self_attn.o_proj" for index in range(4)]
    assert len(facts["decoded"]) == 12
    assert "keep their codes" in facts["said"][1] and "BF16: with them vLLM would not" in facts["said"][2]
    assert main.main(["verify", str(made.folder), "--source", str(source)]) == 0


def test_experts_that_are_left_alone_keep_their_codes(sources, tmp_path):
    source = sources.of("qwen3_moe", "mxfp4", "compressed-tensors")
    made = sources.job(source, tmp_path / "out", scheme="nvfp4_weight_only", exclude=["*.experts.*"])
    assert len(made.report["source"]["carried"]) == 2 * 4 * 3
    assert made.prepared.dialect_reason == "auto: loads in vLLM and transformers"
    ours, theirs = (Checkpoint(Source.open(str(folder))) for folder in (made.folder, source))
    for name in ours.headers:
        if ".experts." in name:
            tensors = (side.read_many([name])[name] for side in (ours, theirs))
            assert runs.same_bytes(*tensors), name


def test_experts_that_no_server_loads_one_by_one_are_decoded_and_the_plan_says_so(sources, tmp_path):
    source = sources.of("gpt_oss", "mxfp4", "compressed-tensors")
    made = sources.job(source, tmp_path / "out", scheme="nvfp4_weight_only", exclude=["*.experts.*"])
    facts = made.report["source"]
    assert facts["carried"] == []
    assert len(facts["decoded"]) == 2 * 4 * 3
    assert "vLLM would not load" in "\n".join(facts["said"])


@pytest.mark.parametrize(
    ("held", "job", "why"),
    [
        (("amdfp4", "quark"), {"dialect": "compressed-tensors"}, "cannot hold weight"),
        (("mxfp6_e2m3", "compressed-tensors"), {}, "vLLM would not load"),
        (("uint4_wo_128", "compressed-tensors"), {"target": "transformers"}, "does not load"),
        (("int8_dynamic", "compressed-tensors"), {"algorithm": "smoothquant,rtn"}, "an algorithm may change weights"),
    ],
)
def test_weights_that_are_left_alone_are_written_decoded_and_the_plan_says_so(sources, tmp_path, held, job, why):
    source = sources.of("demo", *held)
    made = sources.job(source, tmp_path / "out", scheme="int4_wo_128", exclude=["*self_attn*"], **ROWS, **job)
    lines = "\n".join(planview.header(made.prepared))
    assert re.search(f"16 of its weights are not quantized again and are written as BF16: .*({why})", lines)
    facts = planview.as_json(made.prepared)["source"]
    assert Q_PROJ in facts["decoded"]
    assert len(facts["decoded"]) == 16 and not facts["carried"]
    decoded = Checkpoint(Source.open(str(source))).read_many([f"{Q_PROJ}.weight"])
    written = runs.read_all(made.folder)
    assert f"{Q_PROJ}.weight_scale" not in written
    if "smoothquant" not in job.get("algorithm", ""):
        assert runs.same_bytes(written[f"{Q_PROJ}.weight"], decoded[f"{Q_PROJ}.weight"])


def test_other_keys_of_the_config_stay(sources, tmp_path):
    source = change(sources.held(READ[0]), tmp_path / "source")
    text = json.loads((source / "config.json").read_text())
    old = text.pop("quantization_config")
    text |= {"compression_config": old, "mine": {"a": [1]}}
    (source / "config.json").write_text(json.dumps(text))
    made = sources.job(source, tmp_path / "out", scheme="mxfp4")
    written = json.loads((made.folder / "config.json").read_text())
    assert {key: value for key, value in written.items() if key != "quantization_config"} == {
        key: value for key, value in text.items() if key != "compression_config"
    }
    assert written["quantization_config"] != old


def test_it_is_a_baseline_and_a_source_to_verify_against(sources, tmp_path, capsys):
    source = sources.held(READ[0])
    made = sources.job(source, tmp_path / "out", **JOBS["nvfp4"])
    found = evaluate(str(made.folder), baseline=str(source), max_tokens=600, device="cpu", tell=lambda event: None)
    assert 0 < found["kl"] < 0.2
    assert main.main(["verify", str(made.folder), "--source", str(source)]) == 0
    assert "tensors of the original model are there" in capsys.readouterr().out


def test_plan_and_search_take_it(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(sources.held(READ[0]))
    assert main.main(["plan", "--model", source, "--scheme", "mxfp4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["source"]
    assert sum(shown["weights"].values()) == 28
    assert main.main(["inspect", source]) == 0
    assert "decoded layer by layer" in capsys.readouterr().out
    flags = ["--schemes", "mxfp4,fp8", "--budget", "6", "--calib-data", sources.text, "--calib-samples", "4"]
    assert main.main(["search", "--model", source, *flags, "--calib-seqlen", "64", "-o", "mixed.yaml"]) == 0
    assert Path("mixed.yaml").exists()
