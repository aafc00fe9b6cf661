"""Reading and writing of NIfTI, NRRD and MetaImage: geometry, lossless voxels, and every kind of bad file."""

import gzip
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from mim3d.core.errors import DataError
from mim3d.scans import files, grids, nifti, volumes
from mim3d.scans.grids import Grid, require_same_grid
from mim3d.scans.volumes import find_scans, patient_of, read_grid, read_volume, scan_id, write_volume

GEOMETRY_FIELDS = (
    "pixdim sform_code qform_code xyzt_units srow_x srow_y srow_z quatern_b quatern_c quatern_d "
    "qoffset_x qoffset_y qoffset_z"
).split()

#: A turn about two axes, for scans that lie obliquely.
TURN = np.array([[0.936, -0.31, 0.17], [0.29, 0.95, 0.13], [-0.2, -0.072, 0.98]])
OBLIQUE = np.linalg.qr(TURN)[0] * np.sign(np.diag(np.linalg.qr(TURN)[1]))


def oblique_affine(order: tuple[int, int, int] = (0, 1, 2), signs: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = (OBLIQUE * np.array([0.7, 0.9, 2.5]))[:, order] * np.array(signs)
    affine[:3, 3] = (-31.25, 12.5, 77.0)
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.5, 2.0, 1.0]) if affine is None else affine), path)
    return path


def landmark_mm(affine: np.ndarray, array: np.ndarray) -> tuple[np.ndarray, float]:
    """World position and value of one voxel, off the centre of every axis."""
    index = [size // 3 for size in array.shape]
    return (affine @ [*index, 1])[:3], array[tuple(index)]


def value_at(affine: np.ndarray, array: np.ndarray, point_mm: np.ndarray) -> float:
    index = np.linalg.solve(affine, [*point_mm, 1])[:3]
    assert np.abs(index - np.rint(index)).max() < 1e-3
    return array[tuple(np.rint(index).astype(int))]


def voxels(shape: tuple[int, ...] = (5, 6, 7), dtype: type = np.int16) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def edit_header(path: Path, **fields: object) -> Path:
    data = bytearray(path.read_bytes())
    header = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    path.write_bytes(data)
    return path


def meta_image(path: Path, **fields: str) -> Path:
    told = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "ElementSpacing": "1 2 3", "DimSize": "4 3 2", "ElementType": "MET_SHORT",
    } | fields  # fmt: skip
    text = "".join(f"{name} = {value}\n" for name, value in told.items())
    path.write_bytes(text.encode() + b"ElementDataFile = LOCAL\n" + voxels((4, 3, 2)).tobytes())
    return path


def nrrd(path: Path, **fields: str) -> Path:
    told = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "4 3 2",
        "space directions": "(1,0,0) (0,2,0) (0,0,3)", "endian": "little", "encoding": "raw",
        "space origin": "(0,0,0)",
    } | {name.replace("_", " "): value for name, value in fields.items()}  # fmt: skip
    text = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in told.items()) + "\n"
    path.write_bytes(text.encode() + voxels((4, 3, 2)).tobytes())
    return path


# --- Geometry


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_every_orientation_comes_to_ras_by_permutation_and_flips(tmp_path, order, signs):
    stored, affine = voxels(), oblique_affine(order, signs)
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", stored, affine))
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert sorted(volume.array.ravel()) == sorted(stored.ravel())
    assert volume.array.flags.c_contiguous
    assert np.allclose(volume.spacing_mm, (0.7, 0.9, 2.5), atol=1e-5)
    assert volume.array.shape == volume.grid.ras_shape
    for index in [(0, 0, 0), (4, 5, 6), (1, 2, 3)]:
        assert value_at(volume.affine, volume.array, (affine @ [*index, 1])[:3]) == stored[index]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_a_label_written_back_lies_on_the_stored_grid(tmp_path, order, suffix):
    source = write_nifti(tmp_path / "scan.nii", voxels(), oblique_affine(order, (-1, 1, -1)))
    volume = read_volume(source)
    label = (volume.array % 3).astype(np.uint8)
    target = tmp_path / "made" / f"label{suffix}"
    write_volume(target, label, volume.grid)
    again = read_volume(target, label=True)
    assert again.grid.shape == volume.grid.shape
    assert np.allclose(again.grid.affine, volume.grid.affine, atol=1e-5)
    assert np.array_equal(again.array, label)
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(target))).T
    assert np.array_equal(stored, voxels() % 3)


