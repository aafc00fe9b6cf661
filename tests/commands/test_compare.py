"""Comparisons: one contract for all arms, honest parts, results that survive a kill, refusals before any work."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim3d.caching.cache import open_cache
from mim3d.cli import main
from mim3d.commands.compare import compare
from mim3d.commands.report import report
from mim3d.core.errors import CheckpointError, ConfigError, DataError, Mim3dError
from mim3d.core.files import lock_file, try_lock
from mim3d.workflows.compare.cells import Cell, read_result
from mim3d.workflows.compare.plan import cells_of, read_plan
from mim3d.workflows.compare.running import _outcome_of
from mim3d.workflows.compare.running import planned as make_plan
from mim3d.workflows.compare.settings import CompareSettings
from tests.commands.conftest import BACKBONE, TASK
from tests.labelled import write_ball_set

SMALL_MIM = {"name": "MiM", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
RECIPE = {
    "task": TASK,
    "precision": "32-true",
    "intensity": {"kind": "zscore"},
    "batch_size": 1,
    "num_workers": 0,
    "validate_every": 1,
    "log_every": 1,
}


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": str(data),
        "arms": ("scratch", "MiM"),
        "labels": ("50%", "100%"),
        "folds": (0,),
        "num_folds": 3,
        "seeds": (0,),
        "backbone": BACKBONE,
        "finetune": RECIPE,
        "pretrain": {"method": SMALL_MIM, "num_workers": 0, "log_every": 1},
        "finetune_steps": 2,
        "pretrain_steps": 2,
        "num_bootstrap": 200,
        **changes,
    }


@pytest.fixture(scope="module")
def compared(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    compare(str(out), **settings(ball_set))
    return out


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def planned(out: Path) -> list[Cell]:
    return cells_of(read_plan(out), CompareSettings(str(out)))


def names_in(path: str) -> set[str]:
    return set(Path(path).read_text().split())


def test_a_comparison_ends_in_one_row_for_each_arm_and_amount(compared: Path):
    found = content(compared)
    assert [(row["arm"], row["labels"], row["num_done"]) for row in found["rows"]] == [
        ("scratch", "50%", 1),
        ("MiM", "50%", 1),
        ("scratch", "100%", 1),
        ("MiM", "100%", 1),
    ]
    assert not found["misses"] and all(row["mean"] is not None for row in found["rows"])
    assert {row["arm"] for row in found["probes"]} == {"MiM"}
    for name in ("comparison.csv", "comparison.md", "comparison.tex", "report.html"):
        assert "MiM" in (compared / name).read_text()


def test_finished_cells_keep_their_networks_and_no_checkpoints(compared: Path):
    for cell in planned(compared):
        network = {"finetune": "segmenter", "pretrain": "encoder"}.get(cell.kind)
        assert network is None or (compared / "runs" / cell.id / network / "model.safetensors").is_file()
    assert not list(compared.glob("runs/*/checkpoints"))


def test_tested_patients_are_seen_by_nothing_and_labels_are_nested(compared: Path):
    cells = planned(compared)
    tested = {line.split(",")[0] for line in (compared / "lists" / "fold0_tested.csv").read_text().splitlines()[1:]}
    (pretraining,) = [cell for cell in cells if cell.kind == "pretrain"]
    digests = {scan.case.id: scan.source_digest for scan in open_cache(compared / "cache")}
    seen = json.loads((compared / "runs" / pretraining.id / "seen.json").read_text())["scans"]
    assert tested <= names_in(pretraining.settings.held_out_list)
    assert seen and not {row["digest"] for row in seen} & {digests[name] for name in tested}
    parts = {
        (cell.labels, name): names_in(getattr(cell.settings, name))
        for cell in cells
        if cell.kind == "finetune"
        for name in ("train_list", "held_out_list")
    }
    for name in ("train_list", "held_out_list"):
        assert parts["50%", name] <= parts["100%", name]
        assert not parts["100%", name] & tested
    assert not parts["100%", "train_list"] & parts["100%", "held_out_list"]
    # What chooses checkpoints is not pre-trained on either.
    assert parts["100%", "held_out_list"] <= names_in(pretraining.settings.held_out_list)


def test_arms_share_all_of_fine_tuning_but_what_they_begin_with(compared: Path):
    cells = [cell for cell in planned(compared) if cell.kind == "finetune" and cell.labels == "100%"]
    one, other = (json.loads(json.dumps(cell.to_row()["settings"])) for cell in cells)
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {"out", "weights", "backbone"} and one["schedule"] == "default"


def test_a_schedule_that_is_asked_for_is_that_of_all_arms_with_weights(ball_set: Path, tmp_path: Path):
    changes: dict[str, Any] = {"labels": ("100%",), "finetune": {**RECIPE, "schedule": "sawtooth"}}
    compare(str(tmp_path / "compared"), **settings(ball_set, **changes), dry_run=True)
    cells = [cell for cell in planned(tmp_path / "compared") if cell.kind == "finetune"]
    settings_of: dict[str, Any] = {cell.arm: cell.settings for cell in cells}
    assert settings_of["scratch"].schedule == "default" and settings_of["MiM"].schedule == "sawtooth"


def test_a_pre_training_whose_run_is_gone_is_made_anew_for_the_cells_that_need_it(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(compared, tmp_path / "copy")
    (pretraining,) = [cell for cell in planned(copy) if cell.kind == "pretrain"]
    shutil.rmtree(copy / "runs" / pretraining.id)
    compare(str(copy), dry_run=True)
    assert f"{pretraining.id}: done" in capsys.readouterr().out
    (lost,) = (copy / "cells").glob("finetune_MiM_fold0_50pct*.json")
    before = json.loads(lost.read_text())
    lost.unlink()
    shutil.rmtree(copy / "runs" / lost.stem)
    compare(str(copy), dry_run=True)
    assert f"{pretraining.id}: to do" in capsys.readouterr().out
    compare(str(copy))
    assert not content(copy)["misses"]
    assert json.loads(lost.read_text())["cases"] == before["cases"]


def test_a_budget_of_pre_training_without_any_is_said(ball_set: Path, tmp_path: Path):
    compare(
        str(tmp_path / "out"),
        **settings(ball_set, arms=("scratch", {"name": "wider", "backbone": {**BACKBONE, "widths": [8, 24]}})),
        dry_run=True,
    )
    assert "pretrain_steps is passed over: no arm is pre-trained here." in read_plan(tmp_path / "out")["notes"]


def test_a_difference_beside_weights_stands_in_every_table(compared: Path, tmp_path: Path):
    copy = shutil.copytree(compared, tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))
    note = "The schedule of fine-tuning differs between arms (default: scratch; sawtooth: MiM)."
    assert note not in content(copy)["notes"]
    for path in (copy / "cells").glob("finetune_MiM*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "schedule": "sawtooth"}))
    plan = json.loads((copy / "plan.json").read_text())
    assert not [each for each in content(copy)["notes"] if "another network" in each]
    plan["arms"][1]["backbone"] = "vit"
    (copy / "plan.json").write_text(json.dumps(plan))
    compare(str(copy), table_only=True)
    network = "MiM has another network (vit) than scratch (hybrid): their difference is not that of pre-training alone."
    assert {note, network} <= set(content(copy)["notes"])
    for name in ("comparison.md", "comparison.tex", "report.html"):
        assert note in (copy / name).read_text() and network in (copy / name).read_text()


def test_running_again_runs_nothing_and_makes_the_same_table(compared: Path):
    before = content(compared)
    times = {path: path.stat().st_mtime_ns for path in (compared / "cells").glob("*.json")}
    compare(str(compared))
    assert {path: path.stat().st_mtime_ns for path in (compared / "cells").glob("*.json")} == times
    assert content(compared) == before


def test_a_version_that_names_cells_otherwise_keeps_their_results(compared: Path, monkeypatch: pytest.MonkeyPatch):
    names = [cell.id for cell in planned(compared)]
    monkeypatch.setattr("mim3d.workflows.compare.cells._DIGITS", 12)
    compare(str(compared))
    assert [cell.id for cell in planned(compared)] == names
    compare(str(compared), split_seed=1, slurm=True)
    assert not {cell.id for cell in planned(compared)} & {name for name in names if "finetune" in name}
    monkeypatch.undo()
    compare(str(compared), split_seed=0)
    assert [cell.id for cell in planned(compared)] == names


def test_a_plan_that_names_code_is_refused(compared: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy, ignore=shutil.ignore_patterns("runs", "cache"))
    plan = json.loads((copy / "plan.json").read_text())
    plan["cells"][0]["settings"]["task"] = "somebody.elses.Task"
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"names the task 'somebody\.elses\.Task', which the settings do not"):
        compare(str(copy), cell=plan["cells"][0]["id"])


def test_the_table_is_made_anew_from_results_alone(compared: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy, ignore=shutil.ignore_patterns("runs", "cache", "comparison.*"))
    compare(str(copy), table_only=True, reference="MiM")
    rows = {(row["arm"], row["labels"]): row for row in content(copy)["rows"]}
    before = {(row["arm"], row["labels"]): row for row in content(compared)["rows"]}
    assert rows["scratch", "50%"]["mean"] == before["scratch", "50%"]["mean"]
    assert rows["scratch", "50%"]["difference"] == pytest.approx(-before["MiM", "50%"]["difference"])
    page = report([str(copy)], str(tmp_path / "page.html"))
    assert "Wilcoxon" in Path(page).read_text()


def test_a_failed_cell_is_a_miss_and_stops_no_other(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy, ignore=shutil.ignore_patterns("cells"))
    cells = {(cell.kind, cell.arm, cell.labels): cell for cell in planned(copy)}
    broken = cells["finetune", "scratch", "50%"]
    plan = json.loads((copy / "plan.json").read_text())
    for row in plan["cells"]:
        if row["id"] == broken.id:
            row["settings"]["train_list"] = str(tmp_path / "nowhere.txt")
    (copy / "plan.json").write_text(json.dumps(plan))
    assert main(["compare", "--out", str(copy), "--cell", broken.id]) == 2
    result = read_result(copy, broken)
    assert result is not None and "nowhere.txt" in result["reason"]
    other = cells["pretrain", "MiM", ""]
    assert main(["compare", "--out", str(copy), "--cell", cells["finetune", "MiM", "50%"].id]) == 2
    assert f"needs the run of {other.id}, which is not there" in capsys.readouterr().err
    compare(str(copy), table_only=True)
    found = {row["cell"]: row["reason"] for row in content(copy)["misses"]}
    assert "nowhere.txt" in found[broken.id] and found[other.id] == "not run yet"


def test_a_comparison_that_was_killed_goes_on_to_the_same_table(ball_set: Path, compared: Path, tmp_path: Path):
    out = tmp_path / "killed"
    config = tmp_path / "compare.yaml"
    given = json.loads(json.dumps(settings(ball_set)))
    config.write_text(yaml.safe_dump(given))
    words = [sys.executable, "-m", "mim3d", "compare", "--out", str(out), "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end and not list(out.glob("cells/finetune_MiM*.log")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    compare(str(out))
    assert content(out)["rows"] == content(compared)["rows"]


def test_cells_run_in_processes_of_their_own(compared: Path, capsys: pytest.CaptureFixture[str]):
    before = content(compared)
    cell = next(cell for cell in planned(compared) if (cell.kind, cell.arm) == ("finetune", "scratch"))
    (compared / "cells" / f"{cell.id}.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
        compare(str(compared), jobs=2)
    assert f"done (1 of 1): {cell.id}" in capsys.readouterr().out
    assert content(compared)["rows"] == before["rows"]


@pytest.mark.parametrize(
    ("code", "outcome"), [(75, "stopped"), (-15, "stopped"), (-9, "failed"), (1, "failed"), (0, "busy")]
)
def test_a_process_that_ends_without_a_result_is_a_miss_unless_it_was_asked_to_stop(
    compared: Path, tmp_path: Path, code: int, outcome: str
):
    cell = planned(compared)[0]
    assert _outcome_of(tmp_path, cell, code) == outcome
    result = read_result(tmp_path, cell)
    assert (result is not None) == (outcome == "failed")


def test_cells_of_a_pre_training_that_another_process_works_on_are_left_to_it(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = copied(compared, tmp_path)
    (pretraining,) = [cell for cell in planned(copy) if cell.kind == "pretrain"]
    (copy / "cells").mkdir()
    asked: list[str] = []

    class Child:
        returncode = 0

        def __init__(self, words: list[str], **_: Any) -> None:
            asked.append(words[-1])

        def __class_getitem__(cls, _: type) -> type:
            return cls

        def poll(self) -> int:
            return 0

        terminate = wait = poll

    monkeypatch.setattr("mim3d.workflows.compare.running.subprocess.Popen", Child)
    compare(str(copy), jobs=2)
    assert pretraining.id in asked and not [name for name in asked if "MiM" in name and name != pretraining.id]
    assert not list((copy / "cells").glob("*.json"))


def test_what_another_process_finished_meanwhile_is_counted(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy)
    path = next(copy.glob("cells/finetune_scratch*.json"))
    kept = path.read_text()
    path.unlink()

    def elsewhere(*_: Any) -> str:
        path.write_text(kept)
        return "busy"

    monkeypatch.setattr("mim3d.workflows.compare.running.run_cell", elsewhere)
    compare(str(copy))
    total = len(planned(copy))
    assert f"{total} of {total} cells done\n" in (told := capsys.readouterr().out) and "left; go on" not in told


def test_cells_that_another_process_goes_by_are_not_taken_from_its_plan(compared: Path, tmp_path: Path):
    copy = copied(compared, tmp_path)
    (copy / "cells").mkdir()
    plan, cell = (copy / "plan.json").read_bytes(), planned(copy)[0]
    fewer = CompareSettings(str(copy), **settings(Path(read_plan(copy)["data"]), labels=("100%",)))
    with lock_file(copy / "cells" / f"{cell.id}.lock") as descriptor:
        assert try_lock(descriptor)
        with pytest.raises(ConfigError, match=rf"^Another process works on cell {cell.id} of {copy}, by a plan with"):
            make_plan(fewer)
        assert (copy / "plan.json").read_bytes() == plan
        more = CompareSettings(str(copy), **settings(Path(read_plan(copy)["data"]), seeds=(0, 1)))
        assert len(make_plan(more).cells) > len(planned(compared))
        (copy / "plan.json").write_bytes(plan)
    assert len(make_plan(fewer).cells) < len(planned(compared))


def copied(compared: Path, tmp_path: Path) -> Path:
    """The folder of a comparison without results and runs, somewhere else."""
    copy = tmp_path / "copy of it"
    shutil.copytree(compared, copy, ignore=shutil.ignore_patterns("cells", "runs"))
    return copy


def test_a_folder_that_was_moved_keeps_to_itself(compared: Path, tmp_path: Path):
    copy = copied(compared, tmp_path)
    for cell in planned(copy):
        settings = cell.settings
        paths = [settings.out, settings.data, getattr(settings, "train_list", None), settings.held_out_list, cell.test]
        paths += [settings.weights] if cell.needs else []
        assert all(path.startswith(f"{copy}/") for path in paths if path), paths
        assert Path(settings.out).parts[len(copy.parts) :][:2] == ("runs", cell.id)
    plan = json.loads((copy / "plan.json").read_text())
    plan["cells"][0]["settings"]["out"] = str(tmp_path / "elsewhere")
    (copy / "plan.json").write_text(json.dumps(plan))
    first = planned(copy)[0]
    assert first.settings.out == str(copy / "runs" / first.id)


def test_a_run_goes_on_after_its_folder_was_moved(compared: Path, tmp_path: Path):
    """Its lists of cases lie elsewhere then, with the content of before."""
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy)
    for cell in [next(cell for cell in planned(copy) if cell.kind == kind) for kind in ("pretrain", "finetune")]:
        (copy / "cells" / f"{cell.id}.json").unlink()
    compare(str(copy))
    found = content(copy)
    assert not found["misses"] and found["rows"] == content(compared)["rows"]


def test_a_damaged_result_is_as_none(compared: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy, ignore=shutil.ignore_patterns("runs", "cache", "comparison.*"))
    cell = next(cell for cell in planned(copy) if cell.kind == "finetune")
    path = copy / "cells" / f"{cell.id}.json"
    kept = path.read_text()
    assert read_result(copy, cell)
    for damage in DAMAGES:
        path.write_text(damage(kept))
        assert read_result(copy, cell) is None, path.read_text()[:200]
    compare(str(copy), table_only=True, num_bootstrap=0)
    found = content(copy)
    assert [(miss["cell"], miss["reason"]) for miss in found["misses"]] == [(cell.id, "not run yet")]
    assert [row["num_done"] for row in found["rows"]] == [0, 1, 1, 1]


DAMAGES: tuple[Callable[[str], str], ...] = (
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: json.dumps({**json.loads(text), "cases": None}),
    lambda text: json.dumps({**json.loads(text), "cases": [{"id": "ball_0"}]}),
    lambda text: json.dumps({**json.loads(text), "validation": [[1, "high"]]}),
    lambda text: json.dumps({**json.loads(text), "task": "other"}),
    lambda text: re.sub(r'"dice": [0-9.e-]+', '"dice": NaN', text),
)


def test_scripts_of_slurm_run_every_cell_once_from_any_folder_name(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By bash itself, with a program in place of srun that writes down what it was asked for."""
    copy = copied(compared, tmp_path)
    compare(str(copy), slurm=True)
    assert f"mim3d compare --out '{copy}' --table_only true" in capsys.readouterr().out
    programs, said = tmp_path / "bin", tmp_path / "said"
    programs.mkdir()
    (programs / "srun").write_text(f'#!/bin/bash\nprintf "%s|" "$@" >> "{said}"\necho >> "{said}"\n')
    (programs / "srun").chmod(0o755)
    for name in ("pretraining", "cells"):
        script = copy / f"{name}.sbatch"
        last = int(re.search(r"--array=0-(\d+)", script.read_text())[1])
        assert "copy\\ of\\ it/cells/%x" in script.read_text()
        for task in range(last + 1):
            environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
            subprocess.run(["bash", str(script)], env=environment, check=True)
    cells = sorted(planned(copy), key=lambda cell: cell.kind != "pretrain")
    lines = [line.split("|")[:-1] for line in said.read_text().splitlines()]
    assert lines == [["mim3d", "compare", "--out", str(copy), "--cell", cell.id] for cell in cells]


