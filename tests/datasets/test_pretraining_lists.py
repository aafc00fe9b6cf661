"""Published pre-training lists: which scans of a tree of public sets belong to them."""

import json
import os
import re
import warnings
from pathlib import Path

import pytest

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.published.pretraining_lists import LISTS, pretraining_list


def touch(root: Path, *paths: str) -> None:
    """Files of which nothing but the name matters."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


#: An image of each set as it lies below the set's folder, by the name of the set.
IMAGES = {
    "BTCV": ("imagesTr/img0001.nii.gz", "RawData/Training/img/img0034.nii.gz"),
    "TCIA Covid19": ("volume-covid19-A-0000.nii.gz", "data/volume-covid19-A-0721_day008.nii.gz"),
    "LUNA16": ("subset0/1.3.6.1.mhd", "subset9/subset9/1.3.6.2.mhd", "subset_0/1.3.6.1.nii.gz"),
    "STOIC 2021": ("data/mha/10.mha", "nii_gz/10.nii.gz"),
    "FLARE23": ("imagesTr2200/FLARE23_0001_0000.nii.gz", "unlabeledTr1800/FLARE23_2201_0000.nii.gz"),
    "TotalSegmentator": ("s0000/ct.nii.gz", "s1405/ct.nii.gz"),
}

#: Files that lie beside the images and are none of the list's.
OTHERS = {
    "BTCV": ("labelsTr/label0001.nii.gz", "imagesTs/img0061.nii.gz", "imagesTr/img0035.nii.gz"),
    "TCIA Covid19": ("volume-covid19-A-0003_seg.nii.gz",),
    "LUNA16": ("seg-lungs-LUNA16/1.3.6.1.mhd", "annotations.csv"),
    "STOIC 2021": ("metadata/reference.csv",),
    "FLARE23": (
        "labelsTr2200/FLARE23_0001.nii.gz",
        "validation/FLARE23Ts_0001_0000.nii.gz",
        "val-gt-50cases-for-sanity-check/FLARE23Ts_0001.nii.gz",
        "imagesTr2200-pseudo-labels/FLARE23_0001.nii.gz",
    ),
    "TotalSegmentator": ("s0000/segmentations/spleen.nii.gz",),
}

FOLDERS = [(scans, folder) for scans in LISTS["all"] for folder in scans.folders]


@pytest.mark.parametrize(("scans", "folder"), FOLDERS, ids=[folder for _, folder in FOLDERS])
def test_every_accepted_folder_is_found_with_its_images_alone(scans, folder, tmp_path):
    images = IMAGES.get(scans.name, ("00001.nii.gz", "patient/study/series.nii.gz"))
    touch(tmp_path / "manifest-1600709154662" / folder, *images, *OTHERS.get(scans.name, ("notes.csv",)))
    lines: list[str] = []
    with pytest.warns(UserWarning, match="14 of the 15 sets"):
        cases = pretraining_list("all", tmp_path, log=lines.append)
    assert names(cases) == sorted(f"manifest-1600709154662/{folder}/{image}" for image in images)
    of_all = "" if scans.num_scans is None else f" of {scans.num_scans:,}"
    assert f"{scans.name} ({scans.region}): {len(images)}{of_all} scans in {tmp_path}" in "\n".join(lines)


def test_no_folder_belongs_to_two_sets():
    plain = [re.sub(r"[^a-z0-9]", "", folder.lower()) for _, folder in FOLDERS]
    assert len(plain) == len(set(plain))


@pytest.mark.parametrize(
    "scans", [scans for scans in LISTS["all"] if scans.name in IMAGES], ids=lambda scans: scans.name
)
def test_what_a_message_expects_is_what_is_read(scans):
    example = re.findall(r"\S+\.(?:nii\.gz|mhd|mha)", scans.expected)[-1]
    assert any(image.endswith(example) for image in IMAGES[scans.name])


def test_other_collections_of_like_names_are_not_taken(tmp_path):
    for folder in ("COVID-19-AR", "HNSCC-3DCT-RT", "DICOM-LIDC-IDRI-Nodules", "FLARE22", "LUNA25"):
        touch(tmp_path / folder, "00001.nii.gz", "subset0/1.mhd", "imagesTr/FLARE_0001_0000.nii.gz")
    with pytest.raises(DataError, match="holds none of the sets of the list all"):
        pretraining_list("all", tmp_path)


def test_a_folder_of_another_layout_is_told_with_what_was_expected_in_it(tmp_path):
    touch(tmp_path, "LUNA16/images/1.3.6.1.mhd")
    expected = (
        r"LUNA16: no scan of LUNA16 in here; expected the folders subset0 to subset9 with files such as .*\.mhd\.$"
    )
    with pytest.raises(DataError, match=expected):
        pretraining_list("10k", tmp_path)
    touch(tmp_path, "stoic21/data/mha/1.mha")
    with pytest.warns(UserWarning) as told:
        cases = pretraining_list("10k", tmp_path)
    assert names(cases) == ["stoic21/data/mha/1.mha"]
    assert len(told) == 2 and re.search(expected, str(told[0].message))


def test_more_scans_than_the_list_has_are_said_to_be_more(tmp_path):
    touch(tmp_path, *(f"Head-Neck-PET-CT/{index:05d}.nii.gz" for index in range(385)))
    lines: list[str] = []
    with pytest.warns(UserWarning, match="not here"):
        pretraining_list("all", tmp_path, log=lines.append)
    assert any(line.startswith("HN-PET (head and neck): 385 scans, of which the list has 384, in /") for line in lines)


@pytest.fixture
def tree(tmp_path):
    """Sets as their owners publish them, with their masks, their test scans, and other folders."""
    for number in range(1, 41):
        if not 11 <= number <= 20:
            touch(tmp_path, f"BTCV/imagesTr/img{number:04d}.nii.gz", f"BTCV/labelsTr/label{number:04d}.nii.gz")
    touch(
        tmp_path,
        "BTCV/imagesTr/._img0001.nii.gz",
        "BTCV/imagesTs/img0061.nii.gz",
        "CT-COVID-19-August2020/volume-covid19-A-0000.nii.gz",
        "CT-COVID-19-August2020/volume-covid19-A-0003_seg.nii.gz",
        "luna16/subset0/1.3.6.1.mhd",
        "luna16/subset0/1.3.6.1.raw",
        "luna16/seg-lungs-LUNA16/1.3.6.1.mhd",
        "stoic2021-training/data/mha/10.mha",
        "stoic2021-training/metadata/reference.csv",
        "FLARE23/imagesTr2200/FLARE23_0001_0000.nii.gz",
        "FLARE23/labelsTr2200/FLARE23_0001.nii.gz",
        "FLARE23/unlabeledTr1800/FLARE23_2201_0000.nii.gz",
        "FLARE23/imagesVal/FLARE23Ts_0001_0000.nii.gz",
        "public/whole body/Totalsegmentator_dataset_v201/s0000/ct.nii.gz",
        "public/whole body/Totalsegmentator_dataset_v201/s0000/segmentations/spleen.nii.gz",
        "public/whole body/Totalsegmentator_dataset_v201/s0001/ct.nii.gz",
        "a/b/c/d/HNSCC/too_deep.nii.gz",
        "our own/scan.nii.gz",
    )
    return tmp_path


def names(cases) -> list[str]:
    return sorted(os.path.relpath(case.images[0], cases.root) for case in cases.cases)


def test_the_lists_are_as_long_as_their_rows_add_up_to():
    assert sum(scans.num_scans for scans in LISTS["1k"]) == 746
    assert sum(scans.num_scans for scans in LISTS["10k"]) == 10_452
    assert sum(scans.num_scans or 0 for scans in LISTS["all"]) == 10_452 + 606 + 762 + 892 + 384 + 1730 + 2316
    assert LISTS["all"][: len(LISTS["10k"])] == LISTS["10k"]


def test_the_document_names_every_set_with_its_folders():
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "presets.md").read_text(encoding="utf-8")
    table = text.partition("## Which scans to pre-train on")[2]
    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("|")}
    for scans in LISTS["all"]:
        assert re.findall(r"`([^`]+)`", rows[scans.name]) == list(scans.folders)
        assert scans.num_scans is None or f"{scans.num_scans:,}" in rows[scans.name]


def test_images_of_the_sets_are_found_and_masks_test_scans_and_other_folders_left(tree):
    with pytest.warns(UserWarning, match=r"2 of the 8 sets of the list 10k are not here \(LIDC 589, HNSCC 1,071\)"):
        cases = pretraining_list("10k", tree)
    assert [name for name in names(cases) if not name.startswith("BTCV")] == [
        "CT-COVID-19-August2020/volume-covid19-A-0000.nii.gz",
        "FLARE23/imagesTr2200/FLARE23_0001_0000.nii.gz",
        "FLARE23/unlabeledTr1800/FLARE23_2201_0000.nii.gz",
        "luna16/subset0/1.3.6.1.mhd",
        "public/whole body/Totalsegmentator_dataset_v201/s0000/ct.nii.gz",
        "public/whole body/Totalsegmentator_dataset_v201/s0001/ct.nii.gz",
        "stoic2021-training/data/mha/10.mha",
    ]
    assert all(case.label is None for case in cases.cases) and cases.labels == {}
    assert len({case.id for case in cases.cases}) == len(cases.cases)


def test_btcv_keeps_the_24_cases_that_fold_0_trains_on(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases = pretraining_list("1k", tree)
    numbers = [int(Path(name).name[3:7]) for name in names(cases) if name.startswith("BTCV")]
    assert numbers == [*range(1, 11), *range(21, 35)]


def test_those_cases_of_btcv_are_the_published_ones(tree, shared_data):
    facts = json.loads((shared_data.parent / "facts" / "downstream_splits.json").read_text())["BTCV"]
    cases = pretraining_list("1k", tree)
    kept = [name.removeprefix("BTCV/") for name in names(cases) if name.startswith("BTCV")]
    assert kept == facts["pretraining_cases"]
    assert not set(kept) & set(facts["held_out_of_pretraining"])


def test_a_line_for_each_set_says_what_is_there(tree):
    lines: list[str] = []
    with pytest.warns(UserWarning, match="not here"):
        pretraining_list("10k", tree, log=lines.append)
    assert len(lines) == 8
    assert lines[0] == f"BTCV (abdomen): 24 of 24 scans in {tree / 'BTCV'}"
    assert lines[1].startswith("TCIA Covid19 (chest): 1 of 722 scans in ")
    assert lines[5] == "LIDC (chest): 0 of 589 scans: no folder named LIDC-IDRI, LIDC or LIDC_convert_v1"


def test_the_folder_of_a_single_set_will_do(tree):
    with pytest.warns(UserWarning, match="1 of the 2 sets"):
        cases = pretraining_list("1k", tree / "BTCV")
    assert len(cases.cases) == 24


def test_a_folder_without_any_of_the_sets_and_an_unknown_list_are_refused(tmp_path):
    touch(tmp_path, "own/scan.nii.gz")
    with pytest.raises(DataError, match="none of the sets of the list 1k; expected folders named BTCV, TCIA Covid19"):
        pretraining_list("1k", tmp_path)
    with pytest.raises(ConfigError, match=r"no pre-training list '10kk'\. Did you mean '10k'"):
        pretraining_list("10kk", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        pretraining_list("1k", tmp_path / "nowhere")


def test_of_dicom_series_those_of_ct_are_taken(shared_data, tmp_path):
    import pydicom
    from pydicom.uid import generate_uid

    home, uid = tmp_path / "manifest-1600709154662" / "HNSCC" / "HNSCC-01-0001", generate_uid()
    for path in sorted((shared_data / "dicom" / "cip_ct64").glob("*.dcm"))[:5]:
        for modality in ("CT", "MR"):
            (home / modality).mkdir(parents=True, exist_ok=True)
            slice_ = pydicom.dcmread(path, force=True)
            slice_.Modality = modality
            if modality == "MR":
                slice_.SeriesInstanceUID, slice_.SOPInstanceUID = uid, generate_uid()
            slice_.save_as(home / modality / path.name)
    with pytest.warns(UserWarning, match="7 of the 8 sets"):
        cases = pretraining_list("10k", tmp_path)
    assert names(cases) == ["manifest-1600709154662/HNSCC/HNSCC-01-0001/CT"]
