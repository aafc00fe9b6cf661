"""Prediction as a command: on the scan's own grid, resumable, one bad scan never stops the others."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from mim3d.commands.predict import predict
from mim3d.commands.predictions import input_cases
from mim3d.data.volumes import read_volume
from mim3d.errors import CheckpointError, ConfigError, DataError
from tests.labelled import ball_scan, write_scan


def listing(out: Path) -> dict:
    return json.loads((out / "predictions.json").read_text())


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    return 2 * ((predicted > 0) & (reference > 0)).sum() / ((predicted > 0).sum() + (reference > 0).sum())


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


def test_scans_of_two_folders_with_one_name_are_told_apart(segmenter_run, tmp_path):
    for folder in ("first", "second"):
        write_scan(tmp_path / folder / "ct.nii.gz", ball_scan(1)[0])
    found = input_cases([str(tmp_path / "first"), str(tmp_path / "second")])
    assert [case.id for case in found] == ["first_ct", "second_ct"]
    with pytest.raises(DataError, match="would both be written"):
        input_cases([str(tmp_path / "first"), str(tmp_path / "first")])


def test_channels_that_do_not_match_are_a_reason(segmenter_run, tmp_path):
    for name in ("a", "b"):
        write_scan(tmp_path / f"{name}.nii.gz", ball_scan(1)[0])
    (tmp_path / "two.csv").write_text("image\na.nii.gz;b.nii.gz\n")
    with pytest.raises(DataError, match=r"2 images \(channels\).*trained on 1"):
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
    with pytest.raises(CheckpointError, match="no segmenter but an encoder"):
        predict(str(folder), str(tmp_path / "out"), input=str(scans))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"overlap": 1.0}, "overlap"), ({"batch_size": 0}, "batch size"), ({"accelerator": "tpu"}, "accelerator")],
)
def test_settings_that_cannot_work_are_refused_before_any_work(segmenter_run, scans, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        predict(str(segmenter_run), str(tmp_path / "out"), input=str(scans), **changes)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_inputs_are_refused(segmenter_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(DataError, match=name):
            predict(str(segmenter_run), str(tmp_path / "out"), input=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


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