def test_nifti_geometry_is_written_back_field_by_field(tmp_path):
    image = nib.Nifti1Image(voxels(), None)
    image.header.set_qform(oblique_affine((2, 0, 1), (-1, 1, 1)), code=1)
    image.header.set_sform(oblique_affine((2, 0, 1), (-1, 1, 1)), code=4)
    image.header["srow_x"][3] += 1e-3
    image.header["pixdim"][4:] = (3.5, 0.1, 0.2, 0.3)
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    write_volume(tmp_path / "label.nii.gz", volume.array > 3, volume.grid)
    source, written = nib.load(tmp_path / "scan.nii.gz").header, nib.load(tmp_path / "label.nii.gz").header
    for name in GEOMETRY_FIELDS:
        assert source[name].tobytes() == written[name].tobytes(), name
    assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_affine_is_nibabels_for_every_pair_of_form_codes(tmp_path, codes):
    image = nib.Nifti1Image(voxels(), None)
    image.header.set_qform(oblique_affine(), code=codes[0])
    image.header.set_sform(oblique_affine() if codes[1] else None, code=codes[1])
    nib.save(image, tmp_path / "scan.nii")
    assert np.array_equal(read_grid(tmp_path / "scan.nii").affine, nib.load(tmp_path / "scan.nii").affine)


def test_an_old_header_with_qfac_zero_is_read_and_kept(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", voxels(), oblique_affine())
    edit_header(path, pixdim=[0, *nib.load(path).header["pixdim"][1:]], qform_code=1, sform_code=0)
    volume = read_volume(path)
    write_volume(tmp_path / "again.nii", volume.array, volume.grid)
    assert nib.Nifti1Header((tmp_path / "again.nii").read_bytes()[:348], check=False)["pixdim"][0] == 0


def test_metres_and_micrometres_become_millimetres(tmp_path):
    for code, unit_mm in ((1, 1000.0), (3, 0.001)):
        path = write_nifti(tmp_path / "scan.nii", voxels())
        edit_header(path, xyzt_units=code)
        assert np.allclose(read_grid(path).spacing_mm, np.array([1.0, 1.5, 2.0]) * unit_mm)


def test_two_voxel_sizes_in_one_header_are_told(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", voxels())
    edit_header(path, pixdim=[1, 1, 1, 1, 1, 1, 1, 1])
    with pytest.warns(UserWarning, match="1 x 1.5 x 2.0|1.0 x 1.5 x 2.0"):
        assert read_grid(path).spacing_mm == pytest.approx((1, 1.5, 2))


def test_a_header_without_orientation_is_told_once_however_often_it_is_read(tmp_path):
    image = nib.Nifti1Image(voxels(), None)
    nib.save(image, tmp_path / "scan.nii")
    with pytest.warns(UserWarning, match=r"scan\.nii: .*qform_code and sform_code are 0.*to the left"):
        read_grid(tmp_path / "scan.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(tmp_path / "scan.nii")


@pytest.mark.parametrize(("shift_mm", "told"), [(0.06, False), (0.08, True), (25.0, True)])
def test_a_qform_that_contradicts_the_sform_by_a_tenth_of_a_voxel_is_told(tmp_path, shift_mm, told):
    image = nib.Nifti1Image(voxels(), oblique_affine())
    image.set_sform(oblique_affine(), 1)
    moved = oblique_affine()
    moved[:3, 3] += OBLIQUE[:, 0] * shift_mm
    image.set_qform(moved, 1)
    nib.save(image, tmp_path / "scan.nii")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grid = read_grid(tmp_path / "scan.nii")
    assert np.allclose(grid.affine, oblique_affine(), atol=1e-5)
    assert [f"{shift_mm:g} mm" in str(warning.message) for warning in caught] == [True] * told


@pytest.mark.parametrize("name", ["packed.nii", "plain.nii.gz"])
def test_gzip_is_known_by_its_bytes_not_by_the_name(tmp_path, name):
    plain = write_nifti(tmp_path / "scan.nii", voxels(), np.eye(4)).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain) if name == "packed.nii" else plain)
    assert np.array_equal(read_volume(tmp_path / name).array, voxels())


def test_a_stream_that_never_ends_behind_the_last_voxel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_SURPLUS_BYTES", 2**20)
    plain = write_nifti(tmp_path / "scan.nii", voxels(), np.eye(4)).read_bytes()
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(plain + bytes(2**23)))
    with pytest.raises(DataError, match="goes on far behind the last voxel"):
        read_volume(tmp_path / "scan.nii.gz")


