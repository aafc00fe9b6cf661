"""NIfTI files of four axes: several channels of one scan in one file, each read as a volume of its own."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import DataError
from mim3d.datasets.cases import Case, CaseSet
from mim3d.scans.volumes import channels_of, read_grid, read_volume, scan_id, write_volume
from tests.nifti import affine_of, noise, write_nifti

NUM_CHANNELS = 3


@pytest.fixture(params=[".nii", ".nii.gz"])
def stack(request, tmp_path):
    """A file of three channels in LAS, with its array as stored."""
    array = np.stack([noise(seed=channel) for channel in range(NUM_CHANNELS)], axis=-1)
    return write_nifti(tmp_path / f"brain{request.param}", array, affine_of((1, 1, 2), signs=(-1, 1, 1))), array


def test_each_channel_of_a_file_is_a_volume(stack):
    path, array = stack
    addresses = channels_of(path)
    assert addresses == tuple(f"{path}::channel={channel}" for channel in range(NUM_CHANNELS))
    for channel, address in enumerate(addresses):
        volume = read_volume(address)
        np.testing.assert_array_equal(volume.array, array[::-1, :, :, channel])
        assert volume.spacing_mm == (1, 1, 2)
        assert read_grid(address).shape == array.shape[:3]


def test_channels_behind_an_empty_time_axis_are_found(tmp_path):
    array = np.stack([noise(seed=channel) for channel in range(2)], axis=-1)
    path = write_nifti(tmp_path / "vector.nii.gz", array[:, :, :, None, :])
    assert len(channels_of(path)) == 2
    np.testing.assert_array_equal(read_volume(f"{path}::channel=1").array, array[..., 1])


def test_a_file_of_three_axes_is_its_own_only_channel(tmp_path):
    array = noise()
    path = write_nifti(tmp_path / "ct.nii.gz", array)
    assert channels_of(path) == (str(path),)
    np.testing.assert_array_equal(read_volume(f"{path}::channel=0").array, array)


def test_a_file_of_several_channels_is_refused_where_none_is_named(stack):
    path, _ = stack
    with pytest.raises(DataError, match=r"4 axes.*::channel=0"):
        read_grid(path)


def test_a_channel_that_is_not_there_is_refused(stack):
    path, _ = stack
    with pytest.raises(DataError, match=r"channel 3 was asked for, but the file has 3"):
        read_grid(f"{path}::channel=3")


def test_a_channel_of_another_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"only NIfTI .*files have channels"):
        read_grid(f"{tmp_path / 'scan.nrrd'}::channel=0")


def test_a_truncated_file_of_channels_is_refused(tmp_path):
    path = write_nifti(tmp_path / "brain.nii", np.stack([noise(), noise()], axis=-1))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated"):
        read_grid(f"{path}::channel=0")


def test_a_case_of_several_channels_is_called_like_its_file():
    assert scan_id("a/BRATS_001.nii.gz::channel=0") == "BRATS_001"
    assert scan_id("a/BRATS_001.nii.gz::channel=2") == "BRATS_001_channel_2"


def test_a_label_map_is_written_on_the_grid_of_a_channel(stack, tmp_path):
    path, array = stack
    label = (array[::-1, :, :, 0] > 0).astype(np.uint8)
    write_volume(tmp_path / "label.nii.gz", label, read_grid(f"{path}::channel=0"))
    written = nibabel.load(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), label[::-1])
    np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)


def test_channels_are_prepared_in_the_order_of_the_case(stack):
    path, array = stack
    one, two, three = channels_of(path)
    prepared = prepare(Case(id="brain", images=(three, one, two), patient="brain"), Preprocessing())
    np.testing.assert_array_equal(prepared.image, array[::-1].transpose(3, 0, 1, 2)[[2, 0, 1]])


def test_a_cache_tells_channels_of_one_file_apart(stack, tmp_path):
    path, array = stack
    case = Case(id="brain", images=(f"{path}::channel=0",), patient="brain")
    for channel in range(2):
        asked = replace(case, images=(f"{path}::channel={channel}",))
        cases = CaseSet(root=str(tmp_path), form="folder", cases=(asked,), labels={})
        (scan,) = build_cache(cases, tmp_path / "cache", Preprocessing(intensities="lossless"))
        stored = scan.to_values(scan.read((0, 0, 0), scan.shape))[0]
        np.testing.assert_array_equal(stored, array[::-1, :, :, channel])
