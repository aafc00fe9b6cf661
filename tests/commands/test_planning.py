"""Fine-tuning on a set that nobody described: what is planned, and whose word counts more than the plan's."""

import json
import math
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mim3d.backbones import create_recipe
from mim3d.cli import main
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run, read_run
from mim3d.core.settings import read_yaml, to_mapping, write_yaml
from mim3d.datasets.splits import Split, split_cases
from mim3d.planning.plan import FILLED_SHARE
from mim3d.scans.intensity import Intensity
from mim3d.tasks import create_task
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training import memory as engine_memory
from mim3d.workflows.finetune import planning
from mim3d.workflows.finetune.planning import (
    FINGERPRINT_NAME,
    PLAN_NAME,
    PlannedRun,
    describe_plan,
    plan_finetuning,
    read_plan,
    save_plan,
    training_memory,
)
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.initialisation import Initialisation
from mim3d.workflows.shared.inputs import read_data
from tests.commands.conftest import BACKBONE
from tests.labelled import ball_scan, write_scan
from tests.nifti import affine_of


def settings(**changes) -> FinetuneSettings:
    return FinetuneSettings("data", **{"out": "out", "num_workers": 0, "memory_limit": 0.0, **changes})


def plan(
    data: Path, run_dir: Path | None = None, card: dict | None = None, fold=0, backbone=None, **changes
) -> PlannedRun:
    source = read_data(str(data), keep_labels=True)
    whole = Split(train=tuple(source.cases), val=())
    split = whole if fold is None else split_cases(source.cases, fold=fold, num_folds=3)
    num_channels = len(split.train[0].images)
    recipe = create_recipe({**(backbone or BACKBONE), "in_channels": num_channels})
    asked = settings(out=str(run_dir or data.parent / "nowhere"), **changes)
    initial = Initialisation.of_card(recipe, None, card or {})
    return plan_finetuning(source, split, initial, asked, create_task(asked.task))


def write_set(folder: Path, shapes, *, spacings=None, scale=1.0, offset=0.0, num_channels=1) -> Path:
    """A CSV of ball scans; intensities are scaled and shifted, and as many channels are written as wanted."""
    rows = ["image,label"]
    for index, shape in enumerate(shapes):
        image, label = ball_scan(index, shape)
        affine = affine_of((1.0, 1.0, 1.2) if spacings is None else spacings[index])
        names = [f"{index}_{channel}.nii.gz" for channel in range(num_channels)]
        for name in names:
            write_scan(folder / name, (image * scale + offset).astype(np.float32), affine)
        write_scan(folder / f"{index}_label.nii.gz", label, affine)
        rows.append(f"{';'.join(names)},{index}_label.nii.gz")
    (folder / "set.csv").write_text("\n".join(rows))
    return folder / "set.csv"


def air_around(data: Path) -> None:
    """Make CT of a set: its outermost voxels become air."""
    for path in data.parent.glob("*_0.nii.gz"):
        stored = nibabel.load(path)
        image = np.asarray(stored.dataobj).copy()
        image[[0, -1]] = -1000
        nibabel.save(nibabel.Nifti1Image(image, stored.affine), path)


def test_mri_is_planned_and_filled_in_where_nothing_was_given(ball_set, capsys):
    planned = plan(ball_set, verbose=True)
    found = planned.plan
    assert found.spacing_mm is None and found.intensity == Intensity(kind="zscore", window=None)
    # Tokens of 4 around the median scan of 24 x 20 x 18 voxels, and nothing held out was looked into.
    assert found.patch_size == (28, 20, 20) or found.patch_size == (24, 20, 20)
    assert len(planned.fingerprint.scans) == 6 and len(planned.fingerprint.voxel_scans) == 4
    assert [facts.name for facts in planned.fingerprint.classes] == ["ball", "core"]
    filled = planned.settings
    assert filled.batch_size == found.batch_size == 2 and filled.max_steps == found.max_steps == 1000
    assert filled.intensity == found.intensity and filled.spacing_mm is None
    task = create_task(filled.task)
    assert task.patch_size == found.patch_size and task.positive_ratio == found.positive_ratio
    assert task.augmentation.flip_axes == (0, 1, 2)
    said = capsys.readouterr().out
    assert all(name in said for name in ("spacing_mm", "z-score", "patch_size", "covers the median scan", "max_steps"))
    assert "voxels of 4 to train on" in said


def test_ct_gets_a_window_from_its_labelled_voxels(tmp_path):
    data = write_set(tmp_path, [(22, 20, 18)] * 4, offset=-200.0)
    air_around(data)
    found = plan(data).plan
    # Balls at -20 and cores at 60 HU, with noise of 8 HU.
    assert found.intensity.kind == "window"
    low, high = found.intensity.window
    assert -200 <= low < -40 and 80 < high <= 250
    assert "CT in 2 of 2 scans" in found.reasons["intensity"] or "CT in 3 of 3 scans" in found.reasons["intensity"]


