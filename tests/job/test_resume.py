"""Killed jobs: the same command goes on, and what it writes has the bytes of a run that nobody killed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quarkcli.disk.embedded import EMBEDDED
from tests.forks import Done, Forks, at
from tests.products import slow_unless
from tests.reports import lasting

CALIBRATION = ("--calib-data", "rows.txt", "--calib-samples", "8", "--calib-seqlen", "64")
COMMANDS: dict[str, tuple[str, ...]] = {
    "nvfp4": ("--scheme", "nvfp4", *CALIBRATION),
    "gptq": ("--scheme", "int4_wo_128", "--algorithm", "gptq", *CALIBRATION),
    "mxfp4": ("--scheme", "mxfp4"),
}
FINISH, SAVE = "quarkcli.disk.journal.Journal.finish", "quarkcli.disk.writer._save"
# Where a run is killed, and what the next one says.
KILLS: dict[str, tuple[dict[str, Any], str]] = {
    "before anything is written": (at(FINISH), ""),
    "behind the first part's journal entry": (
        at(FINISH, after=True), "1 of 6 parts of the model are done; continuing at model"
    ),
    "behind the third part's journal entry": (at(FINISH, call=3, after=True), "3 of 6 parts of the model are done"),
    "in the middle of writing a part": (at("quarkcli.disk.writer.sync_folder", call=6), "parts of the model are done"),
    "before a shard has its name": (at("quarkcli.job.pipeline.write_part", call=4), "3 of 6 parts of the model"),
    "with a shard that no entry names": (at("quarkcli.job.pipeline.write_part", call=4, after=True), "3 of 6 parts"),
    "behind the last part": (
        at(FINISH, call=6, after=True), "6 of 6 parts of the model are done; continuing with the final steps"
    ),
    "before the config": (at("quarkcli.job.finish.write_config"), "continuing with the final steps"),
    "in the middle of the side files": (at("shutil.copyfile", call=2), "continuing with the final steps"),
    "behind the config": (at("quarkcli.job.finish.write_config", after=True), "continuing with the final steps"),
    "before the report": (at("quarkcli.reporting.build.build"), "continuing with the final steps"),
    "before the manifest": (at("quarkcli.job.finish.write_manifest"), "continuing with the final steps"),
    "behind the manifest": (at("quarkcli.job.finish.write_manifest", after=True), "continuing with the final steps"),
    "before the state is put aside": (at("quarkcli.disk.journal.Journal.set_aside"), "continuing with the final steps"),
    "before the renaming": (at("quarkcli.job.finish.publish"), "continuing with the final steps"),
}  # fmt: skip


# Those of the normal run: before the first part, between two, behind the last, at the very end.
OFTEN = {
    "before anything is written",
    "in the middle of writing a part",
    "with a shard that no entry names",
    "before the config",
    "before the renaming",
}


@pytest.fixture(scope="module")
def quark(forks: Forks) -> Forks:
    return forks


@pytest.fixture(scope="module")
def calm(quark: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Hashes of the weight files of runs that nobody disturbed, and what their reports say."""
    folder = tmp_path_factory.mktemp("calm")
    fill(folder)
    for name, flags in COMMANDS.items():
        assert quark("quantize", "--model", "demo", *flags, "-o", name, "-q", cwd=folder).code == 0
    reports = {f"report of {name}": lasting(folder / name) for name in COMMANDS}
    return {name: hashes(folder / name) for name in COMMANDS} | reports