def test_nifti2_is_read_and_written_back_as_nifti2(tmp_path):
    nib.save(nib.Nifti2Image(voxels(), oblique_affine()), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    write_volume(tmp_path / "label.nii.gz", volume.array, volume.grid)
    written = nib.load(tmp_path / "label.nii.gz")
    assert isinstance(written, nib.Nifti2Image)
    assert np.array_equal(written.affine, oblique_affine())


def test_detached_headers_are_read(tmp_path):
    image = sitk.GetImageFromArray(voxels((7, 6, 5)))
    for name in ("scan.nhdr", "scan.mhd"):
        for compressed in (False, True):
            sitk.WriteImage(image, str(tmp_path / name), compressed)
            assert np.array_equal(read_volume(tmp_path / name).array[::-1, ::-1], voxels((7, 6, 5)).T)


def test_only_the_header_is_read_for_a_grid(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", voxels())
    grid = read_grid(path)
    assert (grid.shape, grid.path) == ((5, 6, 7), str(path))
    assert "5 x 6 x 7 voxels of 1 x 1.5 x 2 mm, RAS" in grid.describe()


# --- Voxels


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32])
def test_voxels_without_rescaling_keep_their_type_and_value(tmp_path, dtype):
    stored = (voxels() % 100).astype(dtype)
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", stored, np.eye(4)))
    assert volume.array.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(volume.array, stored)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_big_endian_files_are_read_into_native_order(tmp_path, suffix):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(voxels(), oblique_affine(), header)
    nib.save(image, tmp_path / f"scan{suffix}")
    assert nib.load(tmp_path / f"scan{suffix}").header.endianness == ">"
    volume = read_volume(tmp_path / f"scan{suffix}")
    assert volume.array.dtype == np.int16 and volume.array.dtype.isnative
    assert np.array_equal(volume.array, voxels())


def test_whole_rescaling_stays_integer_and_other_rescaling_becomes_float32(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", voxels().astype(np.uint16), np.eye(4))
    for slope, intercept, dtype in ((1, -1024, np.int16), (1000, 0, np.int32), (0.5, 0.25, np.float32)):
        edit_header(path, scl_slope=slope, scl_inter=intercept)
        array = read_volume(path).array
        assert array.dtype == dtype
        assert np.allclose(array, nib.load(path).get_fdata())


def test_a_float_label_of_whole_numbers_becomes_integer(tmp_path):
    path = write_nifti(tmp_path / "label.nii.gz", (voxels() % 5).astype(np.float64), np.eye(4))
    volume = read_volume(path, label=True)
    assert volume.array.dtype == np.uint8
    assert np.array_equal(volume.array, voxels() % 5)


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", voxels()[..., None, None], np.eye(4))
    assert np.array_equal(read_volume(path).array, voxels())
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(voxels((7, 6, 5)))]), str(tmp_path / "scan.nrrd"))
    assert read_volume(tmp_path / "scan.nrrd").array.shape == (5, 6, 7)


def test_types_a_format_cannot_hold_are_stored_in_the_nearest_that_it_can(tmp_path):
    grid = read_grid(write_nifti(tmp_path / "scan.nii", voxels(), np.eye(4)))
    for dtype, stored in ((bool, np.uint8), (np.int64, np.uint8), (np.float16, np.float32)):
        for name in ("label.nii.gz", "label.mha"):
            write_volume(tmp_path / name, (voxels() % 2).astype(dtype), grid)
            assert read_volume(tmp_path / name).array.dtype == stored


# --- Bad files: (name, how it is made, words of the sentence)


def make_truncated_gzip(path: Path) -> None:
    write_nifti(path, noise())
    path.write_bytes(path.read_bytes()[:-200])


def make_cut_in_header(path: Path) -> None:
    write_nifti(path, voxels())
    path.write_bytes(path.read_bytes()[:40])


def make_truncated(path: Path) -> None:
    write_nifti(path, voxels())
    path.write_bytes(path.read_bytes()[:-10])


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)


def blank_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)


def make_corrupt_gzip(path: Path) -> None:
    blank_middle(write_nifti(path, noise()))


def make_corrupt_itk(path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(noise()), str(path), True)
    blank_middle(path)


def make_cut_itk(path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(noise()), str(path), True)
    path.write_bytes(path.read_bytes()[:-300])


def make_rgb(path: Path) -> None:
    colours = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), path)


def make_nan(path: Path) -> None:
    array = voxels().astype(np.float32)
    array[2, 3, 4:6] = (np.nan, np.inf)
    write_nifti(path, array)


def make_giant(path: Path) -> None:
    write_nifti(path, voxels())
    edit_header(path, dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])


def make_giant_gzip(path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((400, 400, 400))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + bytes(1000)))


def make_sheared(path: Path) -> None:
    affine = np.eye(4)
    affine[0, 2] = np.tan(np.radians(18.5))
    write_nifti(path, voxels(), affine)


def make_singular(path: Path) -> None:
    image = nib.Nifti1Image(voxels(), np.eye(4))
    image.header["srow_x"] = image.header["srow_y"] = (1, 1, 0, 0)
    nib.save(nib.Nifti1Image(voxels(), None, image.header), path)


def make_with_pixdim(value: float):
    def make(path: Path) -> None:
        edit_header(write_nifti(path, voxels()), pixdim=[1, 1, value, 1, 1, 1, 1, 1], sform_code=0)

    return make


def make_rescaled(slope: float, intercept: float):
    def make(path: Path) -> None:
        edit_header(write_nifti(path, voxels()), scl_slope=slope, scl_inter=intercept)

    return make