def test_several_channels_are_planned_together(tmp_path):
    planned = plan(write_set(tmp_path, [(22, 20, 18)] * 3, num_channels=2))
    assert len(planned.fingerprint.channels) == 2
    assert planned.plan.intensity.kind == "zscore"


def test_anisotropic_scans_are_turned_about_z_alone(tmp_path):
    data = write_set(tmp_path, [(22, 20, 12)] * 4, spacings=[(1.0, 1.0, z) for z in (4.0, 5.0, 5.0, 6.0)])
    found = plan(data).plan
    assert found.spacing_mm == (1.0, 1.0, 5.0)
    assert found.rotation_degrees == (0.0, 0.0, 15.0)
    assert "1 x 1 x 5 mm" in found.reasons["rotation_degrees"]


def test_a_stack_of_few_slices_gets_thin_patches(tmp_path):
    found = plan(write_set(tmp_path, [(64, 60, 5)] * 3, spacings=[(1.0, 1.0, 8.0)] * 3)).plan
    assert found.patch_size == (64, 60, 8)


def test_three_cases_are_enough(tmp_path):
    found = plan(write_set(tmp_path, [(22, 20, 18)] * 3)).plan
    assert found.batch_size == 2 and found.max_steps == 1000


def test_scans_smaller_than_a_token_get_two_of_them(tmp_path):
    large_tokens = {**BACKBONE, "widths": [8, 8, 8, 8, 16], "depths": [1] * 5}
    found = plan(write_set(tmp_path, [(22, 20, 18)] * 3), backbone=large_tokens).plan
    assert sorted(found.patch_size) == [32, 32, 64]


def test_labels_that_name_a_side_are_not_mirrored_along_it(tmp_path):
    data = write_set(tmp_path, [(22, 20, 18)] * 3)
    content = [
        {"image": str(tmp_path / f"{n}_0.nii.gz"), "label": str(tmp_path / f"{n}_label.nii.gz")} for n in range(3)
    ]
    labels = {"0": "background", "2": "left kidney", "5": "core"}
    data.with_suffix(".json").write_text(json.dumps({"labels": labels, "cases": content}))
    found = plan(data.with_suffix(".json")).plan
    assert found.flip_axes == (1, 2) and "left kidney" in found.reasons["flip_axes"]


def test_the_patch_shrinks_until_memory_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_memory, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(engine_memory, "SCRATCH_BYTES", {"cpu": 0})
    data = write_set(tmp_path, [(20, 20, 20)] * 3)
    assert plan(data).plan.patch_size == (20, 20, 20)
    recipe, labels = create_recipe(BACKBONE), {0: "background", 2: "2", 5: "5"}
    given = settings(batch_size=2, memory_limit=1.0)
    memory = training_memory(create_task("segmentation"), recipe, labels, given, [])
    limit = (memory.need_bytes((12, 12, 12), 2) / FILLED_SHARE + 1000) / 2**30
    tight = plan(data, memory_limit=limit, fold=None).plan
    assert tight.patch_size == (12, 12, 12)
    assert "16 x 16 x 16 would need" in tight.reasons["patch_size"]


def test_the_scores_of_a_validation_take_memory_too():
    recipe, labels = create_recipe(BACKBONE), {0: "background", 1: "1"}
    given = settings(batch_size=2, memory_limit=1.0)
    shape = (512, 512, 512)
    with_scores = training_memory(create_task("segmentation"), recipe, labels, given, [shape, (8, 8, 8)])
    without = training_memory(create_task("segmentation"), recipe, labels, given, [])
    more = with_scores.need_bytes((8, 8, 8), 2) - without.need_bytes((8, 8, 8), 2)
    assert more > 4 * math.prod(shape)


def test_memory_is_no_limit_where_the_user_wants_no_check_or_a_network_cannot_be_tried():
    recipe = create_recipe(BACKBONE)
    assert training_memory(Untried(), recipe, {0: "", 1: ""}, settings(batch_size=2), []) is None
    memory = training_memory(Untried(), recipe, {0: "", 1: ""}, settings(batch_size=2, memory_limit=1), [])
    assert memory.need_bytes((16, 16, 16), 2) == 0


class Untried(Segmentation):
    """A task whose network reads values, which a dry run does not have."""

    def build(self, recipe, labels):
        raise RuntimeError("needs values")


