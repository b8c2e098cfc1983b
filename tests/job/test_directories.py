"""Several dialects from one run: each directory as a run of its own makes it, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quarkcli
from quarkcli.disk import outputs
from quarkcli.disk.origin import open_weights
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError, ModelError, QuarkError, ResourceError, UsageError
from quarkcli.job import directories
from quarkcli.job.solving import Solving
from tests import runs
from tests.forks import Forks, at

# What tells the time, or holds the hash of a file that does.
_OF_THE_RUN = {"quark/report.json", "quark/report.html", "quark/quark.log", "quark/manifest.json"}
CT = "compressed-tensors"
SCHEMES = ("mxfp4", "fp8", "nvfp4", "int4_wo_128", "uint4_wo_128")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt")


@pytest.fixture
def quark(forks: Forks) -> Forks:
    return forks


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint that two runs make alike."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(found) >= _OF_THE_RUN
    return {name: path.read_bytes() for name, path in found.items() if name not in _OF_THE_RUN}


def differing(one: Path, other: Path) -> list[str]:
    ours, theirs = contents(one), contents(other)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def able(scheme: str) -> list[str]:
    """The dialects that hold a scheme: those that a run of each alone takes."""
    from quarkcli import dialects

    found = []
    for writer in dialects.writers():
        try:
            runs.prepare("demo", scheme=scheme, dialect=writer.name, calib_data="builtin")
        except ConfigError:
            continue
        found.append(writer.name)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_directory_is_what_its_dialect_alone_writes(scheme: str, text: Path, tmp_path: Path) -> None:
    """Rounding to nearest does not ask what earlier blocks decode to; ranges of inputs do, and come out the same."""
    names = able(scheme)
    assert len(names) > 1
    more = runs.data(text, 4) if scheme in runs.CALIBRATED else {}
    made = runs.run("demo", tmp_path / "all", scheme=scheme, dialect=",".join(names), **more)
    assert sorted(path.name for path in made.folder.iterdir()) == sorted([*names, outputs.LIST])
    assert set(made.report["dialects"]) == set(names)
    apart = [
        one.dialect.name for one in made.prepared.others if any("differ in their last bit" in w for w in one.warnings)
    ]
    for name in names:
        alone = runs.run("demo", tmp_path / name, scheme=scheme, dialect=name, **more)
        found = differing(alone.folder, made.folder / name)
        if name in apart:  # blocks behind see values that are a differ in their last bit off
            assert all(file.startswith("model-block-") for file in found), found
        else:
            assert not found
        own = made.report["dialects"][name]
        assert own["dialect"] == alone.report["dialect"]
        assert own["size"] == alone.report["size"]
    assert (scheme == "nvfp4") == bool(apart)


def test_the_second_dialect_costs_no_second_solve(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quarkcli.forward.walk import Walk

    calls: list[str] = []

    def counted(cls: type[Any], name: str) -> None:
        whole = getattr(cls, name)

        def once(self: Any, *given: Any, **named: Any) -> Any:
            calls.append(name)
            return whole(self, *given, **named)

        monkeypatch.setattr(cls, name, once)

    counted(Walk, "observe")
    counted(Walk, "advance")

    def solved(self: Any, *given: Any) -> Iterator[Any]:
        for row in original(self, *given):
            calls.append("solved")
            yield row

    original = Solving.solved
    monkeypatch.setattr(Solving, "solved", solved)
    how = {"scheme": "int4_wo_128", "algorithm": "gptq", **runs.data(text, 4)}
    counts = []
    for dialect in ("gptq", "gptq,quark,compressed-tensors"):
        calls.clear()
        runs.run("demo", tmp_path / dialect, dialect=dialect, **how)
        counts.append({name: calls.count(name) for name in ("observe", "advance", "solved")})
    assert counts[0] == counts[1]
    assert counts[0]["solved"] == 28 and counts[0]["observe"] >= 4
    assert not differing(tmp_path / "gptq", tmp_path / "gptq,quark,compressed-tensors" / "gptq")


def test_the_order_of_the_names_changes_nothing(text: Path, tmp_path: Path) -> None:
    """The walk goes on with what one of them decodes to: that which `auto` would take, whatever comes first."""
    how = {"scheme": "nvfp4", "algorithm": "gptq", **runs.data(text, 4)}
    one = runs.run("demo", tmp_path / "one", dialect=f"quark,{CT},modelopt", **how)
    other = runs.run("demo", tmp_path / "other", dialect=f" modelopt, quark,{CT.replace('-', '_')}", **how)
    names = [made.dialect.name for made in one.prepared.every]
    assert names == [made.dialect.name for made in other.prepared.every]
    for name in names:
        assert not differing(one.folder / name, other.folder / name)
    alone = runs.run("demo", tmp_path / "alone", dialect=names[0], **how)
    assert not differing(alone.folder, one.folder / names[0])
    said = [
        warning for warning in one.report["dialects"][names[1]]["warnings"] if "differ in their last bit" in warning
    ]
    assert said == [warning for warning in said if f"those of {names[0]}, with" in warning] and len(said) == 1
    assert not [w for w in one.report["dialects"][names[0]]["warnings"] if "differ in their last bit" in w]


@pytest.mark.parametrize(
    ("dialect", "words", "kind"),
    [
        (f"{CT},awq", "format awq cannot hold this plan: ", ConfigError),
        (f"auto,{CT}", "auto stands for one checkpoint format", UsageError),
        (f"{CT},compressed_tensors", f"checkpoint format {CT} is named twice", UsageError),
        (f"{CT},", "unknown checkpoint format ''", UsageError),
        (f"{CT},nothing", "unknown checkpoint format 'nothing'", UsageError),
    ],
)
def test_a_list_that_is_wrong_is_refused_before_the_work(
    dialect: str, words: str, kind: type[QuarkError], tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        runs.run("demo", tmp_path / "out", scheme="mxfp4", dialect=dialect)
    assert words in caught.value.what and caught.value.where == "--dialect"
    assert not list(tmp_path.iterdir())


def test_servers_and_devices_are_asked_of_each_dialect(text: Path) -> None:
    how: dict[str, Any] = {"scheme": "nvfp4", **runs.data(text, 4)}
    with pytest.raises(ModelError, match=r"format modelopt: transformers [0-9.]+ does not load it"):
        runs.prepare("demo", dialect=f"{CT},modelopt", target="transformers", **how)
    with pytest.raises(ModelError, match=r"format (gptq|compressed-tensors): "):
        runs.prepare("demo", scheme="int4_wo_128", dialect=f"{CT},gptq", tp=64)
    assert [one.dialect.name for one in runs.prepare("demo", dialect=f"modelopt,{CT}", target="vllm", **how).every]


def test_the_disk_must_hold_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"scheme": "mxfp4", "dialect": f"{CT},quark"}
    prepared = runs.prepare("demo", **how)
    sizes = [one.forecast.output_bytes for one in prepared.every]
    assert directories.together(prepared).disk_bytes == sum(sizes)
    assert directories.together(prepared).memory_bytes > prepared.forecast.memory_bytes
    monkeypatch.setattr("quarkcli.job.preflight.free_bytes", lambda path: sum(sizes) - 1)
    with pytest.raises(ResourceError, match=f"{sum(sizes):,} bytes needed"):
        runs.run("demo", tmp_path / "out", **how)
    monkeypatch.setattr("quarkcli.job.preflight.free_bytes", lambda path: sum(sizes))
    made = runs.run("demo", tmp_path / "out", **how)
    written = [sum(path.stat().st_size for path in (made.folder / n).glob("*.safetensors")) for n in (CT, "quark")]
    assert written == sizes


def test_codes_that_one_dialect_keeps_and_another_cannot_are_two_plans(tmp_path: Path) -> None:
    """Weights of a quantized source that the plan leaves alone: a mixed checkpoint in one, decoded in the other."""
    source = runs.run("demo", tmp_path / "source", scheme="ptpc_fp8", dialect=CT).folder
    how: dict[str, Any] = {"scheme": "int4_wo_128", "exclude": ["*down_proj"]}
    assert open_weights(Source.open(str(source)))[1] is not None
    kept = {name: len(runs.prepare(source, dialect=name, **how).plan.carried) for name in (CT, "gptq")}
    assert kept[CT] and not kept["gptq"]
    with pytest.raises(ConfigError, match="these need two plans") as caught:
        runs.prepare(source, dialect=f"{CT},gptq", **how)
    assert "down_proj" in caught.value.where


def test_lists_in_recipes_and_from_python(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    both = [CT, "quark"]
    for said in (f"[{CT}, quark]", f'"{CT},quark"'):
        recipe.write_text(f"schema: quark/recipe/1\nquantize: {{scheme: mxfp4}}\nexport: {{dialect: {said}}}\n")
        assert [one.dialect.name for one in runs.prepare("demo", recipe=str(recipe)).every] == both
    report = quarkcli.quantize("demo", "mxfp4", output=tmp_path / "out", dialect=both, device="cpu")
    assert list(report["dialects"]) == both
    alone = quarkcli.quantize("demo", "mxfp4", output=tmp_path / "one", dialect=["quark"], device="cpu")
    assert alone["dialect"]["name"] == "quark" and (tmp_path / "one" / "config.json").is_file()
    plan = quarkcli.make_plan("demo", "mxfp4")
    again = quarkcli.quantize(plan, output=tmp_path / "again", dialect=both, device="cpu")
    assert list(again["dialects"]) == both


# ---- kills and outputs that exist

JOB = ("quantize", "--model", "demo", "--scheme", "mxfp4", "-o", "out")
BOTH = ("--dialect", f"{CT},quark")
FINISH = "quarkcli.disk.journal.Journal.finish"
_KILLS = {
    "between the files of a part in two dialects": at("quarkcli.job.pipeline.write_part", call=4),
    "behind a part": at(FINISH, call=3, after=True),
    "between two descriptions": at("quarkcli.job.finish.write_config", call=2),
    "between two manifests": at("quarkcli.job.finish.write_manifest", call=2),
    "before the list": at("quarkcli.job.directories.list_them"),
    "before the state is put aside": at("quarkcli.disk.journal.Journal.set_aside"),
    "before the renaming": at("quarkcli.job.finish.publish"),
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("calm")
    return {
        name: contents(runs.run("demo", folder / name, scheme="mxfp4", dialect=name).folder) for name in (CT, "quark")
    }


@pytest.mark.parametrize("kill", _KILLS)
def test_a_killed_run_goes_on_with_the_same_bytes_in_all(
    quark: Forks, calm: dict[str, dict[str, bytes]], tmp_path: Path, kill: str
) -> None:
    answer = quark(*JOB, *BOTH, cwd=tmp_path, hook=_KILLS[kill])
    assert answer.code == -9, answer.err
    assert not (tmp_path / "out").exists()
    answer = quark(*JOB, *BOTH, cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert "resuming: " in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CT, "quark", outputs.LIST}
    for name, expected in calm.items():
        assert contents(tmp_path / "out" / name) == expected
        assert quark("verify", f"out/{name}", cwd=tmp_path).code == 0


def test_other_dialects_are_another_run(quark: Forks, tmp_path: Path) -> None:
    quark(*JOB, *BOTH, cwd=tmp_path, hook=at(FINISH, call=2))
    for dialect in (CT, "quark"):
        answer = quark(*JOB, "--dialect", dialect, cwd=tmp_path)
        assert answer.code == 3, dialect
        assert "recipe.export.dialect" in answer.err
    assert quark(*JOB, "--dialect", f"quark,{CT}", cwd=tmp_path).code == 0  # the order is no difference


def test_a_calibrated_run_goes_on_from_hidden_states(text: Path, tmp_path: Path) -> None:
    """With the weights of the one dialect that later blocks are calibrated behind, and its count of the others'."""
    how = {"scheme": "nvfp4", "algorithm": "gptq", "dialect": f"quark,{CT}", **runs.data(text, 4)}
    calm = runs.run("demo", tmp_path / "calm", **how)
    runs.killed(3, lambda: runs.run("demo", tmp_path / "out", **how))
    made = runs.run("demo", tmp_path / "out", **{**how, "resume": "require"})
    for one in made.prepared.every:
        assert not differing(calm.folder / one.folder, made.folder / one.folder)
        ours, theirs = (run.report["dialects"][one.folder]["warnings"] for run in (made, calm))
        assert [line for line in ours if "differ in their last bit" in line] == [
            line for line in theirs if "differ in their last bit" in line
        ]