@pytest.fixture
def work(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


def fill(folder: Path) -> None:
    """Calibration text, and a model to change."""
    words = ["the", "value", "of", "return", "is", "a", "class", "that", "prints", "module", "names", "all"]
    lines = (" ".join(words[(row * 7 + i * i) % len(words)] for i in range(20)) for row in range(120))
    (folder / "rows.txt").write_text("\n".join(lines))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def run(quark: Forks, folder: Path, name: str, *more: str, **options: Any) -> Done:
    return quark("quantize", "--model", "demo", *COMMANDS[name], "-o", "out", *more, cwd=folder, **options)


def names(folder: Path) -> set[str]:
    """What a user sees in the directory."""
    return {path.name for path in folder.iterdir() if path.name != "rows.txt"}


def check_finished(folder: Path, expected: dict[str, str], output: str = "out") -> None:
    """The output has the expected weights, a true manifest, and nothing is left of the work."""
    assert hashes(folder / output) == expected
    manifest = json.loads((folder / output / "quark" / "manifest.json").read_text())["files"]
    for file, digest in manifest.items():
        assert hashlib.sha256((folder / output / file).read_bytes()).hexdigest() == digest, file
    present = {p.relative_to(folder / output).as_posix() for p in (folder / output).rglob("*") if p.is_file()}
    assert present == {*manifest, "quark/manifest.json", "quark/quark.log"}
    assert not [name for name in names(folder) if name.startswith(f"{output}.")]


def check_killed(answer: Done, folder: Path) -> None:
    assert answer.code == -9, answer.err
    assert not (folder / "out").exists()
    assert (folder / "out.partial").is_dir()


# ---- kills


@pytest.mark.parametrize("kill", slow_unless(OFTEN, KILLS))
def test_a_killed_run_is_gone_on_with_and_ends_with_the_same_bytes(quark, calm, work, kill):
    hook, words = KILLS[kill]
    check_killed(run(quark, work, "mxfp4", hook=hook), work)
    answer = run(quark, work, "mxfp4")
    assert answer.code == 0, answer.err
    assert words in answer.err
    assert ("resuming:" in answer.err) == bool(words)
    check_finished(work, calm["mxfp4"])


@pytest.mark.parametrize("name", ["nvfp4", "gptq"])
def test_calibrated_runs_are_gone_on_with_from_hidden_states(quark, calm, work, name):
    """Killed three times: while hidden states are written, behind a part, and before the end."""
    check_killed(run(quark, work, name, hook=at("quarkcli.disk.journal.Journal.write_hidden", call=2)), work)
    second = run(quark, work, name, hook=at(FINISH, call=2, after=True))
    assert "resuming: 2 of 6 parts of the model are done; continuing at model.layers.1" in second.err
    check_killed(second, work)
    third = run(quark, work, name, "--calib-batch", "3", hook=at("quarkcli.job.finish.verify_and_report"))
    assert "resuming: 4 of 6 parts of the model are done; continuing at model.layers.3" in third.err
    check_killed(third, work)
    last = run(quark, work, name)
    assert last.code == 0, last.err
    assert "resuming: 6 of 6" in last.err
    check_finished(work, calm[name])
    assert lasting(work / "out") == calm[f"report of {name}"]


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_sync_and_rename_may_be_the_last(quark, calm, work, stride):
    """Each child goes on where the last one was killed, and is killed itself `stride` durable steps later."""
    for step in range(1, 80, stride):
        hook = at("os.fsync", "os.replace", "os.rename", call=step)
        answer = run(quark, work, "mxfp4", hook=hook)
        if answer.code != -9:
            break
    assert step > 25
    if stride == 1:  # the child before was killed with everything done but the sync behind the renaming
        assert answer.code == 2
        assert "out: exists: a finished checkpoint" in answer.err
    else:
        assert answer.code in (0, 2)
    assert hashes(work / "out") == calm["mxfp4"]
    assert not (work / "out.partial").exists()


def test_kills_from_outside_at_any_moment(quark, calm, work):
    codes = []
    for tries in range(20):  # the last gets a minute, which is enough on any machine
        answer = run(quark, work, "nvfp4", timeout=0.2 * 1.35**tries)
        codes.append(answer.code)
        if answer.code != -9:
            break
    assert len(codes) > 1
    assert answer.code == 0 or "out: exists: a finished checkpoint" in answer.err  # killed behind the renaming
    assert hashes(work / "out") == calm["nvfp4"]


def test_an_overwritten_output_stays_until_the_new_one_is_there(quark, calm, work):
    (work / "out").mkdir()
    (work / "out" / "thesis.tex").write_text("mine")
    answer = run(quark, work, "mxfp4", "--overwrite", hook=at("quarkcli.job.finish.publish"))
    assert answer.code == -9
    assert (work / "out" / "thesis.tex").read_text() == "mine"
    refused = run(quark, work, "mxfp4")
    assert refused.code == 2
    assert "--overwrite" in refused.err
    answer = run(quark, work, "mxfp4", "--overwrite")
    assert answer.code == 0, answer.err
    assert "resuming" in answer.err
    assert hashes(work / "out") == calm["mxfp4"]
    kept = next(work.glob("out.old-*"))
    assert (kept / "thesis.tex").read_text() == "mine"
    assert f"what was in out is now in {kept}" in answer.err


def test_a_kill_between_the_two_renamings_loses_nothing(quark, calm, work):
    assert run(quark, work, "mxfp4").code == 0
    answer = run(quark, work, "mxfp4", "--overwrite", hook=at("pathlib.Path.rename", call=3))
    assert answer.code == -9
    assert not (work / "out").exists()
    assert hashes(next(work.glob("out.old-*"))) == calm["mxfp4"]
    answer = run(quark, work, "mxfp4", "--overwrite")
    assert answer.code == 0
    assert "continuing with the final steps" in answer.err
    assert hashes(work / "out") == calm["mxfp4"]


def test_overwriting_a_finished_checkpoint_leaves_nothing_of_it(quark, calm, work):
    for _ in range(2):
        answer = run(quark, work, "mxfp4", "--overwrite")
        assert answer.code == 0
        assert "resuming" not in answer.err
    check_finished(work, calm["mxfp4"])


def test_a_replaced_output_that_a_kill_left_is_removed(quark, calm, work):
    """Killed with the new output in place and the old one still beside it."""
    for call, target in enumerate(
        ("quarkcli.disk.manifest.remove_ours", "quarkcli.disk.journal.Journal.discard_state")
    ):
        assert run(quark, work, "mxfp4", "--overwrite").code == 0
        answer = run(quark, work, "mxfp4", "--overwrite", hook=at(target))
        assert answer.code == -9
        assert hashes(work / "out") == calm["mxfp4"]
        assert len(list(work.glob("out.old-*"))) == 1 - call
        answer = run(quark, work, "mxfp4")
        assert answer.code == 2  # the output is there
        check_finished(work, calm["mxfp4"])


def test_what_a_user_added_to_a_checkpoint_is_kept(quark, calm, work):
    assert run(quark, work, "mxfp4").code == 0
    (work / "out" / "thesis.tex").write_text("mine")
    (work / "out" / "README.md").write_text("my card")
    answer = run(quark, work, "mxfp4", "--overwrite", "-q")
    assert answer.code == 0
    kept = next(work.glob("out.old-*"))
    assert {path.name: path.read_text() for path in kept.rglob("*") if path.is_file()} == {
        "thesis.tex": "mine", "README.md": "my card",
    }  # fmt: skip
    assert f"2 files in out differ from what quark wrote and are now in {kept}: README.md, thesis.tex" in answer.err
    answer = run(quark, work, "mxfp4", "--overwrite")
    assert answer.code == 0
    assert f"an earlier run moved {kept} aside" in answer.err
    assert (kept / "thesis.tex").is_file()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_shard_that_was_damaged_is_made_again(quark, calm, work, name):
    interrupted(quark, work, name)
    path = work / "out.partial" / "model-block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    answer = run(quark, work, name)
    assert answer.code == 0, answer.err
    assert "warning: 1 finished parts of the model are damaged or follow a damaged one" in answer.err
    check_finished(work, calm[name])
    assert "damaged" in (work / "out" / "quark" / "report.json").read_text()


def test_a_second_run_stops_before_the_work(quark, calm, work):
    """It hears of the first one before token rows are made, and leaves what that one does alone."""
    import fcntl

    (work / "out.partial" / ".quark-state").mkdir(parents=True)
    with (work / "out.partial" / ".quark-state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = run(quark, work, "nvfp4", hook=at("quarkcli.job.rows.token_rows"))
        assert answer.code == 6
        assert "is working here" in answer.err
    assert run(quark, work, "nvfp4").code == 0
    check_finished(work, calm["nvfp4"])


@pytest.mark.parametrize("name", ["out.partial", "out.partial.state"])
def test_a_link_is_no_place_to_work_in(quark, work, name):
    (work / "mine").mkdir()
    (work / "mine" / "thesis.tex").write_text("mine")
    (work / name).symlink_to("mine")
    for more in ((), ("--resume", "never"), ("--overwrite",)):
        answer = run(quark, work, "mxfp4", *more)
        assert answer.code == 2
        assert f"{name}: is a link" in answer.err
    assert (work / "mine" / "thesis.tex").read_text() == "mine"
    assert names(work) == {"mine", name}


def test_before_the_first_part_nothing_is_left(quark, work):
    for target in (
        "quarkcli.job.rows.token_rows",
        "quarkcli.job.run.fingerprint",
        "quarkcli.disk.journal.Journal.verify",
    ):
        answer = quark(
            "quantize",
            "--model",
            "demo",
            *COMMANDS["nvfp4"],
            "-o",
            "new/deep/out",
            cwd=work,
            hook=at(target, what="28"),
        )
        assert answer.code == 6, answer.err
        assert names(work) == set()


# ---- what may not change


def interrupted(quark: Forks, work: Path, name: str = "nvfp4", model: str = "demo") -> None:
    flags = ("quantize", "--model", model, *COMMANDS[name], "-o", "out")
    check_killed(quark(*flags, cwd=work, hook=at(FINISH, call=3, after=True)), work)


def check_refused(answer: Done, work: Path, key: str) -> None:
    """Exit 3, the key that differs with both values, and the unfinished run as it was."""
    assert answer.code == 3
    assert answer.out == ""
    error = answer.err[answer.err.index("error:") :]
    assert "the unfinished run there has other settings" in error
    line = next(line for line in error.splitlines() if line.strip().startswith(key))
    assert " -> " in line
    assert "hint: " in error
    assert "--resume never" in error
    assert "Traceback" not in error
    assert (work / "out.partial" / ".quark-state" / "journal.json").is_file()


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--seed", "1"), "data.seed: 0 -> 1"),
        (("--exclude", "*layers.3.mlp*"), "recipe.quantize.quant_cfg[13]"),
        (("--dialect", "quark"), 'recipe.export.dialect: "compressed-tensors" -> "quark"'),
        pytest.param(("--calib-samples", "7"), "recipe.calibration.samples: 8 -> 7", marks=pytest.mark.slow),
        pytest.param(("--moe-calibration", "all"), 'data.moe: "routed" -> "all"', marks=pytest.mark.slow),
    ],
)
def test_other_settings_are_refused_by_name(quark, calm, work, flags, key):
    interrupted(quark, work)
    check_refused(run(quark, work, "nvfp4", *flags), work, key)
    answer = run(quark, work, "nvfp4")
    assert answer.code == 0
    check_finished(work, calm["nvfp4"])


