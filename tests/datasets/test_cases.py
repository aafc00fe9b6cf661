"""Every folder form of DATA becomes the cases a user expects."""

import json
from pathlib import Path

import numpy as np
import pytest

from mim3d.core.errors import DataError
from mim3d.datasets.cases import read_cases
from mim3d.datasets.usable import fault_of
from mim3d.scans.volumes import read_grid
from tests.nifti import noise, write_nifti


def touch(folder: Path, *names: str) -> None:
    """Files that reading cases never opens."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def describe(folder: Path, **content) -> Path:
    """Write a dataset.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dataset.json"
    path.write_text(json.dumps(content))
    return path


def ids(data: Path, **settings) -> list[str]:
    """Ids of a data set in order."""
    return [case.id for case in read_cases(data, **settings).cases]


def test_a_folder_of_scans_is_read_at_any_depth_without_hidden_files(tmp_path):
    touch(tmp_path, "b.nii.gz", "deep/er/a.nrrd", "._b.nii.gz", "notes.txt")
    found = read_cases(tmp_path)
    assert [case.id for case in found.cases] == ["b", "a"]
    assert found.form == "folder"
    assert all(case.label is None and case.patient == case.id for case in found.cases)
    assert all(Path(path).is_absolute() for case in found.cases for path in case.images)


def test_scans_of_one_name_in_several_folders_are_told_apart_by_their_folder(tmp_path):
    touch(tmp_path, "p1/ct.nii.gz", "p2/ct.nii.gz", "p3/mr.nii.gz")
    assert ids(tmp_path) == ["p1_ct", "p2_ct", "mr"]


def test_scans_that_differ_by_their_ending_alone_are_told_apart_by_it_and_are_one_patients(tmp_path):
    touch(tmp_path, "a/x.nii", "a/x.nii.gz", "a/y.mha", "b/y.nrrd", "a/z.nii")
    with pytest.warns(UserWarning, match="2 scans share the name of another but for its ending"):
        cases = read_cases(tmp_path).cases
    assert [case.id for case in cases] == ["a_x_nii", "a_x_nii_gz", "a_y", "z", "b_y"]
    assert [case.patient for case in cases] == ["a_x", "a_x", "a_y", "z", "b_y"]


@pytest.mark.parametrize("labels", ["labels", "masks", "labelsTr"])
def test_images_beside_labels_are_paired_by_name(tmp_path, labels):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", f"{labels}/a.nii.gz", f"{labels}/b.nii")
    cases = read_cases(tmp_path).cases
    assert [Path(case.label).name for case in cases] == ["a.nii.gz", "b.nii"]