BAD_FILES = {
    "empty.nii.gz": (lambda path: path.write_bytes(b""), "empty"),
    "text.nii": (lambda path: path.write_text("not an image" * 100), "no NIfTI file"),
    "plain.nii.gz": (lambda path: path.write_text("not an image" * 100), "no NIfTI file"),
    "folder.nii": (lambda path: path.mkdir(), "no DICOM image series"),
    "unknown.png": (lambda path: path.write_bytes(b"x"), "no image format is known"),
    "truncated.nii.gz": (make_truncated_gzip, "stream is truncated"),
    "cut_in_header.nii.gz": (make_cut_in_header, "gzip stream is truncated"),
    "corrupt.nii.gz": (make_corrupt_gzip, "stream is truncated or damaged"),
    "corrupt.nrrd": (make_corrupt_itk, "stream is truncated or damaged"),
    "corrupt.mha": (make_corrupt_itk, "stream is truncated or damaged"),
    "cut.mha": (make_cut_itk, "compressed bytes, but the file holds"),
    "cut_data.nrrd": (make_cut_itk, "stream is truncated or damaged"),
    "truncated.nii": (make_truncated, "420 bytes of voxels, but the file holds 410"),
    "rgb.nii.gz": (make_rgb, "colour image"),
    "complex.nii": (lambda path: write_nifti(path, voxels().astype(np.complex64)), "not real numbers"),
    "flat.nii.gz": (lambda path: write_nifti(path, voxels((5, 6))), r"2-D \(5 x 6\)"),
    "time.nii.gz": (lambda path: write_nifti(path, voxels((5, 6, 7, 2))), r"4 axes \(5 x 6 x 7 x 2\)"),
    "nan.nii.gz": (make_nan, "2 of 210 voxels are NaN, infinite or beyond"),
    "giant.nii": (make_giant, "32000 x 32000 x 32000 voxels .* GiB"),
    "giant.nii.gz": (make_giant_gzip, "64000352 bytes of voxels"),
    "zero_spacing.nii": (make_with_pixdim(0), r"voxel spacing is \(1, 0, 1\) mm"),
    "tiny_spacing.nii": (make_with_pixdim(1e-20), r"voxel spacing is \(1, 1e-20, 1\) mm"),
    "huge_slope.nii": (make_rescaled(1e30, 0), r"beyond 1e\+30"),
    "no_type.nii": (lambda path: edit_header(write_nifti(path, voxels()), datatype=1), "voxels of the type 1"),
    "pointer.nii.gz": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "page.nrrd": (lambda path: path.write_text("<!DOCTYPE html><html>Log in"), "web page"),
    "archive.mha": (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "ZIP archive"),
    "twice.nii.gz": (lambda path: path.write_bytes(gzip.compress(gzip.compress(bytes(999)))), "packed by gzip"),
    "slice.mha": (lambda path: path.write_bytes(bytes(128) + b"DICM" + bytes(9)), "a DICOM file"),
    "link.nii.gz": (lambda path: path.symlink_to("gone.nii.gz"), "this is a link to gone.nii.gz, which is not there"),
    "nan_spacing.nii": (make_with_pixdim(np.nan), r"voxel spacing is \(1, nan, 1\) mm"),
    "sheared.nii": (make_sheared, "71.50 degrees instead of 90"),
    "singular.nii": (make_singular, "sheared or singular"),
    "no_offset.nii": (lambda path: edit_header(write_nifti(path, voxels()), vox_offset=np.nan), "puts the voxels at"),
    "odd_type.nii": (lambda path: edit_header(write_nifti(path, voxels()), datatype=999), "unknown voxel type 999"),
    "no_axis.nii": (lambda path: edit_header(write_nifti(path, voxels()), dim=[3, 5, 0, 7, 1, 1, 1, 1]), "at least 1"),
    "nine_axes.nii": (lambda path: edit_header(write_nifti(path, voxels()), dim=[9] * 8), "no NIfTI file"),
    "far_voxels.nii": (lambda path: edit_header(write_nifti(path, voxels()), vox_offset=np.inf), "puts the voxels at"),
    "early_voxels.nii": (lambda path: edit_header(write_nifti(path, voxels()), vox_offset=16), "puts the voxels at"),
    "late_voxels.nii": (lambda path: edit_header(write_nifti(path, voxels()), vox_offset=1e9), "the file holds 0"),
    "nan_offset.nii": (make_rescaled(1, np.nan), r"rescales voxels by 1 and adds nan"),
    "inf_offset.nii": (make_rescaled(1, np.inf), r"rescales voxels by 1 and adds inf"),
    "huge_offset.nii": (make_rescaled(1, 1e38), r"rescales voxels by 1 and adds 1e\+38"),
    "half.nii": (lambda path: edit_header(write_nifti(path, voxels()), magic=b"ni1"), "half of a NIfTI pair"),
    "channels.nii": (lambda path: edit_header(write_nifti(path, voxels()), dim=[7, 5, 6, 7] + [32000] * 4),
        "bytes of voxels, but the file holds 420"),
    "zero.mha": (lambda path: meta_image(path, ElementSpacing="1 0 1"), r"voxel spacing is \(1, 0, 1\)"),
    "negative.mha": (lambda path: meta_image(path, ElementSpacing="-1 1 1"), r"voxel spacing is \(-1, 1, 1\)"),
    "nan.mha": (lambda path: meta_image(path, ElementSpacing="nan 1 1"), r"voxel spacing is \(nan, 1, 1\)"),
    "words.mha": (lambda path: meta_image(path, DimSize="four 3 2"), "not numbers"),
    "broken.mha": (lambda path: meta_image(path, DimSize="4.5 3 2"), "not whole numbers"),
    "no_voxels.mha": (lambda path: meta_image(path, DimSize="4 3 -2"), "at least 1"),
    "vectors.mha": (lambda path: meta_image(path, ElementNumberOfChannels="3"), "3 values"),
    "long.mha": (lambda path: meta_image(path, DimSize="4 3 20"), "480 bytes of voxels, but the file holds 48"),
    "giant.mha": (lambda path: meta_image(path, DimSize="90000 90000 90000"), "GiB"),
    "odd_type.mha": (lambda path: meta_image(path, ElementType="MET_STRING"), "unknown voxel type"),
    "text.mha": (lambda path: path.write_text("hello\n"), "not a MetaImage file"),
    "zipped.mha": (lambda path: meta_image(path, CompressedData="True"), "stream is truncated or damaged"),
    "giant_zip.mha": (lambda path: meta_image(path, CompressedData="True", DimSize="400 400 400"), "cannot hold"),
    "lost.mhd": (lambda path: path.write_text(
        "NDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = gone.raw\n"), "gone.raw, are missing"),
    "text.nrrd": (lambda path: path.write_text("hello"), "not an NRRD file"),
    "cut.nrrd": (lambda path: path.write_text("NRRD0004\ntype: short\n"), "lacks 'sizes'"),
    "flat.nrrd": (lambda path: nrrd(path, dimension="2", sizes="4 6", space_directions="none none"), "2-D"),
    "time.nrrd": (lambda path: nrrd(path, dimension="4", sizes="2 2 3 2"), r"4 axes \(2 x 2 x 3 x 2\)"),
    "vectors.nrrd": (lambda path: nrrd(path, dimension="4", sizes="3 2 2 2", kinds="vector domain domain domain",
        space_directions="none (1,0,0) (0,1,0) (0,0,1)"), "3 values"),
    "zero.nrrd": (lambda path: nrrd(path, space_directions="(1,0,0) (0,0,0) (0,0,1)"), r"spacing is \(1, 0, 1\)"),
    "sheared.nrrd": (lambda path: nrrd(path, space_directions="(1,0,0) (0,1,0) (0,0.3,1)"), "73.30 degrees"),
    "singular.nrrd": (lambda path: nrrd(path, space_directions="(1,0,0) (1,0,0) (0,0,1)"), "singular|cannot be read"),
    "long.nrrd": (lambda path: nrrd(path, sizes="4 3 20"), "480 bytes of voxels, but the file holds 48"),
    "odd_type.nrrd": (lambda path: nrrd(path, type="block"), "unknown voxel type"),
    "zipped.nrrd": (lambda path: nrrd(path, encoding="gzip"), "stream is truncated or damaged"),
    "lost.nhdr": (lambda path: nrrd(path, data_file="gone.raw"), "gone.raw, are missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence_that_names_it(tmp_path, name):
    make, words = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=words) as caught:
        read_volume(tmp_path / name)
    sentence = str(caught.value)
    assert sentence.count("\n") == 0 and sentence.endswith(".")
    assert str(tmp_path) in sentence


def test_header_faults_are_found_without_reading_voxels(tmp_path):
    only_in_voxels = {"nan.nii.gz", "huge_slope.nii", "corrupt.nii.gz", "corrupt.nrrd", "corrupt.mha", "zipped.mha"}
    for name, (make, words) in BAD_FILES.items():
        make(tmp_path / name)
        if name not in only_in_voxels:
            with pytest.raises(DataError, match=words):
                read_grid(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    for name in ("none.nii.gz", "none.mha", "none", "none::12345678"):
        with pytest.raises(DataError, match="no such"):
            read_grid(tmp_path / name)


@pytest.mark.parametrize(("highest", "kept"), [(200, np.uint8), (300, np.int16), (40000, np.int32)])
def test_a_label_is_narrowed_to_what_holds_it_where_asked(tmp_path, monkeypatch, highest, kept):
    monkeypatch.setattr(grids, "_SLAB_VOXELS", 1)
    monkeypatch.setattr(grids, "_MIN_SLICES", 2)
    label = (voxels() % 3).astype(np.int64)
    label[2, 3, 5] = highest
    path = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(label, np.eye(4), dtype=np.int64), path)
    assert read_volume(path, label=True).array.dtype == np.int64
    narrow = read_volume(path, label=True, narrow=True).array
    assert narrow.dtype == kept
    assert np.array_equal(narrow, label)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
def test_slab_by_slab_and_tile_by_tile_every_voxel_comes_to_its_place(tmp_path, monkeypatch, order):
    monkeypatch.setattr(grids, "_SLAB_VOXELS", 1)
    monkeypatch.setattr(grids, "_MIN_SLICES", 3)
    monkeypatch.setattr(volumes, "_TILE", (2, 3, 2))
    stored, affine = voxels((7, 8, 10)), oblique_affine(order, (-1, 1, -1))
    first = read_volume(write_nifti(tmp_path / "first.nii", stored, affine))
    for name in ("scan.nii", "scan.nii.gz", "scan.mha"):
        write_volume(tmp_path / name, first.array, first.grid)
        volume = read_volume(tmp_path / name)
        assert np.array_equal(volume.array, volume.grid.to_ras(stored))


def test_whole_scaled_voxels_take_the_type_that_holds_those_of_all_slabs(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "_SLAB_VOXELS", 1)
    monkeypatch.setattr(grids, "_MIN_SLICES", 2)
    stored = np.arange(7, dtype=np.int16) * np.ones((3, 4, 7), np.int16)
    path = write_nifti(tmp_path / "scan.nii", stored)
    edit_header(path, scl_slope=10000.0, scl_inter=-5.0)
    volume = read_volume(path)
    assert volume.array.dtype == np.int32
    assert np.array_equal(volume.array, stored.astype(int) * 10000 - 5)


def test_a_label_with_fractions_is_refused(tmp_path):
    path = write_nifti(tmp_path / "label.nii.gz", voxels().astype(np.float32) / 2)
    with pytest.raises(DataError, match=r"whole numbers, but voxels hold values such as 0\.5"):
        read_volume(path, label=True)


@pytest.mark.parametrize("factor", [1 / 255, 0.9999, 1 + 1e-6])
def test_a_label_is_whole_up_to_rounding(tmp_path, factor):
    label = (voxels() % 2).astype(np.uint8)
    if factor == 1 / 255:
        path = edit_header(write_nifti(tmp_path / "label.nii", label * 255, np.eye(4)), scl_slope=factor, scl_inter=0)
    else:
        path = write_nifti(tmp_path / "label.nii", (label * factor).astype(np.float32), np.eye(4))
    array = read_volume(path, label=True).array
    assert array.dtype == np.uint8
    assert np.array_equal(array, label)


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
@pytest.mark.parametrize("value", [-1, 65_536, 1_000_000_000])
def test_a_label_beyond_those_that_are_kept_is_refused_with_its_value(tmp_path, dtype, value):
    array = voxels().astype(dtype)
    array[1, 2, 3] = value
    path = write_nifti(tmp_path / "label.nii.gz", array)
    with pytest.raises(DataError, match=rf"label\.nii\.gz: holds the label value {value}, but .* 0 and 65535"):
        read_volume(path, label=True)
    assert read_volume(path).array.min() == array.min()


def test_what_is_not_a_number_in_a_label_map_is_background(tmp_path):
    array = voxels().astype(np.float32)
    array[1, 2, 3] = np.nan
    with pytest.raises(DataError, match=r"1 of 210 voxels is NaN.*by 0, the background"):
        read_volume(write_nifti(tmp_path / "label.nii.gz", array), label=True)


def test_a_label_beyond_rounding_is_refused_with_all_its_digits(tmp_path):
    path = write_nifti(tmp_path / "label.nii", np.full((3, 3, 3), 1.000625, np.float32))
    with pytest.raises(DataError, match=r"values such as 1\.000625;"):
        read_volume(path, label=True)


def test_whatever_a_library_raises_becomes_one_sentence_about_the_file(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "scan.nii", voxels())
    for kind, words in ((ZeroDivisionError, "ZeroDivisionError: no"), (MemoryError, "larger than the memory")):

        def fail(*_: object, kind: type[Exception] = kind) -> None:
            raise kind("no")

        for name in ("open_nifti", "num_channels"):
            with monkeypatch.context() as patch:
                patch.setattr(nifti, name, fail)
                with pytest.raises(DataError, match=rf"scan\.nii: .*{words}"):
                    volumes.channels_of(path) if name == "num_channels" else read_grid(path)
        with monkeypatch.context() as patch:
            patch.setattr(nifti.NiftiScan, "read_slabs", fail)
            with pytest.raises(DataError, match=rf"scan\.nii: .*{words}"):
                read_volume(path)


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    for name in ("scan.nii", "scan.mha", "other"):
        os.mkfifo(tmp_path / name)
    for name in ("scan.nii", "scan.mha", "other"):
        with pytest.raises(DataError, match="device, pipe or socket"):
            read_grid(tmp_path / name)
    assert [os.path.basename(path) for path in find_scans(tmp_path)] == ["scan.mha", "scan.nii"]


def rounding_grid(affine: np.ndarray) -> Grid:
    return Grid(shape=(200, 190, 40), affine=affine, path="label.nii.gz")


@pytest.mark.parametrize("digits", [4, 5])
def test_grids_that_differ_by_rounding_are_one_grid(digits):
    require_same_grid(rounding_grid(oblique_affine()), rounding_grid(np.round(oblique_affine(), digits)))


@pytest.mark.parametrize(
    ("move", "words"),
    [
        ([0.35, 0, 0], r"up to 0\.35 mm or 0\.468 voxels apart"),
        ([0, 0, 1.25], r"up to 1\.25 mm or 0\.[45]\d* voxels apart"),
    ],
)
def test_grids_half_a_voxel_apart_are_refused_with_the_distance(move, words):
    moved = oblique_affine()
    moved[:3, 3] += move
    with pytest.raises(DataError, match=words):
        require_same_grid(rounding_grid(oblique_affine()), rounding_grid(moved))
    with pytest.raises(DataError, match="voxels apart"):
        require_same_grid(rounding_grid(oblique_affine()), rounding_grid(oblique_affine((0, 1, 2), (-1, 1, 1))))


def test_a_scan_beyond_the_memory_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "scan.nii.gz", voxels((40, 40, 40)))
    monkeypatch.setattr(files, "available_memory_bytes", lambda: 200_000)
    monkeypatch.setattr(nifti.NiftiScan, "read_slabs", lambda scan: pytest.fail("the voxels were opened"))
    with pytest.raises(DataError, match="40 x 40 x 40 voxels"):
        read_volume(path)


