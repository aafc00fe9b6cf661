"""Label maps in trees: never taken for scans, told in one warning, and paired where the layout says to which."""

import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mim3d.core.errors import DataError
from mim3d.datasets import label_maps
from mim3d.datasets.cases import CaseSet, read_cases
from mim3d.datasets.label_voxels import Voxels, voxels_of
from mim3d.datasets.references import find_pairs
from mim3d.scans.volumes import read_grid
from tests.nifti import affine_of, noise, write_nifti

SHAPE = (12, 10, 8)
OTHER_GRID = affine_of((2.0, 2.0, 2.0))


def blocks(values=(1, 2), dtype=np.uint8) -> np.ndarray:
    """A label map of some blocks."""
    array = np.zeros(SHAPE, dtype)
    for place, value in enumerate(values):
        array[2 + 4 * place : 6 + 4 * place, 2:8, 2:6] = value
    return array


def write(root: Path, *names: str) -> None:
    """Files that hold labels where their names end in !, on another grid where they end in ~; else scans."""
    for name in names:
        array = blocks() if "!" in name else noise(SHAPE)
        write_nifti(root / f"{name.rstrip('!~')}.nii.gz", array, OTHER_GRID if "~" in name else None)


def read(root: Path, **settings) -> tuple[CaseSet, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_cases(root, **settings)
    return found, [str(each.message) for each in caught]


def pairs(root: Path) -> dict[str, str | None]:
    """Image -> label of the cases, below the root and without their endings."""

    def short(path: str) -> str:
        return str(Path(path).relative_to(root)).removesuffix(".nii.gz")

    cases = read(root)[0].cases
    return {" ".join(map(short, case.images)): case.label and short(case.label) for case in cases}


LAYOUTS = {
    "kits": (["case_1/imaging", "case_1/segmentation!"], {"case_1/imaging": "case_1/segmentation"}, ["case_1"]),
    "abdomenatlas": (
        ["BDMAP_1/ct", "BDMAP_1/combined_labels!", "BDMAP_1/segmentations/liver!", "BDMAP_1/segmentations/spleen!"],
        {"BDMAP_1/ct": "BDMAP_1/combined_labels"},
        ["BDMAP_1"],
    ),
    "structures": (["s1/ct", "s1/segmentations/liver!", "s1/segmentations/spleen!"], {"s1/ct": None}, ["ct"]),
    "brats": (
        ["B-1-000/B-1-000-t1c", "B-1-000/B-1-000-t2f", "B-1-000/B-1-000-seg!"],
        {"B-1-000/B-1-000-t1c B-1-000/B-1-000-t2f": "B-1-000/B-1-000-seg"},
        ["B-1-000"],
    ),
    "lits": (["volume-0", "segmentation-0!"], {"volume-0": "segmentation-0"}, ["volume-0"]),
    "acdc": (["p1/p1_frame01", "p1/p1_frame01_gt!"], {"p1/p1_frame01": "p1/p1_frame01_gt"}, ["p1_frame01"]),
    "nested": (["train/images/a", "train/labels/a!"], {"train/images/a": "train/labels/a"}, ["a"]),
    "btcv": (["x/img/img0001", "x/label/label0001!"], {"x/img/img0001": "x/label/label0001"}, ["img0001"]),
    "suffixes": (["a_image", "a_mask!", "b_image", "b_mask!"], {"a_image": "a_mask", "b_image": "b_mask"}, ["a", "b"]),
    "alone": (["p/Smith", "p/Mask!"], {"p/Smith": "p/Mask"}, ["p"]),
    "structure": (
        ["1/1_CT", "1/1_GTV!", "2/2_CT", "2/2_GTV!"],
        {"1/1_CT": "1/1_GTV", "2/2_CT": "2/2_GTV"},
        ["1_CT", "2_CT"],
    ),
    "trees": (
        ["studies/CT-1/study_5", "masks/study_5_mask!"],
        {"studies/CT-1/study_5": "masks/study_5_mask"},
        ["study_5"],
    ),
    "segthor": (["P_1/P_1", "P_1/GT!"], {"P_1/P_1": "P_1/GT"}, ["P_1"]),
    "other grid": (["p/ct", "p/pet~", "p/seg!"], {"p/ct": "p/seg", "p/pet": None}, ["p", "pet"]),
    "other folders": (
        ["TrainingImg/t_1", "TrainingMask/t_1!"],
        {"TrainingImg/t_1": "TrainingMask/t_1"},
        ["t_1"],
    ),
    "words in folders": (["subset0/1.3", "seg-lungs-X/1.3!"], {"subset0/1.3": "seg-lungs-X/1.3"}, ["1.3"]),
    "two trees of maps": (["CT-Seg_20/c_1", "Infection_Mask/c_1!", "Lung_Mask/c_1!"], {"CT-Seg_20/c_1": None}, ["c_1"]),
    "predictions": (["p1", "p2", "pred/p1!", "pred/p2!"], {"p1": "pred/p1", "p2": "pred/p2"}, ["p1", "p2"]),
    "above": (["U/1/pre/FLAIR", "U/1/wmh!"], {"U/1/pre/FLAIR": None}, ["FLAIR"]),
    "derivatives": (
        ["sub-1/anat/sub-1_T1w", "derivatives/labels/sub-1/anat/sub-1_T1w_lesion-manual!"],
        {"sub-1/anat/sub-1_T1w": "derivatives/labels/sub-1/anat/sub-1_T1w_lesion-manual"},
        ["sub-1"],
    ),
    "channel numbers": (
        ["A/images/x_1_0000", "A/labels/x_1!", "A/images/x_2_0000", "B/x_3_0000"],
        {"A/images/x_1_0000": "A/labels/x_1", "A/images/x_2_0000": None, "B/x_3_0000": None},
        ["x_1_0000", "x_2_0000", "x_3_0000"],
    ),
    "unlike names": (["imagesTr/C-1__CT", "labelsTr/C-1!"], {"imagesTr/C-1__CT": "labelsTr/C-1"}, ["C-1"]),
    "sequences": (
        ["images/1/1_1_t2w", "images/1/1_1_adc~", "labels/human/1_1!"],
        {"images/1/1_1_adc": None, "images/1/1_1_t2w": "labels/human/1_1"},
        ["1_1_adc", "1_1_t2w"],
    ),
    "verse": (
        ["rawdata/sub-v1/sub-v1_ct", "derivatives/sub-v1/sub-v1_seg-vert_msk!"],
        {"rawdata/sub-v1/sub-v1_ct": "derivatives/sub-v1/sub-v1_seg-vert_msk"},
        ["sub-v1"],
    ),
    "bids": (
        ["sub-1/dwi/sub-1_dwi", "sub-1/dwi/sub-1_adc", "sub-1/anat/sub-1_FLAIR~", "derivatives/sub-1/sub-1_msk!"],
        {"sub-1/anat/sub-1_FLAIR": None, "sub-1/dwi/sub-1_adc sub-1/dwi/sub-1_dwi": "derivatives/sub-1/sub-1_msk"},
        ["sub-1_FLAIR", "sub-1"],
    ),
    "skull": (
        ["s/T1", "s/T1_brain", "s/T1_brain_mask!"],
        {"s/T1": None, "s/T1_brain": "s/T1_brain_mask"},
        ["T1", "brain"],
    ),
    "sliver": (["liver-orig1", "liver-seg1!"], {"liver-orig1": "liver-seg1"}, ["liver-1"]),
    "by voxels": (["p/ct", "p/aorta!", "p/heart!~"], {"p/ct": None}, ["ct"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_people_use_are_read(tmp_path, name):
    files, expected, ids = LAYOUTS[name]
    write(tmp_path, *files)
    assert pairs(tmp_path) == expected
    found, said = read(tmp_path)
    assert [case.id for case in found.cases] == ids
    assert len(said) == 1
    assert said == list(found.notes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_alone_are_the_same_images_without_any_label_map(tmp_path, name):
    files, expected, _ = LAYOUTS[name]
    write(tmp_path, *files)
    found, said = read(tmp_path, recursive_images_only=True)
    images = [str(Path(case.images[0]).relative_to(tmp_path)).removesuffix(".nii.gz") for case in found.cases]
    assert sorted(images) == sorted(image for case in expected for image in case.split())
    assert all(case.label is None and len(case.images) == 1 for case in found.cases)
    assert len(said) == 1
    assert f"label maps left out, since they are no scans: {sum('!' in file for file in files)} (" in said[0]
    # Folds that are drawn of labelled cases must hold out the same patients here.
    patients = {image: case.patient for case in read(tmp_path)[0].cases for image in case.images}
    assert {case.images[0]: case.patient for case in found.cases} == patients


def test_masks_of_single_structures_are_counted_and_the_remedy_is_said(tmp_path):
    write(tmp_path, *LAYOUTS["structures"][0])
    (note,) = read(tmp_path)[0].notes
    assert "label maps left out, since they are no scans: 2 (s1/segmentations/liver.nii.gz, " in note
    assert "one label map of all its structures" in note


def test_channels_of_a_case_are_named(tmp_path):
    write(tmp_path, *LAYOUTS["brats"][0])
    assert read(tmp_path)[0].channels == ("t1c", "t2f")


def test_cases_of_different_channels_are_not_made_one(tmp_path):
    write(tmp_path, "a/a_t1c", "a/a_t2f", "a/a_seg!", "b/b_t1c", "b/b_flair", "b/b_seg!")
    found, said = read(tmp_path)
    assert [len(case.images) for case in found.cases] == [1, 1, 1, 1]
    assert {case.patient for case in found.cases} == {"a", "b"}
    assert "label maps left out, since they are no scans: 2 (" in said[0]


@pytest.mark.parametrize(
    "files",
    [
        ["a/t1", "a/t2", "b/t1", "b/t2"],
        ["scan_1", "scan_2", "unlabelled_3", "masked_4", "segal"],
        ["Smith", "Jones"],
    ],
)
def test_scans_without_label_maps_are_read_as_ever_without_a_word_of_any(tmp_path, files):
    write(tmp_path, *files)
    found, said = read(tmp_path)
    assert ([len(case.images) for case in found.cases], found.form) == ([1] * len(files), "folder")
    assert not any("label map" in each for each in said)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (blocks(), Voxels.SMALL_LABELS),
        (blocks((255,)), Voxels.SMALL_LABELS),
        (blocks(dtype=np.float32), Voxels.SMALL_LABELS),
        (blocks((1, 700), np.int16), Voxels.LABELS),
        (np.zeros(SHAPE, np.int16), Voxels.LABELS),
        (np.repeat(np.arange(12), 80).reshape(SHAPE).astype(np.uint8), Voxels.SMALL_LABELS),
        (np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (9, 1, 5)), Voxels.LABELS),
        (np.full(SHAPE, 7, np.int16), Voxels.UNCLEAR),
        (blocks(dtype=np.float32) * np.float32(0.9999), Voxels.SMALL_LABELS),
        (blocks(dtype=np.float32) * np.float32(1.000001), Voxels.SMALL_LABELS),
        (noise(SHAPE).astype(np.float32) * np.float32(1e-7), Voxels.IMAGE),
        (blocks((1, 0.5), np.float32), Voxels.SHARES),
        (noise(SHAPE), Voxels.IMAGE),
        (np.random.default_rng(0).integers(0, 200, SHAPE).astype(np.uint8), Voxels.IMAGE),
        (blocks((300, 1000), np.int16) - np.int16(1000), Voxels.UNCLEAR),
    ],
)
def test_labels_are_told_from_images_by_their_voxels(tmp_path, array, expected):
    assert voxels_of(str(write_nifti(tmp_path / "x.nii.gz", array))) is expected


@pytest.mark.parametrize(
    "files",
    [
        ["mask_wearing_patient", "segment_03_ct"],
        ["labels_study/p1", "labels_study/p2", "other_study/p1"],
        ["Label/p1", "p1"],
        ["GT_001", "GT_002"],
        ["GT_001/ct", "AB_001/ct"],
        ["Lesion/roi_1", "Lesion/roi_2", "Kidney/roi_1"],
    ],
)
def test_scans_that_are_called_label_maps_are_scans(tmp_path, files):
    write(tmp_path, *files)
    for settings in ({}, {"recursive_images_only": True}):
        found, said = read(tmp_path, **settings)
        assert len(found.cases) == len(files)
        assert not any("label map" in each for each in said)


@pytest.mark.parametrize("values", [(300, 1000), (100, 200)])
def test_a_phantom_of_few_large_values_is_a_scan(tmp_path, values):
    for number in range(3):
        write_nifti(tmp_path / f"phantom_{number}.nii.gz", blocks(values, np.int16))
    assert len(read(tmp_path)[0].cases) == 3


def test_a_broken_label_map_among_good_ones_is_no_scan(tmp_path):
    write(tmp_path, "1/ct", "1/seg!", "2/ct", "2/seg!", "3/ct", "3/seg")
    assert pairs(tmp_path) == {f"{number}/ct": f"{number}/seg" for number in (1, 2, 3)}


def test_probabilities_are_neither_scans_nor_labels(tmp_path):
    write(tmp_path, "p1", "p2")
    for number in (1, 2):
        write_nifti(tmp_path / f"p{number}_prob.nii.gz", blocks((0.2, 0.7), np.float32))
    found, said = read(tmp_path)
    assert [(case.id, case.label) for case in found.cases] == [("p1", None), ("p2", None)]
    assert "left out, since they are no scans: 2 (p1_prob" in said[0]


def test_what_is_told_by_voxels_alone_can_be_put_right(tmp_path):
    write(tmp_path, "p1/ct", "p1/aorta!", "p1/heart!")
    assert "if those are scans, list them as image in a CSV" in read(tmp_path)[1][0]


@pytest.mark.parametrize("files", [["a_seg!", "b_seg!"], ["labelsTr/a!", "labelsTr/b!"], ["tumour_1!", "tumour_2!"]])
def test_label_maps_alone_are_refused_whatever_they_are_called(tmp_path, files):
    write(tmp_path, *files)
    for settings in ({}, {"recursive_images_only": True}):
        with pytest.raises(DataError, match="only label maps in here, such as"):
            read_cases(tmp_path, **settings)


def test_a_file_that_cannot_be_read_stays_a_scan_whose_fault_is_found_when_it_is_used(tmp_path):
    write(tmp_path, "p/ct")
    (tmp_path / "p" / "broken.nii.gz").write_bytes(b"no gzip")
    assert len(read(tmp_path)[0].cases) == 2
    assert voxels_of(str(tmp_path / "p" / "broken.nii.gz")) is Voxels.UNCLEAR


def test_what_a_file_leaves_open_is_said_when_it_is_used_not_when_it_is_looked_into(tmp_path):
    for name in ("scan_1.nii", "other.nii"):
        nibabel.save(nibabel.Nifti1Image(noise(SHAPE), None), tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_cases(tmp_path).cases) == 2
    with pytest.warns(UserWarning, match=r"other\.nii: .*sform_code are 0"):
        read_grid(tmp_path / "other.nii")


def test_few_files_of_each_kind_are_looked_into(tmp_path, monkeypatch):
    write(tmp_path, *(f"p{number}/{name}" for number in range(9) for name in ("ct", "aorta!")))
    looked = []
    monkeypatch.setattr(label_maps, "voxels_of", lambda path: looked.append(path) or voxels_of(path))
    assert len(read(tmp_path)[0].cases) == 9
    assert len(looked) == 4


def test_the_label_maps_of_a_tree_are_references(tmp_path):
    write(tmp_path / "set", "case_1/imaging", "case_1/segmentation!")
    write(tmp_path / "pred", "case_1!")
    found = find_pairs(str(tmp_path / "pred"), str(tmp_path / "set"))
    assert [(pair.id, Path(pair.reference).name) for pair in found.pairs] == [("case_1", "segmentation.nii.gz")]


def test_folders_of_validation_beside_those_that_are_read_are_named(tmp_path):
    write(
        tmp_path,
        *(
            f"{kind}{part}/{part}{end}"
            for part in ("Tr", "Va", "Ts")
            for kind, end in (("images", ""), ("labels", "!"))
        ),
    )
    found, said = read(tmp_path)
    assert [case.id for case in found.cases] == ["Tr"]
    assert len(said) == 1
    assert "imagesVa, labelsVa not read beside imagesTr, labelsTr" in said[0]


def test_labels_that_nothing_pairs_are_refused(tmp_path):
    write(tmp_path, "images/a", "labels/x!", "labels/y!")
    with pytest.raises(
        DataError, match=r"no image of the same name in .* for x, y; a label must be named like its image"
    ):
        read_cases(tmp_path)


@pytest.mark.parametrize("labelled", [True, False])
def test_scans_in_the_folder_of_one_patient_are_that_patients(tmp_path, labelled):
    for number, frames in ((1, ("01", "12")), (2, ("01", "09"))):
        for frame in frames:
            name = f"patient{number}/patient{number}_frame{frame}"
            write(tmp_path, name, *([f"{name}_gt!"] if labelled else []))
    assert [case.patient for case in read(tmp_path)[0].cases] == ["patient1"] * 2 + ["patient2"] * 2


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("meta.csv", "image_id;age;split", "meta.csv (split)"),
        ("labels.csv", "name,Patient_ID,class", "labels.csv (Patient_ID, class)"),
        ("participants.tsv", "participant_id\tage\tsex", None),
        ("notes.csv", "name,age", None),
    ],
)
def test_tables_that_say_something_of_the_scans_are_named(tmp_path, name, header, said):
    write(tmp_path, "p1", "p2")
    (tmp_path / name).write_text(f"{header}\n1\n")
    notes = [note for note in read(tmp_path)[1] if "tables beside the scans are not read" in note]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


@pytest.mark.parametrize("labelled", [True, False])
def test_images_called_like_the_channels_of_a_network_are_one_scan(tmp_path, labelled):
    for case in ("B-1", "B-2"):
        write(
            tmp_path,
            *(f"{case}/{case}-{name}" for name in ("t1c", "t1n", "T2F")),
            *([f"{case}/{case}-seg!"] * labelled),
        )
    (tmp_path / "B-2" / "B-2-t1c.nii.gz").unlink()
    found, said = read(tmp_path, recursive_images_only=True, channels=("t2f", "t1c"))
    names = [[Path(path).name.removesuffix(".nii.gz") for path in case.images] for case in found.cases]
    assert names == [["B-1-T2F", "B-1-t1c"], ["B-2-T2F"]]
    assert [case.id for case in found.cases] == ["B-1", "B-2"]
    assert "the images of a case are its channels t2f, t1c; images that are none of these are left out: 2" in said[0]


def test_images_of_other_names_than_the_channels_of_a_network_are_scans_each(tmp_path):
    write(tmp_path, "a/x", "a/y")
    found, said = read(tmp_path, recursive_images_only=True, channels=("t2f", "t1c"))
    assert ([len(case.images) for case in found.cases], said) == ([1, 1], [])