def test_a_label_without_its_image_is_a_case_whose_missing_image_is_named(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/lonely.nii.gz")
    lonely = read_cases(tmp_path).cases[1]
    assert lonely.id == "lonely" and lonely.label is not None
    with pytest.raises(DataError, match=r"images/lonely\.nii\.gz"):
        read_grid(lonely.images[0])


def test_a_decathlon_folder_gives_its_training_cases_and_label_names(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/._a.nii.gz", "imagesTs/t.nii.gz")
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    hidden = {"image": "./imagesTr/._a.nii.gz", "label": "./labelsTr/._a.nii.gz"}
    path = describe(
        tmp_path, labels={"0": "background", "1": "liver"}, training=[entry, hidden], test=["./imagesTs/t.nii.gz"]
    )
    for data in (tmp_path, path):
        found = read_cases(data)
        assert found.form == "msd"
        assert found.labels == {0: "background", 1: "liver"}
        assert [case.id for case in found.cases] == ["a"]
        assert found.cases[0].label == str(tmp_path / "labelsTr/a.nii.gz")


def test_a_decathlon_folder_without_description_is_paired_by_name(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    found = read_cases(tmp_path)
    assert (found.form, found.labels, len(found.cases)) == ("msd", {}, 1)


def test_images_only_never_takes_a_label_map_for_a_scan(tmp_path):
    touch(tmp_path / "one", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    touch(tmp_path / "two", "images/b.nii.gz", "masks/b.nii.gz")
    touch(tmp_path / "three", "s1/ct.nii.gz", "s1/segmentations/liver.nii.gz")
    assert ids(tmp_path) == ["a", "ct", "b"]
    for folder in ("one", "two", "three"):
        found = read_cases(tmp_path / folder, recursive_images_only=True)
        assert len(found.cases) == 1
        assert found.cases[0].label is None
    assert ids(tmp_path / "one" / "imagesTr") == ["a"]


def test_an_nnunet_folder_gives_channels_in_order(tmp_path):
    touch(tmp_path, *(f"imagesTr/c{case}_{channel:04d}.nii.gz" for case in (1, 2) for channel in (1, 0)))
    touch(tmp_path, "labelsTr/c1.nii.gz")
    labels = {"background": 0, "edema": 1, "ignore": 2}
    describe(tmp_path, channel_names={"0": "T1", "1": "T2"}, labels=labels, file_ending=".nii.gz", numTraining=2)
    found = read_cases(tmp_path)
    assert found.form == "nnunet"
    assert found.labels == {0: "background", 1: "edema"}
    assert (found.ignore_label, found.channels) == (2, ("T1", "T2"))
    assert [[Path(path).name for path in case.images] for case in found.cases] == [
        ["c1_0000.nii.gz", "c1_0001.nii.gz"],
        ["c2_0000.nii.gz", "c2_0001.nii.gz"],
    ]
    assert [case.label is None for case in found.cases] == [False, True]


def test_an_nnunet_case_without_a_channel_is_named(tmp_path):
    touch(tmp_path, "imagesTr/c1_0000.nii.gz", "imagesTr/c1_0001.nii.gz", "imagesTr/c2_0000.nii.gz")
    describe(tmp_path, channel_names={"0": "T1", "1": "T2"}, labels={}, file_ending=".nii.gz")
    found = read_cases(tmp_path)
    assert [case.id for case in found.cases] == ["c1", "c2"]
    fault = fault_of(found.cases[1])
    assert fault is not None and "c2_000" in fault


def test_a_label_without_an_image_is_a_case_that_cannot_be_used(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    found = read_cases(tmp_path)
    assert [case.id for case in found.cases] == ["a", "b"]
    assert fault_of(found.cases[1]).endswith(
        "images/b.nii.gz: no such file; check the path and that the disk is mounted."
    )
    (tmp_path / "labels" / "a.nii.gz").unlink()
    with pytest.raises(DataError, match="a label must be named like its image"):
        read_cases(tmp_path)


def test_nnunet_regions_declare_their_values(tmp_path):
    touch(tmp_path, "imagesTr/c_0000.nii.gz")
    describe(tmp_path, channel_names={"0": "T1"}, labels={"background": 0, "whole": [1, 2], "core": [2]})
    assert read_cases(tmp_path).labels == {0: "background", 1: "label_1", 2: "label_2"}


def test_nnunet_1_names_without_channel_numbers_find_their_channels(tmp_path):
    touch(tmp_path, "imagesTr/c_0000.nii.gz", "imagesTr/c_0001.nii.gz", "labelsTr/c.nii.gz")
    describe(tmp_path, labels={"1": "x"}, training=[{"image": "./imagesTr/c.nii.gz", "label": "./labelsTr/c.nii.gz"}])
    (case,) = read_cases(tmp_path).cases
    assert case.id == "c"
    assert len(case.images) == 2


def test_numbered_slices_of_names_are_cases_not_channels_in_a_plain_folder(tmp_path):
    touch(tmp_path, "scan_0001.nii.gz", "scan_0002.nii.gz")
    assert ids(tmp_path) == ["scan_0001", "scan_0002"]


def test_an_image_folder_of_nnunet_is_grouped_by_case(tmp_path):
    touch(tmp_path, "imagesTs/c_0000.nii.gz", "imagesTs/c_0001.nii.gz")
    (case,) = read_cases(tmp_path / "imagesTs").cases
    assert (case.id, len(case.images)) == ("c", 2)


def test_a_single_scan_is_a_data_set_of_one(tmp_path):
    path = write_nifti(tmp_path / "one.nii.gz", noise())
    assert ids(path) == ["one"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["liver"], "must map values to names"),
        ({"liver": "x"}, "'x' is not a whole number"),
        ({"-1": "x"}, "not a whole number"),
        ({"a": 1, "b": 1}, "two names"),
    ],
)
def test_label_declarations_that_contradict_themselves_are_refused(tmp_path, labels, message):
    touch(tmp_path, "imagesTr/c_0000.nii.gz")
    describe(tmp_path, channel_names={"0": "CT"}, labels=labels)
    with pytest.raises(DataError, match=message):
        read_cases(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "no such file or folder; check the path"),
        (lambda folder: folder, "no scan in here"),
        (lambda folder: describe(folder, training=[]), 'needs a list "training"'),
        (lambda folder: describe(folder, training=[{"label": "x"}]), "no column 'image'"),
    ],
)
def test_data_without_cases_is_one_clear_sentence(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        read_cases(make(tmp_path))


def test_a_folder_of_archives_says_that_they_are_not_opened(tmp_path):
    touch(tmp_path, "patient/study.zip")
    with pytest.raises(DataError, match="Archives are not opened; unpack study"):
        read_cases(tmp_path)


def test_broken_json_names_its_line(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"labels":\n oops}')
    with pytest.raises(DataError, match="line 2"):
        read_cases(path)


def test_real_sets_are_read_in_full(shared_data):
    hippocampus = read_cases(shared_data / "hippocampus")
    assert (hippocampus.form, len(hippocampus.cases)) == ("msd", 185)
    assert all(case.label for case in hippocampus.cases)
    images = read_cases(shared_data / "hippocampus" / "imagesTr")
    assert len(images.cases) == 185
    assert not any(case.label for case in images.cases)
    assert len(read_cases(shared_data / "sts_ct").cases) == 32
    assert len(read_cases(shared_data / "lidc_nodules", recursive_images_only=True).cases) == 700


@pytest.mark.filterwarnings("ignore:.*[Ll]eft out")
def test_a_dicom_tree_gives_one_case_per_series_with_a_hashed_patient(shared_data):
    cases = read_cases(shared_data / "dicom").cases
    series = [case for case in cases if Path(case.images[0].split("::")[0]).is_dir()]
    # One of them is tilted: it is found like the others, and refused when it is read.
    assert len(series) == 3
    assert all(case.patient != case.id and "STS" not in case.patient for case in series)
    assert len(np.unique([case.patient for case in series])) == 3
