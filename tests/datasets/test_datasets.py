"""Published data sets: what their presets say, their folds, and cases read from folders as the owners publish them."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.published.folds import declare_fold, fold_numbers, read_preset
from mim3d.datasets.published.presets import find_preset, published_presets
from mim3d.datasets.splits import Split
from mim3d.datasets.usable import usable_cases
from mim3d.scans.volumes import read_volume
from mim3d.tasks.segmentation.task import Segmentation
from tests.miniatures import MINIATURES, write_cc_ccii

PRESETS = published_presets()

#: Cases, spacing, patch, window and probabilities (flip, quarter turn, shift), as published.
FACTS = {
    "BTCV": (30, (1.5, 1.5, 2.0), (96, 96, 96), (-175, 250), (0.1, 0.1, 0.5)),
    "MM-WHS CT": (20, (1.5, 1.5, 1.5), (96, 96, 96), (0, 1700), None),
    "MSD Spleen": (41, (1, 1, 1), (96, 96, 96), (-57, 175), (0.5, 0.25, 0.5)),
    "AMOS22": (300, (1.5, 1.5, 2.0), (96, 96, 96), (-175, 250), (0.5, 0.5, 0.5)),
    "FLARE22": (50, (1.5, 1.5, 2.0), (96, 96, 96), (-175, 250), (0.2, 0.2, 0.1)),
    "MSD Liver": (131, (1, 1, 1), (96, 96, 96), (-21, 189), (0.2, 0.2, 0.1)),
    "MSD Lung": (63, (1, 1, 1), (96, 96, 96), (-1000, 1000), (0.5, 0.3, 0.1)),
    "MSD Pancreas": (281, (1.5, 1.5, 1.5), (96, 96, 96), (-87, 199), (0.5, 0.25, 0.5)),
    "MSD HepaticVessel": (303, (1.5, 1.5, 1.5), (96, 96, 96), (0, 230), (0.5, 0.25, 0.5)),
    "MSD Colon": (126, (1.5, 1.5, 1.5), (96, 96, 96), (-57, 175), (0.5, 0.25, 0.5)),
    "COVID-19-20": (199, (1.25, 1.25, 5.0), (192, 192, 32), (-1000, 500), (0.5, 0.0, 0.0)),
    "BraTS": (484, (1, 1, 1), (128, 128, 128), None, None),
    "CC-CCII": (4178, None, (384, 384, 32), (0, 255), None),
}

PUBLISHED = [name for name, preset in PRESETS.items() if preset.folds]

#: Names of the sets in the list that the published folds were taken from.
LISTED = {
    "BTCV": "BTCV",
    "MM-WHS CT": "MM-WHS-CT",
    "MSD Spleen": "MSD-Task09-Spleen",
    "MSD Liver": "MSD-Task03-Liver",
    "MSD Lung": "MSD-Task06-Lung",
    "MSD Pancreas": "MSD-Task07-Pancreas",
    "MSD HepaticVessel": "MSD-Task08-HepaticVessel",
    "MSD Colon": "MSD-Task10-Colon",
    "COVID-19-20": "COVID-19-20",
    "BraTS": "MSD-Task01-BrainTumour",
}


def parts(cases: CaseSet) -> tuple[CaseSet, Split]:
    """Cases, and those of them that are declared as trained on and as held out."""
    train, val = (tuple(case for case in cases.cases if case.split == part) for part in ("train", "val"))
    return cases, Split(train=train, val=val)


def read(key: str, folder: Path, fold: int | None = 0, strict: bool | None = False):
    """Read a miniature, whose missing cases are told in warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not here")
        return parts(read_preset(MINIATURES[key].preset, folder, fold, strict=strict))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every miniature, written when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(key: str) -> Path:
        if key not in made:
            made[key] = tmp_path_factory.mktemp("set")
            MINIATURES[key].write(MINIATURES[key], made[key])
        return made[key]

    return folder


def number_of(case_id: str) -> str:
    """The number of a case in its id: BRATS_001 and volume-covid19-A-0047_1_ct alike."""
    words = case_id.replace("-", "_").replace("img", "").removesuffix("_0000").split("_")
    return "_".join(word.lstrip("0") or "0" for word in words if word.isdigit())