def test_a_gzip_of_several_members_is_read(tmp_path):
    data = write_nifti(tmp_path / "scan.nii", voxels(), np.eye(4)).read_bytes()
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(data[:400]) + gzip.compress(data[400:]))
    assert np.array_equal(read_volume(tmp_path / "scan.nii.gz").array, voxels())


# --- Writing


def test_writing_refuses_another_shape_and_an_unknown_suffix(tmp_path):
    grid = read_grid(write_nifti(tmp_path / "scan.nii", voxels(), oblique_affine((2, 0, 1))))
    with pytest.raises(DataError, match="5 x 6 x 7 voxels does not fit"):
        write_volume(tmp_path / "label.nii", voxels(), grid)
    with pytest.raises(DataError, match="no format is known"):
        write_volume(tmp_path / "label.png", voxels().transpose(1, 2, 0), grid)


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path, monkeypatch):
    volume = read_volume(write_nifti(tmp_path / "scan.nii", voxels()))
    write_volume(tmp_path / "label.nii.gz", volume.array, volume.grid)
    before = (tmp_path / "label.nii.gz").read_bytes()

    def fail(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(DataError, match="No space left on device"):
        write_volume(tmp_path / "label.nii.gz", volume.array + 1, volume.grid)
    assert (tmp_path / "label.nii.gz").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["label.nii.gz", "scan.nii"]


def test_writing_below_a_file_is_refused(tmp_path):
    volume = read_volume(write_nifti(tmp_path / "scan.nii", voxels()))
    with pytest.raises(DataError, match="not writable"):
        write_volume(tmp_path / "scan.nii" / "label.nii", volume.array, volume.grid)


def test_written_files_are_the_same_every_time(tmp_path):
    volume = read_volume(write_nifti(tmp_path / "scan.nii", voxels()))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, volume.array, volume.grid)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_another_format_is_one_line_of_the_table(tmp_path, monkeypatch):
    lab = """
import numpy as np
from types import SimpleNamespace
from mim3d.scans.grids import Grid

def open_npy(path):
    array = np.load(path)
    return SimpleNamespace(grid=Grid(shape=array.shape, affine=np.eye(4), path=path), read_slabs=lambda: iter([array]))

def write_npy(path, array, grid):
    np.save(path, array)
"""
    (tmp_path / "npy_format.py").write_text(lab)
    monkeypatch.syspath_prepend(str(tmp_path))
    form = volumes.Format(name="NumPy", suffixes=(".npy",), reader="npy_format:open_npy", writer="npy_format:write_npy")
    monkeypatch.setattr(volumes, "FORMATS", (*volumes.FORMATS, form))
    monkeypatch.setattr(volumes, "SUFFIXES", (*volumes.SUFFIXES, ".npy"))
    source = read_volume(write_nifti(tmp_path / "scan.nii", voxels(), np.eye(4)))
    write_volume(tmp_path / "set" / "again.npy", source.array, source.grid)
    assert find_scans(tmp_path / "set") == [str(tmp_path / "set" / "again.npy")]
    assert np.array_equal(read_volume(tmp_path / "set" / "again.npy").array, source.array)
    assert scan_id(tmp_path / "set" / "again.npy") == "again"