def test_other_rows_are_refused(quark, work):
    interrupted(quark, work)
    (work / "rows.txt").write_text("other words " * 2000)
    check_refused(run(quark, work, "nvfp4"), work, "data.digest: ")


@pytest.mark.parametrize("change", ["weights", "config", "time"])
def test_another_model_under_the_same_name_is_refused(quark, work, change):
    model = work / "model"
    shutil.copytree(EMBEDDED, model)
    interrupted(quark, work, "mxfp4", "model")
    weights = model / "model.safetensors"
    if change == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
        key = "model.config: "
    elif change == "weights":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        key = "model.files.model.safetensors.date: "
    else:
        weights.touch()
        key = "model.files.model.safetensors.date: "
    answer = quark("quantize", "--model", "model", *COMMANDS["mxfp4"], "-o", "out", cwd=work)
    check_refused(answer, work, key)


# ---- --resume


def test_resume_never_starts_again(quark, calm, work):
    interrupted(quark, work, "nvfp4")
    answer = run(quark, work, "mxfp4", "--resume", "never")  # other settings, too
    assert answer.code == 0, answer.err
    assert "resuming" not in answer.err
    check_finished(work, calm["mxfp4"])


def test_resume_require(quark, calm, work):
    answer = run(quark, work, "mxfp4", "--resume", "require")
    assert answer.code == 2
    assert "there is no unfinished run to resume" in answer.err
    assert names(work) == set()
    interrupted(quark, work, "mxfp4")
    answer = run(quark, work, "mxfp4", "--resume", "require")
    assert answer.code == 0
    assert "resuming: 3 of 6" in answer.err
    check_finished(work, calm["mxfp4"])