def test_there_are_thirteen_presets():
    assert PRESETS.keys() == FACTS.keys()


@pytest.mark.parametrize("name", FACTS)
def test_a_preset_says_what_was_published(name):
    preset, (num_cases, spacing_mm, patch_size, window, variation) = PRESETS[name], FACTS[name]
    assert (preset.num_cases, preset.spacing_mm, preset.patch_size) == (num_cases, spacing_mm, patch_size)
    assert preset.intensity.window == window
    assert preset.intensity.kind == ("zscore" if window is None else "window")
    found = preset.variation and (
        preset.variation.flip_prob,
        preset.variation.rotate90_prob,
        preset.variation.shift_prob,
    )
    assert found == variation
    assert preset.nsd_tolerance_mm == (2.0 if name == "COVID-19-20" else 1.0)
    assert preset.citation and preset.url.startswith("http")
    assert (preset.base_learning_rate, preset.reference_batch, preset.weight_decay) == (3e-4, 16, 1e-5)
    assert (preset.warmup_epochs, preset.positive_ratio, preset.overlap) == (50, 0.5, 0.5)


def test_labels_with_odd_values_regions_and_channels_are_those_of_the_owners():
    assert list(PRESETS["MM-WHS CT"].labels) == [0, 205, 420, 500, 550, 600, 820, 850]
    assert [len(PRESETS[name].labels) - 1 for name in ("BTCV", "AMOS22", "FLARE22")] == [13, 15, 13]
    assert PRESETS["BTCV"].labels[9] == "inferior vena cava" and PRESETS["FLARE22"].labels[13] == "left kidney"
    brats = PRESETS["BraTS"]
    assert list(brats.regions.items()) == [
        ("whole tumour", (1, 2, 3)),
        ("tumour core", (2, 3)),
        ("enhancing tumour", (3,)),
    ]
    assert brats.channels == ("FLAIR", "T1w", "T1gd", "T2w") and brats.larger_patch_size == (224, 224, 128)
    assert PRESETS["COVID-19-20"].variation.affine_prob == PRESETS["COVID-19-20"].variation.noise_prob == 0.15
    assert PRESETS["CC-CCII"].task == "classification" and len(PRESETS["CC-CCII"].classes) == 3


def test_the_document_names_every_preset_and_its_owners():
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "presets.md").read_text(encoding="utf-8")
    for preset in PRESETS.values():
        assert f"| `{preset.name}` |" in text and f"| {preset.name} |" in text
        assert preset.url in text


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("btcv", "BTCV"),
        ("MM_WHS", "MM-WHS CT"),
        ("Task09_Spleen", "MSD Spleen"),
        ("hepatic vessel", "MSD HepaticVessel"),
        ("amos", "AMOS22"),
        ("Task01_BrainTumour", "BraTS"),
        ("covid1920", "COVID-19-20"),
    ],
)
def test_a_preset_is_found_however_its_name_is_spelled(typed, name):
    assert find_preset(typed) is PRESETS[name]


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no preset 'BTVC'\. Did you mean 'BTCV'"):
        find_preset("BTVC")
    with pytest.raises(ConfigError, match=r"Known: AMOS22, BTCV, .*MSD Spleen"):
        find_preset("qqqq")


def test_every_name_of_a_preset_is_its_own():
    names = [name for preset in PRESETS.values() for name in (preset.name, *preset.aliases)]
    assert len(names) == len({name.lower() for name in names})
    assert all(find_preset(name) is preset for preset in PRESETS.values() for name in (preset.name, *preset.aliases))