# --- Finding


def test_images_are_found_by_suffix_and_other_files_passed_over(tmp_path):
    for name in ("b.nii.gz", "a.NII", "sub/c.mhd", "sub/c.raw", "notes.txt", "table.csv", ".hidden/d.nii", "._a.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_scans(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a.NII", "b.nii.gz", "sub/c.mhd"]


def test_finding_in_a_missing_folder_is_refused_and_an_empty_one_holds_nothing(tmp_path):
    assert find_scans(tmp_path) == []
    with pytest.raises(DataError, match="no such folder"):
        find_scans(tmp_path / "gone")


def test_links_that_lead_in_circles_end(tmp_path):
    write_nifti(tmp_path / "scan.nii", voxels())
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_scans(tmp_path) == [str(tmp_path / "scan.nii")]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/case_01.nii.gz", "case_01"),
        ("/data/ct.v2.NRRD", "ct.v2"),
        ("/data/a b/sca n:1.mha", "sca_n_1"),
        ("/data/series/", "series"),
        ("/data/series::0a1b2c3d", "series_0a1b2c3d"),
        ("/data/....nii", "scan"),
        ("/data/肝脏.nii.gz", "肝脏"),
        ("/data/e\u0301 1.nii.gz", "\u00e9_1"),
    ],
)
def test_scan_id_is_a_safe_file_name(path, expected):
    assert scan_id(path) == expected