def test_a_partial_directory_that_is_not_ours_is_left_alone(quark, work):
    (work / "out.partial").mkdir()
    (work / "out.partial" / "thesis.tex").write_text("mine")
    answer = run(quark, work, "mxfp4")
    assert answer.code == 2
    assert "is not empty and not a run that can be continued" in answer.err
    assert (work / "out.partial" / "thesis.tex").read_text() == "mine"


def test_a_shard_that_was_lost_is_made_again(quark, calm, work):
    interrupted(quark, work, "mxfp4")
    (work / "out.partial" / "model-block-00001.safetensors").unlink()
    answer = run(quark, work, "mxfp4")
    assert answer.code == 0
    assert "resuming: 2 of 6" in answer.err
    check_finished(work, calm["mxfp4"])


def test_two_processes_do_not_share_an_output(quark, calm, work):
    interrupted(quark, work, "mxfp4")
    import fcntl

    with (work / "out.partial" / ".quark-state" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = run(quark, work, "mxfp4")
    assert answer.code == 6
    assert "is working here" in answer.err
    assert run(quark, work, "mxfp4").code == 0
    check_finished(work, calm["mxfp4"])


# ---- stopping on purpose


def test_a_time_budget_stops_after_a_part(quark, calm, work):
    for done in range(3):
        answer = run(quark, work, "nvfp4", "--time-budget", "1s", hook=at(FINISH, call=0, what="1.1"))
        assert answer.code == 75, answer.err
        assert answer.out == ""
        assert "stopped: the time budget is used up; finished work is kept\n" in answer.err
        assert "hint: run the same command again" in answer.err
        assert not (work / "out").exists()
        journal = json.loads((work / "out.partial" / ".quark-state" / "journal.json").read_text())
        assert len(journal["parts"]) == done + 1  # at least one, and no second one beyond the budget
    assert run(quark, work, "nvfp4").code == 0
    check_finished(work, calm["nvfp4"])


@pytest.mark.parametrize(("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_signals_end_in_order_and_can_be_gone_on_from(quark, calm, work, name, code, word):
    hook = at("quarkcli.job.part.PartWorker.work", call=4, what=name)
    answer = run(quark, work, "nvfp4", hook=hook)
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert f"stopped: {word}\nhint: run the same command again to continue" in answer.err
    assert "Traceback" not in answer.err
    assert not (work / "out").exists()
    assert not list((work / "out.partial").glob(".writing-*"))
    log = (work / "out.partial" / "quark" / "quark.log").read_text()
    assert "ended by" in log
    answer = run(quark, work, "nvfp4")
    assert answer.code == 0
    assert "resuming: 3 of 6" in answer.err
    check_finished(work, calm["nvfp4"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_work_leaves_nothing(quark, work, name):
    hook = at("quarkcli.job.run.open_source", what=name)
    answer = run(quark, work, "mxfp4", hook=hook)
    assert answer.code == (130 if name == "SIGINT" else 143)
    assert "resumable" not in answer.err
    assert names(work) == set()


# ---- the log


def test_the_log_tells_of_both_runs(quark, work):
    interrupted(quark, work, "mxfp4")
    assert run(quark, work, "mxfp4").code == 0
    log = (work / "out" / "quark" / "quark.log").read_text()
    assert log.count("phase: quantize\n") == 2
    assert "resuming: 3 of 6 parts of the model are done; continuing at model.layers.2" in log
    assert [log.count(f"[{index}/6]") for index in range(1, 7)] == [1, 1, 0, 1, 1, 1]  # killed before the third's line
