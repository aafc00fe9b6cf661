"""Going on with a comparison: its voxel size stays, and lists of cases are those of their cells."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mim3d.core.errors import ConfigError
from mim3d.core.files import lock_file, try_lock
from mim3d.workflows.compare.cells import Cell
from mim3d.workflows.compare.plan import PLAN_NAME, read_plan
from mim3d.workflows.compare.running import planned
from mim3d.workflows.compare.settings import CompareSettings
from mim3d.workflows.shared.leakage import SEEN_NAME
from tests.commands.conftest import BACKBONE, TASK

RECIPE = {"task": TASK, "precision": "32-true", "intensity": {"kind": "zscore"}, "batch_size": 1, "num_workers": 0}
OTHER = {"name": "other", "backbone": {**BACKBONE, "widths": [8, 24]}}


def plan(out: Path, data: Path | None = None, data_at: Path | None = None, **changes: Any) -> list[Cell]:
    """The cells of a comparison, none of which is run; without data those of its folder."""
    given: dict[str, Any] = {}
    if data is not None:
        given = {"data": str(data), "arms": ("scratch", OTHER), "labels": ("100%",), "folds": (0,), "num_folds": 3}
        given |= {"seeds": (0,), "backbone": BACKBONE, "finetune": RECIPE, "finetune_steps": 2}
    config = {} if data is not None else CompareSettings.below({"out": str(out)})
    changes |= {} if data_at is None else {"data": str(data_at)}
    below = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return list(planned(CompareSettings(str(out), **{**below, **given, **changes}).with_recipes()).cells)


def cases_of(cell: Cell) -> dict[str, str]:
    """Cases that a cell tests, each with its image."""
    with open(cell.test, encoding="utf-8") as file:
        return {row["id"]: row["image"] for row in csv.DictReader(file)}


def test_a_comparison_at_another_voxel_size_goes_on_in_its_folder(ball_set: Path, tmp_path: Path):
    out = tmp_path / "compared"
    cells = plan(out, ball_set, finetune={**RECIPE, "spacing_mm": (2.0, 2.0, 2.0)})
    assert [cell.id for cell in plan(out)] == [cell.id for cell in cells]
    # A plan of a version that did not write the voxel size: the cache says it.
    content = json.loads((out / PLAN_NAME).read_text())
    assert content.pop("spacing_mm") == [2.0, 2.0, 2.0]
    (out / PLAN_NAME).write_text(json.dumps(content))
    assert [cell.id for cell in plan(out)] == [cell.id for cell in cells]
    with pytest.raises(ConfigError, match=r"at spacing_mm \(2\.0, 2\.0, 2\.0\), and now .* choose another --out"):
        plan(out, finetune={**RECIPE, "spacing_mm": (3.0, 3.0, 3.0)})


def test_another_split_tests_its_own_patients_and_leaves_the_lists_of_earlier_cells(ball_set: Path, tmp_path: Path):
    out = tmp_path / "compared"
    before = plan(out, ball_set)
    lists = {path: path.read_bytes() for path in (out / "lists").iterdir()}
    first = set(cases_of(before[0]))
    cells = plan(out, split_seed=1)
    assert set(cases_of(cells[0])) == set(read_plan(out)["patients"]) != first
    assert {path: path.read_bytes() for path in lists} == lists
    again = plan(out, split_seed=0)
    assert [(cell.id, cell.test, cell.settings) for cell in again] == [
        (cell.id, cell.test, cell.settings) for cell in before
    ]


def test_data_that_were_moved_are_tested_where_they_are(ball_set: Path, tmp_path: Path):
    out, moved = tmp_path / "compared", tmp_path / "moved"
    before = plan(out, ball_set)
    shutil.copytree(ball_set, moved)
    cells = plan(out, data_at=moved)
    assert [cell.id for cell in cells] == [cell.id for cell in before]
    assert all(path.startswith(str(moved)) for path in cases_of(cells[0]).values())


def test_scans_that_are_left_out_and_labels_that_are_unknown_stay_said(ball_set: Path, tmp_path: Path):
    out, data = tmp_path / "compared", shutil.copytree(ball_set, tmp_path / "data")
    damaged = data / "imagesTr" / "ball_5.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    rows = [
        f"ball_{number},imagesTr/ball_{number}.nii.gz,labelsTr/ball_{number}.nii.gz,{'' if number else '2'}"
        for number in range(6)
    ]
    (data / "list.csv").write_text("\n".join(["id,image,label,labels", *rows]))
    cells = plan(out, data / "list.csv", folds=(0, 1, 2))
    notes = read_plan(out)["notes"]
    assert any(note.startswith("1 scan of the data set left out: ") and "ball_5" in note for note in notes)
    known: dict[str, str] = {}
    for cell in cells:
        with open(cell.test, encoding="utf-8") as file:
            known |= {row["id"]: row.get("labels", "") for row in csv.DictReader(file)}
    assert known == {"ball_0": "2", **{f"ball_{number}": "" for number in range(1, 5)}}


def test_weights_without_a_list_of_their_scans_are_noted_by_the_table(
    ball_set: Path, segmenter_run: Path, tmp_path: Path
):
    weights = shutil.copytree(segmenter_run, tmp_path / "others")
    for path in weights.rglob(SEEN_NAME):
        path.unlink()
    arms = ("scratch", {"name": "others", "weights": str(weights)})
    plan(tmp_path / "compared", ball_set, arms=arms)
    (note,) = [note for note in read_plan(tmp_path / "compared")["notes"] if note.startswith("others: ")]
    assert note.endswith("no list of the scans it learned from: whether tested ones are among them cannot be checked.")


def test_a_call_beside_one_at_work_leaves_its_cache_as_it_is(ball_set: Path, tmp_path: Path):
    """A cache that is checked again is unfinished for that time, and cells that begin then would miss."""
    out = tmp_path / "compared"
    cells = plan(out, ball_set)
    manifest = out / "cache" / "manifest.parquet"
    before = manifest.stat()
    (out / "cells").mkdir()
    with lock_file(out / "cells" / f"{cells[0].id}.lock") as descriptor:
        assert try_lock(descriptor)
        more = plan(out, seeds=(0, 1))
    assert {cell.id for cell in cells} < {cell.id for cell in more}
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
