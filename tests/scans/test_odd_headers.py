"""Headers that say odd things, which other programs read: what they leave out of account is told, the scan is read."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from mim3d.caching.case import source_files
from mim3d.core.errors import DataError
from mim3d.scans.volumes import files_of, find_scans, read_grid, read_volume
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


@pytest.mark.parametrize(("name", "voxel_name"), [("scan.hdr", "scan.img"), ("scan.hdr.gz", "scan.img.gz")])
@pytest.mark.parametrize("version", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_a_pair_of_files_is_one_scan(tmp_path, name, voxel_name, version):
    image = version(voxels(), oblique_affine())
    image.header["vox_offset"] = 16
    nib.save(image, tmp_path / voxel_name)
    assert find_scans(tmp_path) == [str(tmp_path / name)]
    volume, known = read_volume(tmp_path / name), nib.load(tmp_path / voxel_name)
    assert np.array_equal(volume.grid.from_ras(volume.array), np.asarray(known.dataobj))
    assert np.allclose(volume.grid.affine, known.affine)
    assert source_files(str(tmp_path / name)) == [str(tmp_path / name), str(tmp_path / voxel_name)]


def test_a_header_without_its_voxels_or_of_analyze_is_refused(tmp_path):
    nib.save(nib.Nifti1Pair(voxels(), oblique_affine()), tmp_path / "scan.img")
    (tmp_path / "scan.img").rename(tmp_path / "other.img")
    with pytest.raises(DataError, match=r"scan\.hdr: its voxels, scan\.img, are missing"):
        read_grid(tmp_path / "scan.hdr")
    (tmp_path / "sky.hdr").write_bytes(b"#?RADIANCE\n" + bytes(600))
    for read in (read_grid, files_of):
        with pytest.raises(DataError, match=r"sky\.hdr: this is no NIfTI file"):
            read(str(tmp_path / "sky.hdr"))
    nib.save(nib.AnalyzeImage(voxels(), np.eye(4)), tmp_path / "old.img")
    with pytest.raises(DataError, match=r"old\.hdr: an Analyze header, which does not say where left and right are"):
        read_grid(tmp_path / "old.hdr")


def test_what_follows_a_whole_gzip_stream_is_passed_over(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", voxels())
    path.write_bytes(path.read_bytes() + b"left over")
    assert np.array_equal(read_volume(path).array, voxels())


def test_each_channel_of_a_packed_file_is_read_to_the_end_of_the_stream(tmp_path):
    array = voxels((5, 6, 7, 3))
    path = write_nifti(tmp_path / "scan.nii.gz", array)
    for channel in range(3):
        assert np.array_equal(read_volume(f"{path}::channel={channel}").array, array[..., channel])
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"scan\.nii\.gz: the compressed stream is truncated or damaged .*checksum"):
        read_volume(f"{path}::channel=0")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_slice_or_more_behind_the_last_voxel_is_told(tmp_path, name):
    array = voxels()
    image = nib.Nifti1Image(array[:, :, :5], np.eye(4))
    content = image.to_bytes() + array[:, :, 5:].tobytes(order="F")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.warns(
        UserWarning, match=r"120 bytes follow the 5 x 6 x 5 voxels of int16 .* the first voxels are taken"
    ):
        assert np.array_equal(read_volume(tmp_path / name).array, array[:, :, :5])
