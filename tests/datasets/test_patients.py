"""One patient under several names is found where names are regular, or by a pattern; nothing else is merged."""

import itertools
import warnings

import pytest

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import read_cases
from mim3d.datasets.patients import patients_by_pattern, patients_of_names
from mim3d.datasets.splits import split_cases
from tests.nifti import noise, write_nifti


def names(pattern, *values):
    return [pattern.format(*row) for row in itertools.product(*values)]


@pytest.mark.parametrize(
    ("cases", "num_patients"),
    [
        (names("{}_images_STS_{:03d}", ("CT", "PET", "MR"), range(19)), 19),
        (names("s{:02d}_{}", range(3), ("T1", "T2")), 3),
        (names("patient{}_{}", range(4), ("pre", "post")), 4),
        (names("sub-{:02d}_ses-{}_{}", range(5), (1, 2), ("T1w", "FLAIR")), 5),
        (names("p{}_{}", range(4), "LR")[:-1], 4),
        # Patients with different numbers of scans, where names say alike which part is theirs.
        (["sub-01_T1w", "sub-01_ses-2_acq-high_T2w", "sub-02_T1w"], 2),
        (["T1w_sub-01", "T1w_sub-02", "T2w_sub-01", "T2w_sub-02"], 2),
        (["patient001_frame01", "patient001_frame12", "patient002_frame09"], 2),
        (["TCGA-06-0119_1999.01.02_T1", "TCGA-06-0119", "TCGA-08-0119"], 2),
        (["LIDC-IDRI-0001_nodule3", "LIDC-IDRI-0001_nodule10", "LIDC-IDRI-0010_nodule3"], 2),
        (["LUNG-0001_0", "LUNG-0001_1", "LUNG-0001_2", "LUNG-0002_0"], 2),
        (["p1_20010203", "p1_20020203", "p12_20010203"], 2),
    ],
)
def test_regular_names_are_patients_under_several_names(cases, num_patients):
    found = patients_of_names(cases)
    assert found.keys() == set(cases) and len(set(found.values())) == num_patients


@pytest.mark.parametrize(
    "cases",
    [
        names("hippocampus_{:03d}", range(9)),
        names("case_{}_{}", range(4), range(3)),
        names("{}_{}", ("benign", "malignant"), range(9)),
        names("{}_{}", ("AMOS", "LITS"), range(9)),
        names("{}_{}", "ab", "xy"),
        ["s1_T1", "s2_T2", "s3_T1", "s4_T2"],
        ["ct0", "ct1"],
        ["case_1", "case_10", "case_100"],
        ["siteA_sub-01_T1w", "siteA_sub-02_T1w", "siteB_sub-01_T1w"],
        names("TCGA-{}-{:04d}", ("06", "08"), range(119, 123)),
        ["2019_1", "2019_2", "2020_1"],
        ["x001_2", "x002_2", "x002_4"],
        names("cohort_{}_{:02d}", "AB", range(9)),
        ["a"],
    ],
)
def test_other_names_are_left_alone(cases):
    assert patients_of_names(cases) == {}


def test_folds_never_split_a_patient_and_the_guess_is_said(tmp_path):
    for name in names("s{:02d}_{}", range(5), ("T1", "T2")):
        write_nifti(tmp_path / f"{name}.nii.gz", noise())
    with pytest.warns(
        UserWarning, match="10 cases are taken for 5 patients .* s00_T1, s00_T2 are 's00'.* a list with a column"
    ):
        found = read_cases(tmp_path)
    split = split_cases(found.cases)
    assert not {case.patient for case in split.train} & {case.patient for case in split.val}
    assert len(split.val) == 2


def test_a_pattern_names_the_patients_without_a_word(tmp_path):
    for name in ("x1_STS_003", "y_STS_003", "z_STS_004"):
        write_nifti(tmp_path / f"{name}.nii.gz", noise())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_cases(tmp_path, patient_pattern=r"STS_\d+", modality="CT")
    assert [case.patient for case in found.cases] == ["STS_003", "STS_003", "STS_004"]
    assert {case.modality for case in found.cases} == {"CT"}


@pytest.mark.parametrize("modality", ["CTT", "CT;PT"])
def test_a_modality_that_cannot_be_is_refused_where_the_user_says_it_and_noted_in_a_list(tmp_path, modality):
    write_nifti(tmp_path / "a.nii.gz", noise())
    with pytest.raises(ConfigError, match=f"modality '{modality}' is not known, or not one for each of the 1 channels"):
        read_cases(tmp_path, modality=modality)
    (tmp_path / "list.csv").write_text(f"image,modality\na.nii.gz,{modality}\n")
    with pytest.warns(UserWarning, match=f"modality {modality} says nothing that mim3d knows"):
        read_cases(tmp_path / "list.csv")


def test_patterns_that_cannot_work_are_refused():
    assert patients_by_pattern(["a_12_x"], r"_(\d+)_") == {"a_12_x": "12"}
    with pytest.raises(ConfigError, match="no regular expression"):
        patients_by_pattern(["a"], "(")
    with pytest.raises(DataError, match="finds no patient in b"):
        patients_by_pattern(["a1", "b"], r"\d")