def test_the_users_word_counts_more_than_the_plan(ball_set):
    task = {"name": "segmentation", "patch_size": [16, 16, 16], "positive_ratio": 0.9, "feature_dim": 8}
    given = {"spacing_mm": (2.0, 2.0, 2.0), "batch_size": 3, "task": task}
    planned = plan(ball_set, max_epochs=7, **given)
    filled = planned.settings
    assert filled.spacing_mm == (2.0, 2.0, 2.0) and filled.batch_size == 3
    assert filled.max_steps is None and filled.max_epochs == 7
    asked = create_task(filled.task)
    assert (asked.patch_size, asked.positive_ratio, asked.feature_dim) == ((16, 16, 16), 0.9, 8)
    assert planned.plan.reasons["spacing_mm"].startswith("given (the plan would be")


def test_where_everything_is_given_no_scan_is_looked_at(ball_set, monkeypatch):
    monkeypatch.setattr(planning, "fingerprint_of", lambda *_, **__: pytest.fail("looked"))
    task = {"name": "segmentation", "patch_size": [16, 16, 16]}
    planned = plan(ball_set, task=task, intensity=Intensity(), batch_size=2, max_steps=5)
    assert planned.plan is None and planned.settings.max_steps == 5


def test_voxels_are_left_alone_where_only_the_batch_and_the_steps_are_open(ball_set):
    task = {"name": "segmentation", "patch_size": [16, 16, 16]}
    planned = plan(ball_set, task=task, intensity=Intensity())
    assert planned.fingerprint.voxel_scans == () and planned.plan.positive_ratio is None
    assert planned.settings.batch_size == 2 and planned.settings.max_steps == planned.plan.max_steps > 1000
    assert create_task(planned.settings.task).positive_ratio == create_task("segmentation").positive_ratio


def test_the_card_of_an_encoder_counts_more_than_the_plan_and_the_difference_is_said(ball_set, capsys):
    window = {"kind": "window", "window": [0.0, 400.0]}
    planned = plan(ball_set, card={"spacing_mm": [2.0, 2.0, 2.0], "intensity": window}, verbose=True)
    assert planned.plan.spacing_mm == planned.settings.spacing_mm == (2.0, 2.0, 2.0)
    assert planned.plan.intensity.window == (0.0, 400.0)
    assert planned.settings.intensity is None, "the encoder's own, which its initialisation applies"
    assert planned.plan.patch_size == (12, 12, 12), "what covers the scans at the encoder's spacing"
    said = " ".join(capsys.readouterr().out.split())
    assert "of the encoder (the plan would be z-score" in said


def test_an_encoder_without_a_spacing_of_its_own_leaves_it_to_the_plan(tmp_path):
    data = write_set(tmp_path, [(22, 20, 18)] * 3, spacings=[(1.0, 1.0, z) for z in (1.0, 1.5, 2.0)])
    planned = plan(data, card={"spacing_mm": None, "intensity": to_mapping(Intensity())})
    assert planned.settings.spacing_mm == (1.0, 1.0, 1.5)


def test_a_cache_keeps_its_spacing(ball_set, tmp_path):
    assert main(["cache", str(ball_set), "--out", str(tmp_path / "cache"), "--spacing_mm", "2", "2", "2"]) == 0
    planned = plan(tmp_path / "cache")
    assert planned.plan.spacing_mm == (2.0, 2.0, 2.0) and "of the cache" in planned.plan.reasons["spacing_mm"]
    assert planned.settings.spacing_mm is None
    assert planned.plan.intensity.kind == "zscore"
    assert planned.fingerprint.scans[0].orientation == "RAS"


def run_at(path: Path, planned: PlannedRun) -> Run:
    run = Run.create(path, command="finetune", settings=planned.settings, inputs={}, resume=True)
    save_plan(run, planned)
    return run


def test_a_plan_lies_in_its_run_and_is_taken_back_edited(ball_set, tmp_path, monkeypatch):
    planned = plan(ball_set)
    run = run_at(tmp_path / "run", planned)
    assert read_plan(run.path / PLAN_NAME) == planned.plan
    assert read_run(run.path).manifest["derived"]["plan"]["patch_size"] == list(planned.plan.patch_size)
    edited = {**read_yaml(run.path / PLAN_NAME), "patch_size": [16, 16, 12], "max_steps": 77, "spacing_mm": [2, 2, 2]}
    write_yaml(tmp_path / "mine.yaml", edited)
    monkeypatch.setattr(planning, "fingerprint_of", lambda *_, **__: pytest.fail("looked"))
    taken = plan(ball_set, plan=str(tmp_path / "mine.yaml"), max_steps=5)
    assert create_task(taken.settings.task).patch_size == (16, 16, 12)
    assert taken.settings.spacing_mm == (2.0, 2.0, 2.0)
    assert taken.settings.max_steps == 5, "flags count more than the file"
    assert taken.settings.plan is None, "a saved config must not depend on the file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_sise": [16, 16, 16]}, r"mine.yaml.*patch_sise.*patch_size"),
        ({"batch_size": "many"}, r"mine.yaml.*batch_size is 'many'"),
        ({"batch_size": 0}, r"mine.yaml.*batch_size is 0"),
        ({"patch_size": [18, 16, 16]}, r"patch_size axis X \(18\).*use 16 or 20"),
        ({"intensity": {"kind": "window", "window": [5, 1]}}, r"mine.yaml.*window"),
    ],
)
def test_a_plan_file_that_cannot_work_is_refused_with_its_key(ball_set, tmp_path, change, message):
    write_yaml(tmp_path / "mine.yaml", change)
    with pytest.raises(ConfigError, match=message):
        plan(ball_set, plan=str(tmp_path / "mine.yaml"))


