"""Prediction as a command: on the scan's own grid, resumable, one bad scan never stops the others."""

import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage

from mim3d.cli import main
from mim3d.commands.predict import predict
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.files import write_json
from mim3d.core.run_folder import Run
from mim3d.datasets.cases import Case, read_cases, scans_in
from mim3d.datasets.splits import Split
from mim3d.scans.volumes import read_volume
from mim3d.tasks.contract import PredictionSettings, Predictor
from mim3d.training.precision import PrecisionChoice
from mim3d.workflows.predict import PredictionFolder, _predict_all, alone_in, input_cases
from mim3d.workflows.shared.held_out import held_out_cases, write_split
from mim3d.workflows.shared.scan_sources import ScanFiles
from tests.labelled import ball_scan, write_scan


def listing(out: Path) -> dict:
    return json.loads((out / "predictions.json").read_text())


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    return 2 * ((predicted > 0) & (reference > 0)).sum() / ((predicted > 0).sum() + (reference > 0).sum())


def choose_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = PrecisionChoice("bf16-mixed", "as if measured")
    monkeypatch.setattr("mim3d.tasks.segmentation.prediction.choose_precision", lambda accelerator: choice)


def test_auto_predicts_in_what_the_device_is_good_at_and_says_so(segmenter_run, scans, tmp_path, monkeypatch, capsys):
    exact = Path(predict(str(segmenter_run), str(tmp_path / "exact"), str(scans), precision="32-true"))
    choose_bfloat16(monkeypatch)
    dtypes: list[torch.dtype] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: dtypes.append(out.dtype) if isinstance(module, torch.nn.Conv3d) else None
    )
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), str(scans)))
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}
    assert "precision: bf16-mixed (auto; as if measured)" in capsys.readouterr().out
    assert listing(out)["precision"] == "bf16-mixed" and listing(exact)["precision"] == "32-true"
    for name in ("new_0.nii.gz", "new_1.nii.gz", "new_2.nii.gz"):
        own, other = (np.asarray(nibabel.load(folder / name).dataobj) for folder in (out, exact))
        assert (own == other).mean() > 0.99


def test_a_folder_that_was_begun_keeps_its_precision(segmenter_run, scans, tmp_path, monkeypatch):
    first = scans / "new_0.nii.gz"
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), str(first)))
    choose_bfloat16(monkeypatch)
    predict(str(segmenter_run), str(out), str(scans))
    assert listing(out)["precision"] == "32-true" and len(listing(out)["cases"]) == 3
    with pytest.raises(ConfigError, match="holds predictions of precision 32-true"):
        predict(str(segmenter_run), str(out), str(scans), precision="bf16-mixed")
    # Lists from before precision was a setting are of float32.
    content = listing(out)
    del content["precision"]
    write_json(out / "predictions.json", content)
    predict(str(segmenter_run), str(out), str(scans))
    assert listing(out)["precision"] == "32-true"