def test_a_dry_run_measures_and_trains_no_cell(ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "dry"
    other = {"name": "other", "backbone": {**BACKBONE, "widths": [8, 24]}}
    compare(str(out), **settings(ball_set, arms=("scratch", other)), dry_run=True)
    said = capsys.readouterr().out
    assert said.count("to do, about") == 4 and "measured on 8 steps" in said and "4 cells, about" in said
    assert not (out / "runs").exists()


def test_minutes_become_steps_once(ball_set: Path, tmp_path: Path):
    out = tmp_path / "minutes"
    given = settings(ball_set, arms=("scratch", {"name": "again", "backbone": {**BACKBONE, "widths": [8, 24]}}))
    del given["finetune_steps"]
    compare(str(out), **given, finetune_minutes=0.02, dry_run=True)
    steps = {cell.arm: cell.settings.max_steps for cell in planned(out)}
    compare(str(out), dry_run=True)
    assert {cell.arm: cell.settings.max_steps for cell in planned(out)} == steps
    assert all(steps.values())


def test_slurm_scripts_have_one_command_for_each_cell(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "copy"
    shutil.copytree(compared, copy, ignore=shutil.ignore_patterns("cells"))
    compare(str(copy), slurm=True)
    said = capsys.readouterr().out
    for cell in planned(copy):
        assert said.count(f"--cell {cell.id}") == 1
    assert "\n#SBATCH --array=0-0\n" in said and "afterany:$first" in said and not list((copy / "cells").glob("*.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("scratch",)}, "arms has 1 of the at least two"),
        ({"arms": ("scratch", "MiN")}, "arm 'MiN' is no method.*Did you mean 'MiM'"),
        ({"arms": ("MiM", {"name": "same", "method": "MiM"})}, "'MiM' and 'same' are the same"),
        ({"arms": ("scratch", "scratch")}, "Two arms are called 'scratch'"),
        ({"arms": ("scratch", {"method": "MiM", "weights": "/nowhere"})}, "a method and weights"),
        ({"arms": ("scratch", {"metod": "MiM"})}, "no key 'metod'.*'method'"),
        (
            {"labels": ("10%",)},
            "labels 10%: 0 of the 4 patients besides those tested in fold 0, where at least 2 .*; ask for 50% to 100%",
        ),
        ({"labels": ("9",)}, "labels 9: fold 0 has 4 patients besides those tested; ask for 50% to 100%, or 2 to 4"),
        ({"labels": ("50%", "2")}, "are both 2 of the 4 patients"),
        ({"labels": ("half",)}, "labels has 'half'"),
        ({"arms": ({"name": "\u202ea", "method": "MiM"}, {"name": "\u202ea"})}, r"Two arms are called '\\u202ea'"),
        ({"num_bootstrap": 50}, "num_bootstrap is 50, which makes no interval"),
        ({"target_dice": 85.0}, "target_dice is 85; it is a share"),
        ({"folds": (3,)}, "folds has 3, but there are the folds 0, 1, 2"),
        ({"seeds": (1, 1)}, "seeds names the same twice"),
        ({"seeds": (0, -1)}, "seeds has -1; it must be zero or more"),
        ({"finetune_minutes": 1.0}, "finetune_steps.*finetune_minutes"),
        ({"pretrain_steps": None}, "budget of pre-training is open"),
        ({"finetune": {**RECIPE, "seed": 1}}, "finetune.seed is for the comparison itself"),
        ({"finetune": {**RECIPE, "bach_size": 1}}, "finetune has no setting 'bach_size'.*batch_size"),
        ({"finetune": "nowhere.yaml"}, "nowhere.yaml, which is no file"),
        ({"arms": ("scratch", {"name": "wide", "backbone": {**BACKBONE, "widths": [8, 15]}})}, "wide"),
        ({"accelerator": "cuda"}, "cuda"),
        ({"reference": "MAE"}, "there is no arm 'MAE'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    ball_set: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(Mim3dError, match=message):
        compare(str(tmp_path / "refused"), **settings(ball_set, **changes))
    assert not (tmp_path / "refused" / "runs").exists()


def test_a_folder_of_another_data_set_is_refused(compared: Path, tmp_path: Path):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in compared.rglob("*") if path.is_file()}

    before = files()
    other = write_ball_set(tmp_path / "others", num_cases=7)
    with pytest.raises(ConfigError, match="holds a comparison on other scans or labels"):
        compare(str(compared), data=str(other))
    assert files() == before


def test_a_folder_with_other_work_is_refused(segmenter_run: Path, ball_set: Path):
    with pytest.raises(ConfigError, match="holds no comparison, but other work"):
        compare(str(segmenter_run), **settings(ball_set))


def test_a_folder_with_other_files_is_refused_before_anything_is_written(ball_set: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(ball_set, data)
    before = sorted(path.name for path in data.iterdir())
    with pytest.raises(ConfigError, match=r"^/.*/data is not empty and holds no comparison \(dataset.json is there\)"):
        compare(str(data), **settings(data))
    assert sorted(path.name for path in data.iterdir()) == before


def test_weights_that_learned_from_tested_scans_are_refused(segmenter_run: Path, ball_set: Path, tmp_path: Path):
    with pytest.raises(
        DataError,
        match=r"^arm pre, fold 0: [^.]*in the pre-training data of .*, so leave the arm out, or [^.;(]*\.$",
    ):
        compare(
            str(tmp_path / "leaking"),
            **settings(ball_set, arms=("scratch", {"name": "pre", "weights": str(segmenter_run)})),
        )


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_an_arm_that_lacks_memory_is_refused_with_flags_of_the_comparison(ball_set: Path, tmp_path: Path, kind: str):
    given = settings(ball_set)
    given[kind] = {**given[kind], "batch_size": 4096, "memory_limit": 2.0}
    flags = rf"use --{kind}\.batch_size \d+ --{kind}\.accumulation \d+, which needs about [0-9.]+ .iB\.$"
    with pytest.raises(ConfigError, match=rf"^arm \w+: Training needs about .*{flags}"):
        make_plan(CompareSettings(str(tmp_path / "out"), **given).with_recipes())


def test_a_damaged_list_of_scans_is_refused_with_its_arm(segmenter_run: Path, ball_set: Path, tmp_path: Path):
    copy = tmp_path / "pretrained"
    shutil.copytree(segmenter_run, copy)
    for path in copy.rglob("seen.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^arm pre: {copy}/.*seen\.json cannot be read as a list of scans"):
        compare(str(tmp_path / "out"), **settings(ball_set, arms=("scratch", {"name": "pre", "weights": str(copy)})))
