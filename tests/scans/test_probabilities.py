"""Probabilities as a file: on the scan's grid and orientation, whole or not at all, never in memory at once."""

import nibabel
import numpy as np
import pytest

from mim3d.core.errors import DataError
from mim3d.scans.nifti import ProbabilityFile
from mim3d.scans.volumes import read_grid, read_volume
from tests.labelled import write_scan


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_volumes_lie_on_the_grid_of_the_scan_in_whatever_orientation_it_was_stored(tmp_path, codes):
    values = np.random.default_rng(0).random((6, 5, 4, 3), dtype=np.float32)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(np.eye(4)), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = nibabel.Nifti1Image(values[..., 0], np.diag([1.0, 2.0, 3.0, 1.0])).as_reoriented(turn)
    nibabel.save(stored, tmp_path / "scan.nii.gz")
    grid = read_grid(tmp_path / "scan.nii.gz")
    with ProbabilityFile(tmp_path / "out" / "p.nii.gz") as file:
        target = file.target(grid, 3)
        assert target.shape == (6, 5, 4, 3) and not target.any()
        target[...] = values
        file.save()
    written = nibabel.load(tmp_path / "out" / "p.nii.gz")
    assert written.shape == (*stored.shape, 3) and written.get_data_dtype() == np.float32
    assert np.array_equal(written.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    for channel in range(3):
        back = nibabel.as_closest_canonical(written.slicer[..., channel])
        assert np.array_equal(np.asarray(back.dataobj), values[..., channel])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p.nii.gz"]
    assert np.array_equal(read_volume(tmp_path / "scan.nii.gz").array, values[..., 0])


def test_what_is_not_saved_leaves_nothing_behind(tmp_path):
    write_scan(tmp_path / "scan.nii.gz", np.zeros((3, 3, 3), np.float32))
    with pytest.raises(RuntimeError), ProbabilityFile(tmp_path / "out" / "p.nii.gz") as file:
        file.target(read_grid(tmp_path / "scan.nii.gz"), 2)
        raise RuntimeError("stopped")
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_without_room_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    write_scan(tmp_path / "scan.nii.gz", np.zeros((3, 3, 3), np.float32))
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("mim3d.scans.nifti.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(DataError, match=r"p.nii.gz: the probabilities of 2 channels need .* --probabilities false"):
        ProbabilityFile(tmp_path / "p.nii.gz").target(read_grid(tmp_path / "scan.nii.gz"), 2)
