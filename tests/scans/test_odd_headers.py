"""Headers that say odd things, which other programs read: what they leave out of account is told, the scan is read."""

import nibabel as nib
import numpy as np
import pytest

from mim3d.core.errors import DataError
from mim3d.scans.volumes import read_grid, read_volume
from tests.scans.test_volumes import edit_header, nrrd, oblique_affine, voxels, write_nifti


@pytest.mark.parametrize("pixdim", [(-1.0, 1.5, 2.0), (0.0, 0.0, 0.0), (np.nan, 1.5, 2.0), (1e20, 1.5, 2.0)])
def test_a_voxel_size_that_cannot_be_is_told_and_the_sform_used(tmp_path, pixdim):
    path = edit_header(write_nifti(tmp_path / "scan.nii", voxels()), pixdim=[1, *pixdim, 0, 0, 0, 0])
    with pytest.warns(UserWarning, match=r"scan\.nii: .*two voxel sizes.* 1\.0 x 1\.5 x 2\.0 mm \(sform\)"):
        volume = read_volume(path)
    assert np.array_equal(volume.affine, nib.load(path).affine)


def test_the_sign_of_a_voxel_size_is_left_out_as_nibabel_does(tmp_path):
    path = edit_header(write_nifti(tmp_path / "scan.nii", voxels()), pixdim=[1, -1, 1.5, 2, 0, 0, 0, 0], sform_code=0,
        qform_code=1)  # fmt: skip
    with pytest.warns(UserWarning, match=r"-1\.0 x 1\.5 x 2\.0 mm \(pixdim\).*without signs"):
        assert np.array_equal(read_grid(path).affine, nib.load(path).affine)


@pytest.mark.parametrize("quaternion", [2.0, np.nan])
def test_a_qform_that_is_no_rotation_is_told_and_the_sform_used(tmp_path, quaternion):
    path = write_nifti(tmp_path / "scan.nii", voxels())
    edit_header(path, quatern_b=quaternion, qform_code=1)
    with pytest.warns(UserWarning, match="a qform that is no rotation; the sform is used"):
        assert np.allclose(read_grid(path).affine, np.diag([1, 1.5, 2, 1]))


def written_with_two_digits(path, shape):
    """An oblique scan whose header has few digits: its axes meet at 0.6 degrees from a right angle."""
    affine = np.round(oblique_affine(), 2)
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    nib.save(image, path)
    return path


def test_axes_sheared_by_less_than_a_tenth_of_a_voxel_are_read(tmp_path):
    path = written_with_two_digits(tmp_path / "scan.nii", (12, 12, 5))
    assert np.allclose(read_grid(path).affine, nib.load(path).affine)


def test_axes_sheared_by_more_are_refused_with_the_distance(tmp_path):
    with pytest.raises(DataError, match=r"89\.\d+ degrees .* up to 0\.\d+ mm or 0\.\d+ voxels off a rectangular grid"):
        read_grid(written_with_two_digits(tmp_path / "scan.nii", (60, 60, 12)))


def test_a_space_with_time_is_the_space_without(tmp_path):
    with_time, without = tmp_path / "with.nrrd", tmp_path / "without.nrrd"
    nrrd(with_time, space="right-anterior-superior-time")
    nrrd(without, space="right-anterior-superior")
    assert np.array_equal(read_grid(with_time).affine, read_grid(without).affine)


def test_keys_of_somebodys_own_may_hold_colons(tmp_path):
    path = nrrd(tmp_path / "scan.nrrd")
    path.write_bytes(path.read_bytes().replace(b"encoding:", b"a:b:=c: d\nencoding:"))
    assert read_grid(path).shape == (4, 3, 2)