def test_a_precision_that_the_device_lacks_is_refused(segmenter_run, scans, tmp_path):
    with pytest.raises(ConfigError, match="'16-mixed', which is for GPUs"):
        predict(str(segmenter_run), str(tmp_path / "out"), str(scans), precision="16-mixed", accelerator="cpu")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three scans that no training saw."""
    for index in range(3):
        write_scan(tmp_path / "scans" / f"new_{index}.nii.gz", ball_scan(50 + index)[0])
    return tmp_path / "scans"


def test_held_out_cases_are_segmented_when_no_input_is_named(segmenter_run, ball_set, tmp_path, capsys):
    out = Path(predict(str(segmenter_run), str(tmp_path / "out")))
    content = listing(out)
    split = json.loads((segmenter_run / "split.json").read_text())
    assert {case["id"] for case in content["cases"]} == {case["id"] for case in split["val"]}
    assert content["only_held_out"] is True
    assert content["labels"] == {"0": "background", "2": "ball", "5": "core"} and content["failed"] == []
    for case in content["cases"]:
        predicted = nibabel.load(out / case["prediction"])
        reference = nibabel.load(ball_set / "labelsTr" / f"{case['id']}.nii.gz")
        assert dice(np.asarray(predicted.dataobj), np.asarray(reference.dataobj)) > 0.9
        assert set(np.unique(predicted.dataobj)) == {0, 2, 5}
        assert np.array_equal(predicted.affine, reference.affine)
    assert "2 of 2 scans segmented" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["LPS", "PIR", "SLA"])
def test_a_prediction_lies_bit_exactly_on_the_grid_of_its_scan(segmenter_run, tmp_path, direction):
    image, label = ball_scan(60)
    affine = np.diag([1.0, 1.0, 1.2, 1.0])
    affine[:3, 3] = (-30.5, 12.25, 7.0)
    canonical = nibabel.Nifti1Image(image, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(direction)
    )
    stored = canonical.as_reoriented(turn)
    nibabel.save(stored, tmp_path / "turned.nii.gz")
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=str(tmp_path / "turned.nii.gz")))
    predicted = nibabel.load(out / "turned.nii.gz")
    source = nibabel.load(tmp_path / "turned.nii.gz")
    for name in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "quatern_b", "qoffset_x"):
        assert np.array_equal(predicted.header[name], source.header[name]), name
    reference = nibabel.Nifti1Image(label, affine).as_reoriented(turn)
    assert dice(np.asarray(predicted.dataobj), np.asarray(reference.dataobj)) > 0.85


def test_the_label_map_has_the_format_family_of_its_scan(segmenter_run, tmp_path):
    for name in ("a.nrrd", "b.mha", "c.nii"):
        image = SimpleITK.GetImageFromArray(ball_scan(61)[0].transpose(2, 1, 0))
        image.SetSpacing((1.0, 1.0, 1.2))
        SimpleITK.WriteImage(image, str(tmp_path / name))
    inputs = [str(tmp_path / name) for name in ("a.nrrd", "b.mha", "c.nii")]
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=inputs))
    assert [case["prediction"] for case in listing(out)["cases"]] == ["a.nrrd", "b.mha", "c.nii.gz"]
    for source, written in zip(inputs, ("a.nrrd", "b.mha", "c.nii.gz"), strict=True):
        predicted, scan = read_volume(str(out / written), label=True), read_volume(source)
        assert predicted.array.shape == scan.array.shape
        assert np.allclose(predicted.affine, scan.affine)


def test_a_second_call_does_only_what_is_not_finished(segmenter_run, scans, tmp_path, capsys):
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=str(scans)))
    kept = (out / "new_0.nii.gz").stat().st_mtime_ns
    (out / "new_1.nii.gz").unlink()
    write_scan(scans / "new_3.nii.gz", ball_scan(70)[0])
    predict(str(segmenter_run), str(out), input=str(scans))
    assert "4 of 4 scans segmented, 2 of them before" in capsys.readouterr().out
    assert (out / "new_0.nii.gz").stat().st_mtime_ns == kept
    assert {case["id"] for case in listing(out)["cases"]} == {f"new_{index}" for index in range(4)}


def test_a_bad_scan_is_listed_with_its_reason_and_the_others_are_done(segmenter_run, scans, tmp_path):
    (scans / "new_1.nii.gz").write_bytes((scans / "new_1.nii.gz").read_bytes()[:200])
    broken = ball_scan(3)[0]
    broken[2, 2, 2] = np.nan
    write_scan(scans / "new_9.nii.gz", broken)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="2 of 4 scans could not be segmented"):
        predict(str(segmenter_run), str(out), input=str(scans))
    content = listing(out)
    assert {case["id"] for case in content["cases"]} == {"new_0", "new_2"}
    assert {case["id"] for case in content["failed"]} == {"new_1", "new_9"}
    assert all(f"{case['id']}.nii.gz" in case["reason"] for case in content["failed"])
    write_scan(scans / "new_1.nii.gz", ball_scan(51)[0])
    (scans / "new_9.nii.gz").unlink()
    predict(str(segmenter_run), str(out), input=str(scans))
    assert listing(out)["failed"] == []


@pytest.mark.filterwarnings("ignore:.*sform_code")
def test_whatever_is_raised_for_one_scan_the_others_are_done(segmenter_run, scans, tmp_path, monkeypatch, capsys):
    from mim3d.tasks.segmentation.prediction import SegmentationPredictor

    segment = SegmentationPredictor.segment

    def odd(self, prepared, **options):
        if Path(prepared.grid.path).name == "new_1.nii.gz":
            raise ValueError("cannot unpack")
        return segment(self, prepared, **options)

    monkeypatch.setattr(SegmentationPredictor, "segment", odd)
    inputs = [str(path) for path in sorted(scans.iterdir())]
    arguments = ["--weights", str(segmenter_run), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments, "--input", *inputs, str(scans / "nowhere.nii.gz")]) == 2
    content = listing(tmp_path / "out")
    assert [case["id"] for case in content["cases"]] == ["new_0", "new_2"]
    reasons = {row["id"]: row["reason"] for row in content["failed"]}
    assert reasons["new_1"].endswith("new_1.nii.gz: unexpected ValueError: cannot unpack; please report it.")
    assert "nowhere.nii.gz: no such file" in reasons["nowhere"]
    assert "cannot unpack" in (tmp_path / "out" / "failed_tracebacks.txt").read_text()
    assert "2 of 4 scans could not be segmented" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(DataError, match=r"1 of 4 cases cannot be used \(strict: .*nowhere\.nii\.gz: no such file"):
        predict(str(segmenter_run), str(tmp_path / "new"), [*inputs, str(scans / "nowhere.nii.gz")], strict=True)
    assert not (tmp_path / "new").exists()


def test_what_was_assumed_of_a_scan_stands_beside_its_prediction(segmenter_run, tmp_path):
    write_scan(tmp_path / "scans" / "told.nii.gz", ball_scan(50)[0])
    nibabel.save(nibabel.Nifti1Image(ball_scan(51)[0], None), tmp_path / "scans" / "untold.nii.gz")
    predict(str(segmenter_run), str(tmp_path / "out"), input=str(tmp_path / "scans"))
    told, untold = listing(tmp_path / "out")["cases"]
    assert "assumed" not in told
    assert "left and right may be the wrong way round" in untold["assumed"][0]


def test_label_maps_of_other_settings_are_not_mixed_unless_they_are_to_be_replaced(segmenter_run, scans, tmp_path):
    out = str(tmp_path / "out")
    predict(str(segmenter_run), out, input=str(scans))
    with pytest.raises(ConfigError, match=r"overlap 0.5.*--overwrite true"):
        predict(str(segmenter_run), out, input=str(scans), overlap=0.25)
    with pytest.raises(ConfigError, match="mirror_axes"):
        predict(str(segmenter_run), out, input=str(scans), mirror=True)
    predict(str(segmenter_run), out, input=str(scans), mirror=True, overwrite=True)
    assert listing(Path(out))["mirror_axes"] == [0, 1, 2]


def test_a_file_of_other_origin_is_never_replaced(segmenter_run, scans, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "new_0.nii.gz").write_bytes(b"by hand")
    with pytest.raises(ConfigError, match=r"new_0.nii.gz exists"):
        predict(str(segmenter_run), str(out), input=str(scans))
    assert (out / "new_0.nii.gz").read_bytes() == b"by hand"


def test_predictions_cannot_be_written_over_the_scans_they_come_from(segmenter_run, scans):
    before = (scans / "new_0.nii.gz").read_bytes()
    with pytest.raises(ConfigError, match="choose another --out"):
        predict(str(segmenter_run), str(scans), input=str(scans), overwrite=True)
    assert (scans / "new_0.nii.gz").read_bytes() == before


def test_predictions_among_the_scans_are_no_scans(segmenter_run, scans, tmp_path, capsys):
    out = scans / "predicted"
    for probabilities in (False, False, True):
        predict(str(segmenter_run), str(out), input=str(scans), probabilities=probabilities)
    assert "3 of 3 scans segmented, 3 of them before" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="predicted: predictions are not read"):
        assert [Path(case.images[0]).parent for case in read_cases(scans).cases] == [scans] * 3
    # Where predictions are scored, folders of them below another are those of folds.
    assert {path.parent.name for path in map(Path, scans_in(str(scans), with_predictions=True))} == {
        "scans",
        "predicted",
    }


def test_scans_of_two_folders_with_one_name_are_told_apart(segmenter_run, tmp_path):
    for folder in ("first", "second"):
        write_scan(tmp_path / folder / "ct.nii.gz", ball_scan(1)[0])
    found = input_cases([str(tmp_path / "first"), str(tmp_path / "second")])
    assert [case.id for case in found] == ["first_ct", "second_ct"]
    with pytest.raises(DataError, match=r"ct\.nii\.gz is named twice"):
        input_cases([str(tmp_path / "first"), str(tmp_path / "first")])


def two_patients(tmp_path: Path) -> list[Path]:
    """Two scans of one name in the folders of two patients."""
    paths = [tmp_path / patient / "study" / "ct.nii.gz" for patient in "ab"]
    for seed, path in enumerate(paths):
        write_scan(path, ball_scan(70 + seed)[0])
    return paths


def test_a_loop_over_patients_into_one_folder_keeps_what_each_of_them_got(segmenter_run, tmp_path, capsys):
    out, (first, second) = tmp_path / "out", two_patients(tmp_path)
    predict(str(segmenter_run), str(out), input=str(first))
    before = (out / "ct.nii.gz").read_bytes()
    with pytest.warns(UserWarning, match=r"b/study/ct.nii.gz as b_study_ct"):
        predict(str(segmenter_run), str(out), input=str(second))
    assert (out / "ct.nii.gz").read_bytes() == before and (out / "b_study_ct.nii.gz").is_file()
    rows = {case["id"]: case for case in listing(out)["cases"]}
    assert {name: row["images"] for name, row in rows.items()} == {"ct": [str(first)], "b_study_ct": [str(second)]}
    assert rows["ct"]["source"]["num_bytes"] == first.stat().st_size and rows["ct"]["source"]["sha256"]
    # Again, together, by a link, and with --overwrite: each keeps its name.
    capsys.readouterr()
    predict(str(segmenter_run), str(out), input=[str(second), str(first)])
    (tmp_path / "link").symlink_to(tmp_path / "b")
    predict(str(segmenter_run), str(out), input=str(tmp_path / "link" / "study" / "ct.nii.gz"))
    assert "2 of 2 scans segmented, 2 of them before" in capsys.readouterr().out
    predict(str(segmenter_run), str(out), input=str(second), overwrite=True)
    assert (out / "ct.nii.gz").read_bytes() == before
    assert {case["id"] for case in listing(out)["cases"]} == {"ct", "b_study_ct"}


def test_a_scan_that_moved_with_its_folder_is_known_by_its_content(segmenter_run, tmp_path, capsys):
    out, (first, _) = tmp_path / "out", two_patients(tmp_path)
    predict(str(segmenter_run), str(out), input=str(first))
    shutil.move(tmp_path / "a", tmp_path / "moved")
    predict(str(segmenter_run), str(out), input=str(tmp_path / "moved" / "study" / "ct.nii.gz"))
    assert "1 of 1 scan segmented, 1 of them before" in capsys.readouterr().out
    (row,) = listing(out)["cases"]
    assert row["id"] == "ct" and "moved" in row["images"][0]


def test_a_scan_that_changed_is_predicted_again_and_that_is_said(segmenter_run, tmp_path):
    out, (first, second) = tmp_path / "out", two_patients(tmp_path)
    predict(str(segmenter_run), str(out), input=str(first))
    before = (out / "ct.nii.gz").read_bytes()
    shutil.copyfile(second, first)
    with pytest.warns(UserWarning, match="Changed since their prediction"):
        predict(str(segmenter_run), str(out), input=str(first))
    assert (out / "ct.nii.gz").read_bytes() != before and len(listing(out)["cases"]) == 1


@pytest.mark.parametrize(("header", "voxels"), [("ct.mhd", "ct.raw"), ("ct.hdr", "ct.img")])
def test_voxels_beside_a_header_are_part_of_what_a_scan_is_told_by(tmp_path, header, voxels):
    image = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
    SimpleITK.WriteImage(image, str(tmp_path / voxels.replace("raw", "mhd")))
    before = ScanFiles.of([str(tmp_path / header)])
    os.utime(tmp_path / voxels, ns=(0, before.modified_ns + 10**9))
    after = ScanFiles.of([str(tmp_path / header)])
    assert before.num_bytes == after.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert after.modified_ns == before.modified_ns + 10**9


def test_a_file_that_the_list_does_not_name_is_not_replaced_either(segmenter_run, tmp_path):
    out, (first, second) = tmp_path / "out", two_patients(tmp_path)
    predict(str(segmenter_run), str(out), input=str(first))
    shutil.move(second, second.with_name("other.nii.gz"))
    (out / "other.nii.gz").write_bytes(b"by hand")
    with pytest.raises(ConfigError, match=r"other.nii.gz exists and is no prediction"):
        predict(str(segmenter_run), str(out), input=str(second.with_name("other.nii.gz")))
    assert (out / "other.nii.gz").read_bytes() == b"by hand"


def test_probabilities_of_one_scan_are_not_the_label_map_of_another(segmenter_run, tmp_path):
    for seed, name in enumerate(("x", "x_probabilities")):
        write_scan(tmp_path / "scans" / f"{name}.nii.gz", ball_scan(80 + seed)[0])
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=str(tmp_path / "scans"), probabilities=True))
    files = [case[key] for case in listing(out)["cases"] for key in ("prediction", "probabilities")]
    assert len(set(files)) == 4 and all((out / name).is_file() for name in files)


def test_a_failure_of_an_earlier_call_stays_listed(segmenter_run, tmp_path):
    out, (first, second) = tmp_path / "out", two_patients(tmp_path)
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(DataError, match="1 of 1 scan could not be segmented"):
        predict(str(segmenter_run), str(out), input=str(first))
    predict(str(segmenter_run), str(out), input=str(second))
    content = listing(out)
    assert [row["images"] for row in content["failed"]] == [[str(first)]]
    assert [row["images"] for row in content["cases"]] == [[str(second)]]


def test_scans_of_one_call_get_what_each_gets_alone(segmenter_run, scans, tmp_path):
    together = Path(predict(str(segmenter_run), str(tmp_path / "out"), str(scans), probabilities=True))
    for name in ("new_0", "new_1", "new_2"):
        scan = str(scans / f"{name}.nii.gz")
        alone = Path(predict(str(segmenter_run), str(tmp_path / name), scan, probabilities=True))
        for file in (f"{name}.nii.gz", f"{name}_probabilities.nii.gz"):
            one, other = (np.asarray(nibabel.load(folder / file).dataobj) for folder in (together, alone))
            assert np.array_equal(one, other)
        (row,) = listing(alone)["cases"]
        assert row in listing(together)["cases"]
    assert [row["id"] for row in listing(together)["cases"]] == ["new_0", "new_1", "new_2"]
    assert not list(together.glob(".*.partial"))


class InstantPredictor(Predictor):
    """Writes a byte for each scan; after some scans somebody stops it."""

    identity: ClassVar = {"weights_digests": ["x"]}
    stops_after: int | None = None

    def files_of(self, case):
        return {"prediction": f"{case.id}.nii.gz"}

    def predict(self, cases, inputs, folder, on_windows):
        if self.stops_after == len(list(folder.glob("*.nii.gz"))):
            raise KeyboardInterrupt
        for case in cases:
            (folder / f"{case.id}.nii.gz").write_bytes(b"x")
        return [{} for _ in cases]


def test_a_list_of_many_scans_is_not_written_for_each_of_them_and_a_stop_loses_none(tmp_path, monkeypatch):
    for index in range(60):
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / f"s{index}.nii.gz").write_bytes(b"%d" % index)
    clock, written = [0.0], []

    def write(path, content, **settings):
        # A list takes as long as ten of the scans that it is about.
        clock[0] += len(content["cases"])
        written.append(len(content["cases"]))
        write_json(path, content, **settings)

    monkeypatch.setattr("mim3d.workflows.predict.write_json", write)
    monkeypatch.setattr(
        "mim3d.workflows.predict.time.monotonic", lambda: clock.__setitem__(0, clock[0] + 0.1) or clock[0]
    )
    predictor, cases = InstantPredictor([], PredictionSettings()), input_cases(str(tmp_path / "scans"))
    predictor.stops_after = 50
    with pytest.raises(KeyboardInterrupt):
        _predict_all(predictor, PredictionFolder.open(tmp_path / "out", predictor, cases, overwrite=False))
    assert len(listing(tmp_path / "out")["cases"]) == 50 and len(written) < 12
    predictor.stops_after = None
    _predict_all(predictor, PredictionFolder.open(tmp_path / "out", predictor, cases, overwrite=False))
    assert len(listing(tmp_path / "out")["cases"]) == 60 and listing(tmp_path / "out")["begun"] == []


def test_two_processes_do_not_write_one_list(segmenter_run, tmp_path):
    first, _ = two_patients(tmp_path)
    with alone_in(tmp_path / "out"), pytest.raises(ConfigError, match="Another process predicts into"):
        predict(str(segmenter_run), str(tmp_path / "out"), input=str(first))
    # What a killed process leaves behind goes.
    (tmp_path / "out" / ".x.partial").mkdir()
    with alone_in(tmp_path / "out"):
        assert not (tmp_path / "out" / ".x.partial").exists()


def test_channels_that_do_not_match_are_a_reason(segmenter_run, tmp_path):
    for name in ("a", "b"):
        write_scan(tmp_path / f"{name}.nii.gz", ball_scan(1)[0])
    (tmp_path / "two.csv").write_text("image\na.nii.gz;b.nii.gz\n")
    with pytest.raises(DataError, match=r"2 images where the network was trained on 1"):
        predict(str(segmenter_run), str(tmp_path / "out"), input=str(tmp_path / "two.csv"))


def test_a_moved_segmenter_folder_is_enough(segmenter_run, scans, tmp_path):
    shutil.copytree(segmenter_run / "segmenter", tmp_path / "exported")
    out = Path(predict(str(tmp_path / "exported"), str(tmp_path / "out"), input=str(scans / "new_0.nii.gz")))
    assert (out / "new_0.nii.gz").is_file()
    with pytest.raises(DataError, match="--input"):
        predict(str(tmp_path / "exported"), str(tmp_path / "more"))


def damaged(run: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(run / "segmenter", folder)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **changes}))
    return folder


def test_a_card_never_imports_what_it_names(segmenter_run, scans, tmp_path):
    for name, key in (("backbone", "backbone"), ("task", "task")):
        folder = damaged(segmenter_run, tmp_path / name, **{key: {"name": "tests.labelled.Evil"}})
        with pytest.raises(ConfigError, match=r"tests\.labelled\.Evil"):
            predict(str(folder), str(tmp_path / "out"), input=str(scans))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"labels": None}, {"labels": {"0": "background", "1": "a"}}, {"intensity": 3}])
def test_a_card_that_does_not_fit_its_weights_is_refused(segmenter_run, scans, tmp_path, changes):
    folder = damaged(segmenter_run, tmp_path / "damaged", **changes)
    with pytest.raises((CheckpointError, ConfigError)):
        predict(str(folder), str(tmp_path / "out"), input=str(scans))
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_no_segmenter_and_that_is_said(segmenter_run, scans, tmp_path):
    folder = damaged(segmenter_run, tmp_path / "encoder")
    card = json.loads((folder / "card.json").read_text())
    del card["task"]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="no segmenter or classifier but an encoder"):
        predict(str(folder), str(tmp_path / "out"), input=str(scans))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 1.0}, "overlap"),
        ({"batch_size": 0}, "batch size"),
        ({"accelerator": "tpu"}, "accelerator"),
        ({"min_component_ml": -1.0}, "min_component_ml"),
        ({"largest_component": ["bal"]}, "'bal'.*ball"),
        ({"weights": []}, "--weights is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(segmenter_run, scans, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        predict(**{"weights": str(segmenter_run), "out": str(tmp_path / "out"), "input": str(scans), **changes})
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_inputs_are_refused(segmenter_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(DataError, match=name):
            predict(str(segmenter_run), str(tmp_path / "out"), input=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def other_run(segmenter_run, tmp_path_factory) -> Path:
    """A segmenter of the same labels and settings with slightly other weights."""
    folder = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(segmenter_run / "segmenter", folder / "segmenter")
    state = load_file(folder / "segmenter" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    changed = {
        key: value * (1 + 0.05 * torch.randn(value.shape, generator=generator)) if value.is_floating_point() else value
        for key, value in state.items()
    }
    save_file(changed, folder / "segmenter" / "model.safetensors")
    return folder


def probabilities_of(weights, scans, out: Path) -> np.ndarray:
    predict(weights, str(out), input=str(scans / "new_0.nii.gz"), probabilities=True)
    return np.asarray(nibabel.load(out / "new_0_probabilities.nii.gz").dataobj)


def test_several_runs_are_an_ensemble_of_their_probabilities(segmenter_run, other_run, scans, tmp_path):
    one = probabilities_of(str(segmenter_run), scans, tmp_path / "one")
    two = probabilities_of(str(other_run), scans, tmp_path / "two")
    both = probabilities_of([str(segmenter_run), str(other_run)], scans, tmp_path / "both")
    assert np.abs(one - two).max() > 0.02
    # Blended in windows as probabilities instead of logits, hence not to the last digit.
    assert np.abs(both - (one + two) / 2).mean() < 0.01
    content = listing(tmp_path / "both")
    assert content["weights"] == [str(segmenter_run), str(other_run)]
    assert content["weights_digest"] not in (
        listing(tmp_path / "one")["weights_digest"],
        listing(tmp_path / "two")["weights_digest"],
    )


def test_networks_that_do_not_belong_together_are_refused(segmenter_run, other_run, scans, tmp_path):
    out, scan = str(tmp_path / "out"), str(scans)
    renamed = damaged(other_run, tmp_path / "renamed", labels={"0": "background", "2": "ball", "5": "heart"})
    resampled = damaged(other_run, tmp_path / "resampled", spacing_mm=[2.0, 2.0, 2.0])
    mapped = damaged(other_run, tmp_path / "mapped", intensity={"kind": "window", "window": [0.0, 1.0]})
    for other, what in ((renamed, "labels"), (resampled, "voxel size"), (mapped, "intensities")):
        with pytest.raises(ConfigError, match=f"has other {what}"):
            predict([str(segmenter_run), str(other)], out, input=scan)
    with pytest.raises(ConfigError, match="same weights"):
        predict([str(segmenter_run), str(segmenter_run / "segmenter")], out, input=scan)
    assert not (tmp_path / "out").exists()


def test_runs_are_an_ensemble_of_the_cases_that_all_of_them_held_out_and_of_no_others(
    segmenter_run, other_run, tmp_path
):
    weights = [str(segmenter_run), str(other_run)]
    split = json.loads((segmenter_run / "split.json").read_text())
    exchanged = {"train": [*split["train"][1:], split["val"][0]], "val": [split["train"][0], *split["val"][1:]]}
    (other_run / "split.json").write_text(json.dumps(exchanged))
    with pytest.raises(ConfigError, match=r"held out different cases.*--input"):
        predict(weights, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    shutil.copy(segmenter_run / "split.json", other_run)
    out = predict(weights, str(tmp_path / "out"))
    assert [case["id"] for case in listing(Path(out))["cases"]] == [case["id"] for case in split["val"]]
    (other_run / "split.json").unlink()


def test_held_out_cases_keep_their_ids_in_their_list(tmp_path):
    cases = [
        # As nnU-Net names them, as a folder of slices and as one of two files of a name.
        Case(
            id="brain_1",
            images=(str(tmp_path / "brain_1_0000.nii.gz"), str(tmp_path / "brain_1_0001.nii.gz")),
            patient="a",
        ),
        Case(id="NCP_7_12", images=(str(tmp_path / "NCP" / "7" / "12"),), patient="7"),
        Case(id="first_ct", images=(str(tmp_path / "first" / "ct.nii.gz"),), patient="first_ct"),
    ]
    run = Run.create(tmp_path / "run", command="finetune", settings={}, inputs={})
    write_split(run, Split(train=(), val=tuple(cases)))
    assert held_out_cases(tmp_path / "run") == cases
    assert input_cases(str(tmp_path / "run" / "held_out.csv")) == cases


def test_probabilities_lie_beside_the_label_map_and_decide_it(segmenter_run, scans, tmp_path):
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=str(scans), probabilities=True))
    content = listing(out)
    assert content["channels"] == ["background", "ball", "core"]
    assert [case["probabilities"] for case in content["cases"]] == [f"new_{i}_probabilities.nii.gz" for i in range(3)]
    image = nibabel.load(out / "new_0_probabilities.nii.gz")
    values = np.asarray(image.dataobj)
    labels = nibabel.load(out / "new_0.nii.gz")
    assert values.dtype == np.float32 and values.shape == (*labels.shape, 3)
    assert np.array_equal(image.affine, labels.affine)
    assert np.allclose(values.sum(-1), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 2, 5])[values.argmax(-1)], np.asarray(labels.dataobj))


def test_probabilities_asked_for_later_are_made_then(segmenter_run, scans, tmp_path, capsys):
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=str(scans)))
    assert not list(out.glob("*probabilities*"))
    predict(str(segmenter_run), str(out), input=str(scans), probabilities=True)
    assert len(list(out.glob("*probabilities*"))) == 3
    capsys.readouterr()
    predict(str(segmenter_run), str(out), input=str(scans), probabilities=True)
    assert "3 of them before" in capsys.readouterr().out


def test_components_are_cleaned_by_name_and_by_volume(segmenter_run, tmp_path):
    first, second = ball_scan(80)[0], ball_scan(81)[0]
    # A second ball, cut in half: the smaller component of both labels.
    write_scan(tmp_path / "scan.nii.gz", np.concatenate([first, second[:11]], axis=0))
    runs = {
        "all": {},
        "balls": {"largest_component": ["ball"]},
        "both": {"largest_component": True},
        "large": {"min_component_ml": 0.3},
    }
    found = {}
    for name, settings in runs.items():
        out = Path(predict(str(segmenter_run), str(tmp_path / name), input=str(tmp_path / "scan.nii.gz"), **settings))
        found[name] = np.asarray(nibabel.load(out / "scan.nii.gz").dataobj)
    parts = {
        name: [ndimage.label(labels == v, np.ones((3, 3, 3)))[1] for v in (2, 5)] for name, labels in found.items()
    }
    assert min(parts["all"]) > 1
    assert parts["balls"][0] == 1 and parts["balls"][1] == parts["all"][1]
    assert parts["both"] == [1, 1]
    voxel_ml = 1.2e-3
    sizes = np.bincount(ndimage.label(found["large"] == 2, np.ones((3, 3, 3)))[0].ravel())[1:]
    assert len(sizes) and (sizes * voxel_ml >= 0.3).all()
    with pytest.raises(ConfigError, match="largest_component"):
        predict(str(segmenter_run), str(tmp_path / "all"), input=str(tmp_path / "scan.nii.gz"), largest_component=True)


def test_the_format_can_be_chosen(segmenter_run, scans, tmp_path):
    scan = str(scans / "new_0.nii.gz")
    reference = None
    for form in ("nii.gz", "nrrd", "mha"):
        out = Path(predict(str(segmenter_run), str(tmp_path / form), input=scan, format=form))
        written = read_volume(str(out / f"new_0.{form}"), label=True)
        reference = written if reference is None else reference
        assert np.array_equal(written.array, reference.array) and np.allclose(written.affine, reference.affine)


def test_dicom_seg_is_for_dicom_series_alone(segmenter_run, scans, tmp_path):
    with pytest.raises(ConfigError, match=r"new_0.nii.gz is no DICOM series"):
        predict(str(segmenter_run), str(tmp_path / "out"), input=str(scans), format="dicom_seg")
    assert not (tmp_path / "out").exists()


def test_a_dicom_series_becomes_a_dicom_seg(segmenter_run, shared_data, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    series = str(tmp_path / "cip_ct64")
    shutil.copytree(shared_data / "dicom" / "cip_ct64", series, ignore=shutil.ignore_patterns("*.nrrd", "*.csv"))
    seg = Path(predict(str(segmenter_run), str(tmp_path / "seg"), input=series, format="dicom_seg", overlap=0.0))
    nifti = Path(predict(str(segmenter_run), str(tmp_path / "nifti"), input=series, overlap=0.0))
    assert listing(seg)["cases"][0]["prediction"] == "cip_ct64.dcm"
    read = highdicom.seg.segread(seg / "cip_ct64.dcm")
    assert [read.get_segment_description(number).segment_label for number in (1, 2)] == ["ball", "core"]
    labels = read_volume(str(nifti / "cip_ct64.nii.gz"), label=True).array
    volume = read.get_volume(combine_segments=True).array
    assert [(volume == number).sum() for number in (1, 2)] == [(labels == value).sum() for value in (2, 5)]


def test_what_gives_no_dicom_seg_is_listed_beside_the_series_that_do(segmenter_run, shared_data, scans, tmp_path):
    pytest.importorskip("highdicom")
    series = str(tmp_path / "cip_ct64")
    shutil.copytree(shared_data / "dicom" / "cip_ct64", series, ignore=shutil.ignore_patterns("*.csv"))
    tilted = str(shared_data / "dicom" / "ge_tilt_head")
    inputs = [tilted, str(scans / "new_0.nii.gz"), series]  # The NRRD among its slices holds labels.
    with pytest.raises(DataError, match="2 of 3 scans could not be segmented"):
        predict(str(segmenter_run), str(tmp_path / "seg"), input=inputs, format="dicom_seg", overlap=0.0)
    content = listing(tmp_path / "seg")
    assert [case["prediction"] for case in content["cases"]] == ["cip_ct64.dcm"]
    reasons = " ".join(case["reason"] for case in content["failed"])
    assert "tilted by 18.5 degrees" in reasons and reasons.count("is no DICOM series") == 1


def test_images_called_like_the_channels_of_a_network_are_one_input(scans, tmp_path):
    for name in ("a-t1c", "a-t2f", "b-t1c", "b-t2f"):
        (tmp_path / name[0]).mkdir(exist_ok=True)
        shutil.copy(scans / "new_0.nii.gz", tmp_path / name[0] / f"{name}.nii.gz")
    with pytest.warns(UserWarning, match="the images of a case are its channels t2f, t1c"):
        cases = input_cases(str(tmp_path), channels=("t2f", "t1c"))
    assert [(case.id, [Path(image).name for image in case.images]) for case in cases] == [
        (name, [f"{name}-t2f.nii.gz", f"{name}-t1c.nii.gz"]) for name in "ab"
    ]


def test_a_dicom_series_and_foreign_formats_get_label_maps_on_their_grids(segmenter_run, shared_data, tmp_path):
    inputs = [shared_data / "dicom" / "cip_ct64", shared_data / "formats" / "cip" / "ct-64.nrrd"]
    out = Path(predict(str(segmenter_run), str(tmp_path / "out"), input=[str(path) for path in inputs], overlap=0.25))
    rows = {case["id"]: case for case in listing(out)["cases"]}
    assert rows["cip_ct64"]["prediction"] == "cip_ct64.nii.gz" and rows["ct-64"]["prediction"] == "ct-64.nrrd"
    for case in rows.values():
        scan = read_volume(case["images"][0])
        predicted = read_volume(str(out / case["prediction"]), label=True)
        assert predicted.array.shape == scan.array.shape
        assert np.allclose(predicted.affine, scan.affine, atol=1e-4)


def test_probabilities_that_are_interpolated_are_said_and_kept(segmenter_run, scans, tmp_path, capsys):
    run = damaged(segmenter_run, tmp_path / "resampled", spacing_mm=[1.0, 1.0, 2.0])
    write_scan(scans / "fits.nii.gz", ball_scan(60)[0], np.diag([1.0, 1.0, 2.0, 1.0]))
    content = listing(Path(predict(str(run), str(tmp_path / "out"), input=str(scans))))
    assert capsys.readouterr().out.count("interpolated linearly to each scan's own grid") == 1
    assert "1 x 1 x 2 mm" in content["resampling"] and "averaged where its voxels are larger" in content["resampling"]
    computed = {case["id"]: case.get("computed_mm") for case in content["cases"]}
    assert computed["fits"] is None and computed["new_0"] == pytest.approx([1, 1, 2], abs=0.1)


def test_nothing_is_said_of_interpolation_without_a_voxel_size(segmenter_run, scans, tmp_path, capsys):
    content = listing(Path(predict(str(segmenter_run), str(tmp_path / "out"), input=str(scans))))
    assert "interpolated" not in capsys.readouterr().out
    assert "resampling" not in content and not any("computed_mm" in case for case in content["cases"])