def test_a_run_that_is_resumed_keeps_its_plan_whatever_memory_is_free_now(ball_set, tmp_path, monkeypatch):
    planned = plan(ball_set, tmp_path / "run")
    run = run_at(tmp_path / "run", planned)
    monkeypatch.setattr(planning, "fingerprint_of", lambda *_, **__: pytest.fail("looked"))
    again = plan(ball_set, run.path, resume=True, memory_limit=0.1)
    assert again.plan == planned.plan
    ours, theirs = (replace(p.settings, resume=False, memory_limit=None) for p in (planned, again))
    assert ours == theirs


def test_a_fingerprint_is_not_made_twice_for_the_same_files(ball_set, tmp_path, monkeypatch):
    planned = plan(ball_set)
    run = run_at(tmp_path / "run", planned)
    assert (run.path / FINGERPRINT_NAME).is_file()
    monkeypatch.setattr(planning, "fingerprint_of", lambda *_, **__: pytest.fail("looked"))
    assert plan(ball_set, run.path).plan == planned.plan


def test_other_processes_of_a_run_take_the_plan_of_the_first(ball_set, tmp_path, monkeypatch):
    planned = plan(ball_set, tmp_path / "run", devices=2)
    run = run_at(tmp_path / "run", planned)
    monkeypatch.setattr(planning, "is_first_process", lambda: False)
    monkeypatch.setattr(planning, "fingerprint_of", lambda *_, **__: pytest.fail("looked"))
    assert plan(ball_set, run.path, devices=2).settings == replace(planned.settings, devices=2)
    monkeypatch.setattr(planning, "PATIENCE_S", 0.1)
    with pytest.raises(ConfigError, match="first process"):
        plan(ball_set, run.path, devices=2, accumulation=2)


def test_the_table_shows_every_setting_with_its_reason(ball_set):
    found = plan(ball_set).plan
    text = "\n".join(describe_plan(found))
    for name in ("spacing_mm", "intensity", "patch_size", "batch_size", "max_steps", "positive_ratio", "flip_axes"):
        assert name in text and found.reasons[name].split()[0] in text
    assert all(len(line) <= 130 for line in text.splitlines())


def test_the_plan_is_two_lines_unless_its_reasons_are_asked_for(ball_set, capsys):
    found = plan(ball_set).plan
    said = capsys.readouterr().out.splitlines()
    size = " ".join(map(str, found.patch_size))
    assert said[1].startswith("plan: spacing_mm of each scan, intensity z-score, patch_size " + size)
    assert "--verbose true" in said[2] and len(said) == 3


def test_nothing_is_written(ball_set, tmp_path):
    plan(ball_set, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_soft_tissue_sarcoma_ct_is_planned_sensibly(shared_data):
    planned = plan(shared_data / "sts_ct")
    found = planned.plan
    assert planned.fingerprint.is_ct and found.intensity.window == (-160.0, 240.0)
    assert all(64 <= voxels <= 104 for voxels in found.patch_size)
    assert found.spacing_mm is None


def test_hippocampus_mri_is_planned_sensibly(shared_data):
    found = plan(shared_data / "hippocampus").plan
    assert found.intensity.kind == "zscore" and found.spacing_mm is None
    assert found.patch_size == (36, 52, 36)
    assert 2 <= found.batch_size <= 16


def test_a_single_chest_ct_is_planned_for(shared_data, tmp_path):
    folder = shared_data / "formats" / "cip"
    (tmp_path / "chest.csv").write_text(f"image,label\n{folder / 'ct-64.nrrd'},{folder / 'lm-64.nrrd'}")
    found = plan(tmp_path / "chest.csv", fold=None).plan
    assert found.intensity.kind == "window" and found.intensity.window[0] <= -900
    assert found.batch_size == 2 and found.max_steps == 1000