@pytest.mark.slow
def test_every_sync_and_rename_may_be_the_last(quark: Forks, calm: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """Each child goes on where the last one was killed, and is killed itself two durable steps later."""
    for step in range(1, 200, 2):
        answer = quark(*JOB, *BOTH, cwd=tmp_path, hook=at("os.fsync", "os.replace", "os.rename", call=step))
        if answer.code != -9:
            break
    assert step > 40 and answer.code in (0, 2), answer.err
    for name, expected in calm.items():
        assert contents(tmp_path / "out" / name) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_is_replaced_whole_whatever_it_was(quark: Forks, tmp_path: Path) -> None:
    """One checkpoint by several, several by one, and what somebody put beside them stays."""
    for flags in (("--dialect", CT), BOTH, ("--dialect", "quark"), BOTH, BOTH):
        answer = quark(*JOB, *flags, "--overwrite", cwd=tmp_path)
        assert answer.code == 0, answer.err
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert quark(*JOB, *BOTH, cwd=tmp_path).code == 2
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (tmp_path / "out" / "quark" / "notes.txt").write_text("mine")
    assert quark(*JOB, *BOTH, "--overwrite", cwd=tmp_path).code == 0
    (old,) = tmp_path.glob("out.old-*")
    left = {path.relative_to(old).as_posix() for path in old.rglob("*") if path.is_file()}
    assert left == {"thesis.tex", "quark/notes.txt"}


def test_a_kill_while_outputs_change_places_loses_nothing(
    quark: Forks, calm: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    assert quark(*JOB, *BOTH, cwd=tmp_path).code == 0
    for call, target in ((3, "pathlib.Path.rename"), (1, "quarkcli.disk.manifest.remove_ours")):
        answer = quark(*JOB, *BOTH, "--overwrite", cwd=tmp_path, hook=at(target, call=call))
        assert answer.code == -9
        answer = quark(*JOB, *BOTH, "--overwrite", cwd=tmp_path)
        assert answer.code == 0, answer.err
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name, expected in calm.items():
        assert contents(tmp_path / "out" / name) == expected


def test_a_folder_of_checkpoints_that_no_run_made_together_is_not_ours(quark: Forks, tmp_path: Path) -> None:
    """A user's folder of models, replaced: they are moved aside, never removed."""
    (tmp_path / "out").mkdir()
    one = runs.run("demo", tmp_path / "out" / "mine", scheme="mxfp4")
    before = contents(one.folder)
    assert quark(*JOB, *BOTH, cwd=tmp_path).code == 2
    assert quark(*JOB, *BOTH, "--overwrite", cwd=tmp_path).code == 0
    (old,) = tmp_path.glob("out.old-*")
    assert contents(old / "mine") == before


def test_what_is_printed(quark: Forks, tmp_path: Path) -> None:
    plan = quark("plan", *JOB[1:], *BOTH, "--json", cwd=tmp_path)
    rows = json.loads(plan.out)["directories"]
    assert [row["path"] for row in rows] == [f"out/{CT}", "out/quark"]
    answer = quark(*JOB, *BOTH, cwd=tmp_path)
    assert answer.out.split() == [f"out/{CT}", "out/quark"]
    assert "vllm serve out/quark" in answer.err and f"vllm serve out/{CT}" in answer.err
    again = quark(*JOB, *BOTH, "--overwrite", "--json", cwd=tmp_path)
    reports = json.loads(again.out)
    assert reports["schema"] == directories.SCHEMA and set(reports["dialects"]) == {CT, "quark"}
    above = quark("verify", "out", cwd=tmp_path)
    assert above.code == 8 and "give one of its checkpoints" in above.err
    assert "give one of its checkpoints" in quark("report", "out", cwd=tmp_path).err
    refused = quark("search", "--model", "demo", "--schemes", "mxfp4,mxfp8", "--budget", "6", *BOTH, "-o", "r.yaml",
                    "--calib-data", "builtin", "--calib-samples", "2", cwd=tmp_path)  # fmt: skip
    assert refused.code == 2 and "of one checkpoint format" in refused.err


@pytest.mark.parametrize("names", [None, 3, "a", ["../up", "/abs", "..", "", "a/b", 3, "a\0"]])
def test_a_list_that_somebody_changed_leads_nowhere(names: Any, tmp_path: Path) -> None:
    (tmp_path / outputs.LIST).write_text(json.dumps({"schema": outputs.SCHEMA, "dialects": names}))
    assert outputs.listed(tmp_path) == []
    assert outputs.checkpoints(tmp_path) == []
