"""Scans published as pictures: stacked in natural order, listed with class and patient, refused where they are not."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mim3d.caching.case import source_files
from mim3d.core.errors import DataError
from mim3d.datasets.cases import read_slice_folders
from mim3d.scans import files
from mim3d.scans.image_stacks import is_slice_folder
from mim3d.scans.volumes import read_grid, read_volume


def write_slices(folder: Path, volume_KRC: np.ndarray, names: list[str] | None = None) -> Path:
    """One picture per slice (slice, row, column)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(volume_KRC):
        name = names[index] if names else f"{index + 1}.png"
        sitk.WriteImage(sitk.GetImageFromArray(picture), str(folder / name))
    return folder


def stack(number: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (number, 6, 8), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:slices saved as images")
def test_slices_are_stacked_by_number_with_columns_to_the_left_rows_to_the_back_and_slices_to_the_head(tmp_path):
    volume = stack()
    read = read_volume(write_slices(tmp_path / "scan", volume))
    assert read.spacing_mm == (1.0, 1.0, 1.0)
    assert read.array.shape == (8, 6, 12)
    np.testing.assert_array_equal(read.array, volume.transpose(2, 1, 0)[::-1, ::-1])
    np.testing.assert_allclose(read.affine[:3, :3], np.eye(3))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
@pytest.mark.filterwarnings("ignore:slices saved as images")
def test_a_truncated_picture_is_refused_and_its_decoder_takes_nothing_along(tmp_path, suffix):
    folder = write_slices(tmp_path / "scan", stack(3), [f"{index}.{suffix}" for index in (1, 2, 3)])
    data = (folder / f"2.{suffix}").read_bytes()
    (folder / f"2.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"2\.\w+: .*[Cc]opy (it|the image) again"):
        read_volume(folder)
    (folder / f"2.{suffix}").write_bytes(data)
    assert read_volume(folder).array.shape == (8, 6, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
@pytest.mark.filterwarnings("ignore:slices saved as images")
def test_pictures_are_known_by_their_bytes_and_read_as_simple_itk_does(tmp_path, suffix):
    folder = write_slices(tmp_path / "scan", stack(2), [f"1.{suffix}", f"2.{suffix}"])
    expected = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.iterdir())])
    # SimpleITK gives the grey of a BMP in three colours.
    expected = expected[..., 0] if suffix == "bmp" else expected
    (folder / f"2.{suffix}").rename(folder / f"2.{'png' if suffix == 'bmp' else 'bmp'}")
    np.testing.assert_array_equal(read_volume(folder).array, expected.transpose(2, 1, 0)[::-1, ::-1])


def test_the_unknown_voxel_size_is_told_once(tmp_path, monkeypatch):
    folder = write_slices(tmp_path / "scan", stack(2))
    monkeypatch.setattr(files, "_said", set())
    with warnings.catch_warnings(), files.nothing_said():
        warnings.simplefilter("error")
        read_grid(folder)
    with pytest.warns(UserWarning, match="1 x 1 x 1 mm is assumed"):
        read_grid(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_grid(folder)


@pytest.mark.filterwarnings("ignore:slices saved as images")
def test_grey_pictures_saved_in_colour_are_grey_and_coloured_ones_refused(tmp_path):
    volume = stack(2)
    grey = np.repeat(volume[..., None], 3, axis=-1)
    for index, picture in enumerate(grey):
        (tmp_path / "grey").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=True), str(tmp_path / "grey" / f"{index}.png"))
    np.testing.assert_array_equal(read_volume(tmp_path / "grey").array, volume.transpose(2, 1, 0)[::-1, ::-1])
    grey[1, 2, 3] = 250, 10, 10
    sitk.WriteImage(sitk.GetImageFromArray(grey[1], isVector=True), str(tmp_path / "grey" / "1.png"))
    with pytest.raises(DataError, match=r"1\.png: holds colours"):
        read_volume(tmp_path / "grey")


@pytest.mark.filterwarnings("ignore:slices saved as images")
def test_slices_of_another_size_twice_the_same_number_and_broken_files_are_refused(tmp_path):
    folder = write_slices(tmp_path / "scan", stack(3))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 5), np.uint8)), str(folder / "4.png"))
    with pytest.raises(DataError, match=r"4\.png: 5 x 5 pixels, but the first slice of the folder has 8 x 6"):
        read_volume(folder)
    (folder / "4.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"4\.png: this is no image"):
        read_volume(folder)
    (folder / "4.png").rename(folder / "03.png")
    with pytest.raises(DataError, match="are the same slice"):
        read_volume(folder)


def test_a_tree_gives_cases_with_class_and_patient_from_its_folders(tmp_path):
    for path in ("NCP/12/3", "NCP/12/4", "Normal/7/3", "CP/5"):
        write_slices(tmp_path / path, stack(2))
    found = read_slice_folders(tmp_path)
    assert [(case.id, case.class_name, case.patient) for case in found.cases] == [
        ("CP_5", "CP", "5"),
        ("NCP_12_3", "NCP", "12"),
        ("NCP_12_4", "NCP", "12"),
        ("Normal_7_3", "Normal", "7"),
    ]
    assert found.form == "slices"
    assert found.cases[1].images == (str(tmp_path / "NCP" / "12" / "3"),)


def test_pictures_outside_a_class_and_trees_without_pictures_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no folder of slices"):
        read_slice_folders(tmp_path / "empty")
    write_slices(tmp_path / "scan", stack(2))
    with pytest.raises(DataError, match="a folder of its own in that of its class"):
        read_slice_folders(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_slice_folders(tmp_path / "elsewhere")


def test_folders_with_other_files_are_no_slice_folders_and_every_slice_counts_as_source(tmp_path):
    folder = write_slices(tmp_path / "scan", stack(11))
    assert is_slice_folder(str(folder))
    assert [Path(path).name for path in source_files(str(folder))] == [f"{index}.png" for index in range(1, 12)]
    (folder / "series.dcm").write_bytes(b"x")
    assert not is_slice_folder(str(folder))
    assert not is_slice_folder(str(tmp_path / "elsewhere"))