MY_LAB = """
from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation, numbered
from mim3d.scans.intensity import Intensity

VARIATION = Variation(flip_prob=0.5)
FACTORS = {"one": 1}
MY_SET = Preset(
    name="My set",
    labels=numbered("knee"),
    num_cases=4,
    spacing_mm=(1.0, 1.0, 1.0),
    intensity=Intensity(window=(-200.0, 500.0)),
    variation=VARIATION,
    files=FileNames(
        image=rf"knee_(?P<case>\\d+)_ct{NIFTI}", label=rf"knee_(?P<case>\\d+)_seg{NIFTI}",
        example="knee_{0}_ct.nii.gz with knee_{0}_seg.nii.gz", num_digits=2,
    ),
    folds=("1 2", "3-4"),
    num_folds=2,
    citation="My lab (2026)",
    url="https://example.org",
)
"""


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    """A module of a user's own with a preset, found by its name as one that is installed."""
    (tmp_path / "lab" / "my_lab_of_knees").mkdir(parents=True)
    (tmp_path / "lab" / "my_lab_of_knees" / "presets.py").write_text(MY_LAB)
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    return "my_lab_of_knees.presets"


def test_a_preset_of_the_users_own_is_found_by_its_dotted_path_and_reads_its_folds(my_lab, tmp_path):
    preset = find_preset(f"{my_lab}.MY_SET")
    assert (preset.name, preset.labels) == ("My set", {0: "background", 1: "knee"})
    for number in range(1, 6):
        for part in ("ct", "seg"):
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set" / f"knee_{number:02d}_{part}.nii.gz").write_bytes(b"x")
    cases, split = parts(read_preset(preset, tmp_path / "set", 1))
    assert [case.id for case in split.val] == ["knee_03_ct", "knee_04_ct"]
    assert [case.id for case in split.train] == ["knee_01_ct", "knee_02_ct"] and cases.labels == preset.labels
    (tmp_path / "set" / "knee_04_ct.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 of the 2 cases .* the first is knee_04_ct\.nii\.gz with knee_04_seg"):
        read_preset(preset, tmp_path / "set", 1)


def test_a_dotted_path_that_leads_to_no_preset_is_refused_in_a_sentence(my_lab):
    with pytest.raises(ConfigError, match=r"preset '.*VARIATION' is a Variation; name an object of the class Preset\."):
        find_preset(f"{my_lab}.VARIATION")
    with pytest.raises(ConfigError, match=r"preset '.*Variation' is a class; name an object of the class Preset\."):
        find_preset(f"{my_lab}.Variation")
    with pytest.raises(ConfigError, match=r"preset '.*FACTORS' is no dataclass"):
        find_preset(f"{my_lab}.FACTORS")
    with pytest.raises(ConfigError, match=r"preset '.*MY_SETT' cannot be imported: .*MY_SETT"):
        find_preset(f"{my_lab}.MY_SETT")
    with pytest.raises(ConfigError, match=r"preset 'nobody\.presets\.SET' cannot be imported: .*nobody"):
        find_preset("nobody.presets.SET")


def test_a_preset_that_contradicts_itself_is_refused():
    with pytest.raises(ConfigError, match="lists 1 folds, but num_folds is 5"):
        dataclasses.replace(PRESETS["BTCV"], folds=("1 2",))
    with pytest.raises(ConfigError, match="a segmentation needs the names of its files"):
        dataclasses.replace(PRESETS["BTCV"], files=None)


@pytest.mark.parametrize("name", [*PUBLISHED, "FLARE22"])
def test_folds_hold_every_case_out_once(name):
    folds = fold_numbers(PRESETS[name])
    assert len(folds) == 5
    assert len(frozenset().union(*folds)) == sum(map(len, folds)) == PRESETS[name].num_cases
    assert max(map(len, folds)) - min(map(len, folds)) <= 1


@pytest.mark.parametrize("name", LISTED)
def test_folds_are_those_of_the_published_lists(name, shared_data):
    facts = json.loads((shared_data.parent / "facts" / "downstream_splits.json").read_text())[LISTED[name]]
    files = PRESETS[name].files
    for fold, numbers in enumerate(fold_numbers(PRESETS[name])):
        listed = {tuple(Path(path).name for path in pair) for pair in facts["folds"][str(fold)]}
        made = {tuple(Path(part).name for part in files.names_of(number).split(" with ")) for number in numbers}
        assert made == listed
    assert {int(value) for value in facts["labels"]} == set(PRESETS[name].labels)


