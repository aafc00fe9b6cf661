"""Files of one case must lie on one grid, and this is found before any work."""

import numpy as np
import pytest

from mim3d.core.errors import DataError
from mim3d.datasets.cases import Case, CaseSet, read_cases
from mim3d.datasets.usable import usable_cases
from mim3d.tasks.segmentation.task import Segmentation
from tests.nifti import affine_of, noise, write_nifti


def pair(folder, image_affine, label_affine, label_shape=(6, 7, 8)):
    """A labelled set of one case."""
    write_nifti(folder / "images" / "a.nii.gz", noise(), image_affine)
    write_nifti(folder / "labels" / "a.nii.gz", np.zeros(label_shape, np.uint8), label_affine)
    return read_cases(folder)


@pytest.mark.parametrize(
    ("label_affine", "shape"),
    [
        (affine_of((1, 1, 1.1)), (6, 7, 8)),
        (affine_of(origin_mm=(0, 0, 0.5)), (6, 7, 8)),
        (affine_of(), (6, 7, 9)),
        (affine_of(signs=(-1, 1, 1)), (6, 7, 8)),
    ],
)
def test_a_label_on_another_grid_names_both_files_and_both_grids(tmp_path, label_affine, shape):
    cases = pair(tmp_path, affine_of(), label_affine, shape)
    with pytest.raises(DataError) as caught:
        usable_cases(cases, lacks=Segmentation().lacks)
    message = str(caught.value)
    assert cases.cases[0].label in message
    assert cases.cases[0].images[0] in message
    assert message.count("first voxel at") == 2


def test_rounding_and_another_orientation_of_the_same_grid_are_accepted(tmp_path):
    usable_cases(pair(tmp_path / "round", affine_of(), affine_of((1, 1, 1.0001))), lacks=Segmentation().lacks)
    flipped = affine_of(origin_mm=(5, 0, 0), signs=(-1, 1, 1))
    usable_cases(pair(tmp_path / "flip", affine_of(), flipped), lacks=Segmentation().lacks)


def test_channels_on_different_grids_are_refused(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", noise())
    write_nifti(tmp_path / "b.nii.gz", noise(), affine_of((2, 1, 1)))
    (tmp_path / "list.csv").write_text("image\na.nii.gz;b.nii.gz\n")
    with pytest.raises(DataError, match=r"b\.nii\.gz .*does not lie on the grid of .*a\.nii\.gz"):
        usable_cases(read_cases(tmp_path / "list.csv"))


def test_missing_files_and_missing_labels_are_named(tmp_path):
    (tmp_path / "list.csv").write_text("image,label\nx.nii.gz,\n")
    cases = read_cases(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"x\.nii\.gz: no such file"):
        usable_cases(cases)
    with pytest.raises(DataError, match="no label for x"):
        usable_cases(cases, lacks=Segmentation().lacks)


def test_real_sets_agree(shared_data):
    cases = read_cases(shared_data / "sts_ct")
    usable_cases(
        CaseSet(root=cases.root, form=cases.form, cases=cases.cases[:5], labels={}), lacks=Segmentation().lacks
    )
    assert isinstance(cases.cases[0], Case)