def test_formats_without_patients_have_no_patient_key(tmp_path):
    assert patient_of(write_nifti(tmp_path / "scan.nii", voxels())) is None


# --- Real scans, read by nibabel and SimpleITK on their own


def real_files(folder: Path) -> list[Path]:
    suffixes = (".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
    return [
        path for path in sorted(folder.rglob("*")) if path.name.endswith(suffixes) and "spine_report" not in path.name
    ]


def read_by_simple_itk(path: Path) -> tuple[sitk.Image, np.ndarray]:
    image = sitk.ReadImage(str(path))
    return image, sitk.GetArrayFromImage(image).T


@pytest.mark.parametrize("folder", ["formats", "totalseg_examples", "dicom"])
def test_landmarks_of_real_scans_stay_where_simple_itk_and_nibabel_see_them(shared_data, folder):
    paths = real_files(shared_data / folder)
    assert paths
    for path in paths:
        volume = read_volume(path)
        assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
        image, stored = read_by_simple_itk(path)
        assert volume.grid.shape == stored.shape
        index = [size // 3 for size in stored.shape]
        point_mm = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        assert value_at(volume.affine, volume.array, point_mm) == stored[tuple(index)]
        back = volume.grid.from_ras(volume.array)
        assert np.array_equal(back, stored) and back.dtype == stored.dtype
        assert np.sort(volume.spacing_mm) == pytest.approx(np.sort(image.GetSpacing()), abs=1e-5)
        if path.name.endswith(".nii.gz"):
            source = nib.load(path)
            point_mm, value = landmark_mm(source.affine, np.asarray(source.dataobj))
            assert value_at(volume.affine, volume.array, point_mm) == value
            canonical = nib.as_closest_canonical(source)
            assert np.array_equal(np.asarray(canonical.dataobj), volume.array)
            assert np.allclose(canonical.affine, volume.affine, atol=1e-4)


def test_labels_of_real_scans_are_written_back_with_their_very_geometry(shared_data, tmp_path):
    for path in real_files(shared_data / "totalseg_examples"):
        volume = read_volume(path)
        target = tmp_path / "label.nii.gz"
        write_volume(target, (volume.array > 0).astype(np.uint8), volume.grid)
        source, written = nib.load(path), nib.load(target)
        assert np.array_equal(source.affine, written.affine)
        assert source.shape == written.shape
        for name in GEOMETRY_FIELDS:
            assert source.header[name].tobytes() == written.header[name].tobytes(), (path, name)
        assert np.array_equal(np.asarray(written.dataobj), np.asarray(source.dataobj) > 0)
    for path in real_files(shared_data / "formats"):
        volume = read_volume(path)
        target = tmp_path / f"label{path.suffix}"
        write_volume(target, volume.array, volume.grid)
        (source, stored), (written, again) = read_by_simple_itk(path), read_by_simple_itk(target)
        assert np.array_equal(stored, again)
        for told in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(source, told)() == pytest.approx(getattr(written, told)(), rel=1e-15, abs=1e-15), (
                path,
                told,
            )


def test_a_real_rgb_picture_is_refused_as_such(shared_data):
    path = shared_data / "totalseg_examples" / "spine_case" / "example_ct_report_spine_report.nii.gz"
    with pytest.raises(DataError, match=r"colour image \(R/G/B"):
        read_grid(path)