def test_the_five_splits_of_amos_are_the_published_ones(shared_data):
    facts = json.loads((shared_data.parent / "facts" / "downstream_splits.json").read_text())["AMOS22"]
    listed = [{str(int(case.removeprefix("amos_"))) for case in split["val"]} for split in facts["five_splits"]]
    assert listed == list(fold_numbers(PRESETS["AMOS22"]))


@pytest.mark.parametrize("key", MINIATURES)
def test_a_published_folder_gives_the_cases_of_the_published_fold(key, folders):
    mini = MINIATURES[key]
    cases, split = read(key, folders(key))
    assert [{number_of(case.id) for case in part} for part in (split.train, split.val)] == [
        set(mini.train),
        set(mini.val),
    ]
    assert cases.labels == mini.preset.labels
    assert all(len(case.images) == len(mini.preset.channels) for case in cases.cases)
    assert usable_cases(cases, lacks=Segmentation().lacks) == cases


@pytest.mark.parametrize("key", MINIATURES)
def test_a_case_is_prepared_with_all_its_labels_and_channels(key, folders):
    preset = MINIATURES[key].preset
    cases, split = read(key, folders(key))
    prepared = prepare(split.val[0], Preprocessing(spacing_mm=preset.spacing_mm), labels=cases.labels)
    assert prepared.image.shape[0] == len(preset.channels)
    assert prepared.image.shape[1:] == prepared.label.shape
    np.testing.assert_allclose(prepared.spacing_mm, preset.spacing_mm, rtol=0.15)
    assert set(np.unique(prepared.label)) == set(preset.labels)


@pytest.mark.parametrize("key", MINIATURES)
def test_another_fold_holds_out_other_cases_of_the_same_set(key, folders):
    mini, held_out = MINIATURES[key], set()
    here = {*mini.train, *mini.val}
    for fold, numbers in enumerate(fold_numbers(mini.preset)):
        if here & numbers:
            _, split = read(key, folders(key), fold)
            assert {number_of(case.id) for case in split.val} == here & numbers
            assert {number_of(case.id) for case in split.train} == here - numbers
            held_out |= here & numbers
    assert held_out == here


def test_the_channels_of_brats_are_read_from_one_file_in_their_order(folders):
    _, split = read("BraTS", folders("BraTS"))
    case = split.val[0]
    assert [image.rpartition("::")[2] for image in case.images] == [f"channel={channel}" for channel in range(4)]
    assert case.modality == ";".join(find_preset("BraTS").channels) and "T1" in case.modality
    means = [read_volume(image).array.mean() for image in case.images]
    assert means == sorted(means) and case.id == "BRATS_001"


def test_scans_of_one_patient_share_their_patient(folders):
    cases, _ = read("COVID-19-20", folders("COVID-19-20"))
    assert {case.patient for case in cases.cases} == {f"COVID-19-20 {number}" for number in (3, 47, 167, 196, 698)}


def test_without_a_fold_every_case_trains(folders):
    cases, split = read("AMOS22", folders("AMOS22"), fold=None)
    assert len(split.train) == len(cases.cases) == 5 and not split.val


def test_cases_kept_in_a_cache_are_declared_by_the_names_of_their_images(folders):
    cases, split = read("BTCV", folders("BTCV"))
    with pytest.warns(UserWarning, match="(is|are) not here"):
        again = declare_fold(PRESETS["BTCV"], "cache", cases.cases[::-1], 0, strict=False)
    assert {case.id for case in again if case.split == "val"} == {case.id for case in split.val}


def test_missing_cases_are_refused_or_told_as_asked(folders):
    preset, folder = PRESETS["BTCV"], folders("BTCV")
    with pytest.raises(DataError, match=r"4 of the 6 cases that fold 0 of BTCV holds out .*img0036.*--strict false"):
        read_preset(preset, folder, 0)
    with pytest.raises(DataError, match=r"4 of the 6 cases .* add them \(https"):
        read_preset(preset, folder, 0, strict=True)
    with pytest.warns(UserWarning) as told:
        read_preset(preset, folder, 0, strict=False)
    assert [str(warning.message).partition(": ")[2][:17] for warning in told] == [
        "4 of the 6 cases ",
        "20 of the 24 case",
    ]


def test_missing_training_cases_alone_are_a_warning_unless_strict(tmp_path):
    mini = MINIATURES["MM-WHS CT"]
    mini.write(type(mini)(mini.name, mini.train, ("1001", "1002", "1003", "1004"), mini.write), tmp_path)
    with pytest.warns(UserWarning, match="13 of the 16 cases that fold 0 of MM-WHS CT trains on"):
        _, split = parts(read_preset(mini.preset, tmp_path, 0))
    assert len(split.val) == 4
    with pytest.raises(DataError, match="13 of the 16"):
        read_preset(mini.preset, tmp_path, 0, strict=True)


def test_a_fold_without_any_of_its_held_out_cases_is_refused_whatever_is_asked(folders):
    with pytest.raises(DataError, match=r"6 of the 6 cases that fold 2 of BTCV holds out"):
        read("BTCV", folders("BTCV"), fold=2)


def test_the_folder_of_another_set_is_refused_with_the_names_that_are_expected(folders):
    with pytest.raises(DataError, match=r"no case of MSD Liver in here; .*imagesTr/liver_0\.nii\.gz.*medicaldecathlon"):
        read_preset(PRESETS["MSD Liver"], folders("MSD Spleen"), 0, strict=False)
    with pytest.raises(DataError, match="no such folder"):
        read_preset(PRESETS["BTCV"], folders("BTCV") / "nowhere", 0)
    with pytest.raises(ConfigError, match="folds 0 to 4, but fold is 5"):
        read_preset(PRESETS["BTCV"], folders("BTCV"), 5)


def test_two_copies_of_a_set_are_refused(folders, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(folders("BTCV as downloaded"), tmp_path / name)
    with pytest.raises(DataError, match=r"two/.*img0002.*the same case of BTCV as .*one/"):
        read_preset(PRESETS["BTCV"], tmp_path, 0, strict=False)


def test_several_sets_in_one_tree_are_told_apart(tmp_path):
    for key in ("MSD Spleen", "MSD Liver"):
        MINIATURES[key].write(MINIATURES[key], tmp_path)
    cases, _ = read("MSD Liver", tmp_path)
    assert {case.id.partition("_")[0] for case in cases.cases} == {"liver"}


def test_the_path_of_dataset_json_stands_for_its_folder(folders):
    cases, _ = read("MSD Lung", folders("MSD Lung") / "Task06_Lung" / "dataset.json")
    assert len(cases.cases) == 5


def test_brats_split_into_files_of_one_channel_is_refused(tmp_path):
    mini = MINIATURES["BraTS"]
    mini.write(mini, tmp_path)
    for path in (tmp_path / "Task01_BrainTumour" / "labelsTr").glob("B*.nii.gz"):
        shutil.copy(path, tmp_path / "Task01_BrainTumour" / "imagesTr" / path.name)
    with pytest.raises(DataError, match=r"holds 1 channel, but BraTS has 4 \(FLAIR, T1w, T1gd, T2w\)"):
        read("BraTS", tmp_path)


def test_slices_of_cc_ccii_are_scans_with_classes_split_by_patient(tmp_path):
    write_cc_ccii(tmp_path)
    cases, split = parts(read_preset(PRESETS["CC-CCII"], tmp_path, 0))
    assert isinstance(cases, CaseSet) and len(cases.cases) == 21
    assert {case.class_name for case in cases.cases} == {"CP", "NCP", "Normal"}
    assert {case.class_name for case in split.val} == {"CP", "NCP", "Normal"}
    assert not {case.patient for case in split.train} & {case.patient for case in split.val}
    assert len(split.train) + len(split.val) == 21
    assert read_volume(cases.cases[0].images[0]).array.shape == (40, 40, 6)


def test_cc_ccii_without_its_folders_of_classes_is_refused(tmp_path):
    (tmp_path / "CP").mkdir()
    with pytest.raises(DataError, match="no folder in here holds the folders CP, NCP, Normal"):
        read_preset(PRESETS["CC-CCII"], tmp_path, 0)
