"""DICOM series: found, ordered and read; geometry that cannot be stacked is refused; patients stay private."""

import os
import shutil
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.config import disable_value_validation
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

from mim3d.caching.cache import open_cache
from mim3d.caching.case import source_files
from mim3d.caching.summary import cohort_of
from mim3d.commands.cache import cache
from mim3d.core.errors import DataError
from mim3d.scans.dicom import headers
from mim3d.scans.dicom.headers import read_kind
from mim3d.scans.volumes import (
    find_scans,
    modality_of,
    patient_of,
    read_grid,
    read_volume,
    scan_id,
    scanner_of,
    write_volume,
)

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def voxels(num_slices: int = 6) -> np.ndarray:
    """(column, row, slice) with a different value in every voxel."""
    return np.arange(5 * 4 * num_slices, dtype=np.int16).reshape(5, 4, num_slices) * 3 - 50


def heights(num_slices: int = 6, gap_mm: float = 2.5) -> list[float]:
    return [gap_mm * index for index in range(num_slices)]


def positions(heights_mm: Sequence[float]) -> list[tuple[float, float, float]]:
    """Places of slices stacked along Z."""
    return [(-10.0, 20.0, 30.0 + height) for height in heights_mm]


def header(series: str, index: int, position: Sequence[float] | None, fields: dict[str, object]) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = str(fields.get("SOPClassUID", CT_IMAGE))
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{series}.{index + 1}"
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID = f"1.2.3.{series}", "1.2.3"
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientID, data.PatientName, data.PatientBirthDate = "4711", "Doe^Jane", "19700101"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 4, 5, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelSpacing, data.ImageOrientationPatient = [0.8, 0.7], list(AXIAL)
    if position is not None:
        data.ImagePositionPatient = [float(value) for value in position]
    data.RescaleSlope, data.RescaleIntercept, data.InstanceNumber = 1, 0, index + 1
    for name, value in fields.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    return data


def pack(data: FileDataset, packed: str, folder: Path) -> None:
    """Compress the pixels: RLE by pydicom, JPEG by SimpleITK, whose file lends its pixels."""
    if packed == "RLE":
        data.compress(RLELossless)
        return
    image = sitk.GetImageFromArray(data.pixel_array[None])
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "lent"))
    writer.SetUseCompression(True)
    writer.SetCompressor(packed)
    writer.Execute(image)
    lender = pydicom.dcmread(folder / "lent")
    (folder / "lent").unlink()
    data.PixelData = lender.PixelData
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = lender.file_meta.TransferSyntaxUID


def write_series(
    folder: Path,
    places: Sequence[Sequence[float] | None],
    *,
    series: str = "1",
    first_index: int = 0,
    array: np.ndarray | None = None,
    packed: str = "",
    **fields: object,
) -> Path:
    """One file per place, named so that their order on disk is not their order in space."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = voxels(len(places)) if array is None else array
    for index, position in enumerate(places):
        data = header(series, index + first_index, position, fields)
        data.Columns, data.Rows = stored.shape[:2]
        data.PixelData = stored[:, :, index].T.copy().tobytes()
        if packed:
            pack(data, packed, folder)
        for name in ("Rows", "Columns"):
            setattr(data, name, fields.get(name, data[name].value))
        data.save_as(folder / f"{(index * 7) % 11:02d}_{series}_{index + first_index}.dcm", enforce_file_format=True)
    return folder


# --- Reading


def test_slices_are_ordered_along_the_normal_and_come_to_ras(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    volume = read_volume(folder)
    expected = np.diag([-0.7, -0.8, 2.5, 1.0])
    expected[:3, 3] = (10.0, -20.0, 30.0)
    assert volume.grid.shape == (5, 4, 6)
    assert np.allclose(volume.grid.affine, expected)
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array, voxels()[::-1, ::-1])
    assert volume.spacing_mm == pytest.approx((0.7, 0.8, 2.5))


def test_an_oblique_series_keeps_its_direction_as_simple_itk_reads_it(tmp_path):
    angle = np.radians(20)
    down = (0.0, np.cos(angle), np.sin(angle))
    normal = np.array([0.0, -np.sin(angle), np.cos(angle)])
    places = [np.array([5.0, 6.0, 7.0]) + 3.0 * index * normal for index in range(6)]
    folder = write_series(tmp_path / "mr", places[::-1], Modality="MR", ImageOrientationPatient=[1, 0, 0, *down])
    volume = read_volume(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    for index in [(0, 0, 0), (4, 3, 5), (1, 2, 3)]:
        point_mm = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        found = np.linalg.solve(volume.affine, [*point_mm, 1])[:3]
        assert np.allclose(found, np.rint(found), atol=1e-4)
        assert volume.array[tuple(np.rint(found).astype(int))] == image.GetPixel(index)


def test_a_label_of_a_series_is_written_to_nifti_in_place(tmp_path):
    volume = read_volume(write_series(tmp_path / "ct", positions(heights())))
    write_volume(tmp_path / "label.nii.gz", (volume.array > 0).astype(np.uint8), volume.grid)
    written = nib.load(tmp_path / "label.nii.gz")
    assert np.allclose(written.affine, volume.grid.affine)
    assert np.array_equal(np.asarray(written.dataobj), voxels() > 0)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)


def test_hounsfield_units_are_int16_where_they_fit_and_wider_where_not(tmp_path):
    stored = voxels().astype(np.uint16) % 3000
    folder = write_series(
        tmp_path / "a", positions(heights()), array=stored, RescaleIntercept=-1024, PixelRepresentation=0
    )
    volume = read_volume(folder)
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array[::-1, ::-1], stored.astype(int) - 1024)
    stored[0, 0, 3] = 65000
    folder = write_series(
        tmp_path / "b", positions(heights()), array=stored, RescaleIntercept=-1024, PixelRepresentation=0
    )
    volume = read_volume(folder)
    assert volume.array.dtype == np.int32
    assert np.array_equal(volume.array[::-1, ::-1], stored.astype(int) - 1024)


def test_every_slice_is_rescaled_by_its_own_slope(tmp_path):
    for index, place in enumerate(positions(heights())):
        write_series(
            tmp_path / "pt",
            [place],
            first_index=index,
            array=voxels()[:, :, [index]],
            Modality="PT",
            RescaleSlope=0.5 + index,
        )
    volume = read_volume(tmp_path / "pt")
    assert volume.array.dtype == np.float32
    assert np.allclose(volume.array[::-1, ::-1], voxels() * (0.5 + np.arange(6)))


@pytest.mark.parametrize("packed", ["RLE", "JPEG", "JPEG2000"])
def test_a_compressed_series_is_unpacked(tmp_path, packed):
    stored = np.random.default_rng(0).integers(-1000, 2000, (24, 16, 6)).astype(np.int16)
    folder = write_series(tmp_path / "ct", positions(heights()), array=stored, packed=packed)
    assert pydicom.dcmread(next(folder.iterdir())).file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(read_volume(folder).array, stored[::-1, ::-1])


def write_frames(folder: Path, slopes: Sequence[float]) -> Path:
    """A multi-frame file whose frames are out of order."""
    data = header("1", 0, None, {"SOPClassUID": ENHANCED_CT, "NumberOfFrames": 6})
    for name in ("PixelSpacing", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(data, name)

    def macro(**fields: object) -> DicomSequence:
        item = Dataset()
        for name, value in fields.items():
            setattr(item, name, value)
        return DicomSequence([item])

    shared = Dataset()
    shared.PixelMeasuresSequence = macro(PixelSpacing=[0.8, 0.7], SliceThickness=2.5)
    shared.PlaneOrientationSequence = macro(ImageOrientationPatient=list(AXIAL))
    data.SharedFunctionalGroupsSequence = DicomSequence([shared])
    order = [3, 0, 5, 1, 4, 2]
    frames = []
    for slice_index in order:
        frame = Dataset()
        frame.PlanePositionSequence = macro(ImagePositionPatient=list(positions(heights())[slice_index]))
        transformation = macro(RescaleIntercept=-100, RescaleSlope=slopes[slice_index], RescaleType="HU")
        frame.PixelValueTransformationSequence = transformation
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    data.PixelData = voxels().T[order].copy().tobytes()
    folder.mkdir()
    data.save_as(folder / "frames.dcm")
    return folder


def test_a_multi_frame_file_is_a_series(tmp_path):
    volume = read_volume(write_frames(tmp_path / "ct", [2] * 6))
    assert volume.spacing_mm == pytest.approx((0.7, 0.8, 2.5))
    assert np.array_equal(volume.array[::-1, ::-1], voxels() * 2 - 100)


def test_a_file_of_many_frames_is_a_scan_by_itself(tmp_path):
    written = write_frames(tmp_path / "ct", [1] * 6) / "frames.dcm"
    for name in ("case.dcm", "IM0001"):
        path = written.rename(tmp_path / name)
        assert np.array_equal(read_volume(path).array, voxels()[::-1, ::-1] - 100)
        assert scan_id(path) == name.removesuffix(".dcm") and modality_of(path) == "CT" and patient_of(path)
        written = path
        assert source_files(str(path)) == [str(path)]


def test_files_of_many_frames_in_one_folder_are_named_by_their_files(tmp_path):
    images = write_frames(tmp_path / "images", [1] * 6)
    other = pydicom.dcmread(images / "frames.dcm")
    other.SeriesInstanceUID, other.SOPInstanceUID = "1.2.3.8", "1.2.3.8.1"
    other.save_as(images / "other.dcm")
    (images / "broken.dcm").write_bytes(b"")
    assert find_scans(tmp_path) == [str(images / name) for name in ("broken.dcm", "frames.dcm", "other.dcm")]


def test_one_slice_or_another_object_given_as_a_scan_is_told_apart(tmp_path):
    one = next(write_series(tmp_path / "ct", positions(heights())).iterdir())
    assert refusal(one) == (
        f"{one}: this DICOM file is one slice, and a volume needs all slices of its series; give a folder with "
        "the whole series."
    )
    report = next(write_series(tmp_path / "sr", positions([0]), Modality="SR").iterdir())
    assert "this DICOM file is no scan (SR)" in refusal(report)
    (tmp_path / "text").write_text("no image")
    assert "no image format is known by this name" in refusal(tmp_path / "text")


def test_frames_rescaled_in_different_ways_are_refused(tmp_path):
    assert "rescaled in different ways" in refusal(write_frames(tmp_path / "ct", range(1, 7)))


# --- Refusals


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_grid(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_gantry_tilt_is_refused_with_its_angle(tmp_path):
    angle = np.radians(15)
    plane = [1, 0, 0, 0, float(np.cos(angle)), float(-np.sin(angle))]
    folder = write_series(tmp_path / "ct", positions(heights()), ImageOrientationPatient=plane)
    assert "tilted by 15.0 degrees" in refusal(folder)
    assert "dcm2niix" in refusal(folder)


def test_a_tilt_that_only_the_gantry_tells_of_is_refused(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()), GantryDetectorTilt=-12)
    assert "gantry was tilted by 12.0 degrees" in refusal(folder)


def test_slices_shifted_sideways_are_refused(tmp_path):
    places = positions(heights())
    places[3] = (-8.0, *places[3][1:])
    assert "shifted sideways by up to 2.00 mm" in refusal(write_series(tmp_path / "ct", places))


def test_missing_slices_are_refused_with_their_place(tmp_path):
    kept = [height for index, height in enumerate(heights(12)) if index not in (4, 5)]
    sentence = refusal(write_series(tmp_path / "ct", positions(kept)))
    assert "2 slices are missing (gaps up to 7.50 mm, where 2.50 mm is the rule, after slice 4)" in sentence


def test_uneven_spacing_is_refused_with_its_gaps(tmp_path):
    uneven = [0, 4, 8, 12, 15, 22, 29, 36]
    assert "3 of 4.00 mm, 3 of 7.00 mm" in refusal(write_series(tmp_path / "ct", positions(uneven)))


def test_slices_in_one_place_are_refused(tmp_path):
    folder = write_series(tmp_path / "ct", positions([*heights(), *heights()]), array=np.tile(voxels(), 2))
    assert "6 of its 12 slices lie in the place of another" in refusal(folder)


def test_rounded_positions_are_no_fault(tmp_path):
    rounded = [round(1.25 * index, 1) for index in range(40)]
    folder = write_series(tmp_path / "ct", positions(rounded))
    assert read_grid(folder).spacing_mm[2] == pytest.approx(1.25, abs=0.01)


def test_a_series_without_geometry_or_with_mixed_slices_is_refused(tmp_path):
    assert "has no ImagePositionPatient, so" in refusal(write_series(tmp_path / "a", [None] * 6))
    assert "one slice" in refusal(write_series(tmp_path / "b", positions([0])))
    mixed = write_series(tmp_path / "c", positions(heights()))
    write_series(mixed, positions([20]), first_index=9, array=voxels()[:2, :2])
    assert "differ in size (2 x 2 in 00_1_9.dcm, 4 x 5 in 00_1_0.dcm)" in refusal(mixed)
    turned = write_series(tmp_path / "d", positions(heights()))
    write_series(turned, positions([20]), first_index=9, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    assert "2 orientations, as in a localiser (0, 1, 0, 0, 0, -1 in 00_1_9.dcm and 1, 0," in refusal(turned)
    stretched = write_series(tmp_path / "e", positions(heights()))
    write_series(stretched, positions([20]), first_index=9, PixelSpacing=[0.8, 0.9])
    assert "pixel spacing" in refusal(stretched)
    assert "(0, 0.7) mm" in refusal(write_series(tmp_path / "f", positions(heights()), PixelSpacing=[0, 0.7]))


def test_a_truncated_slice_is_refused_from_its_header(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    first = sorted(folder.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-10])
    assert "40 bytes of voxels, but the file holds 30" in refusal(folder)


@pytest.mark.parametrize(
    ("syntax", "name"), [("1.2.840.10008.1.2.4.201", "High-Throughput JPEG 2000"), ("1.2.3.4", "1.2.3.4")]
)
def test_pixels_that_no_decoder_knows_are_refused_by_their_header(tmp_path, syntax, name):
    folder = write_series(tmp_path / "ct", positions(heights()), packed="RLE")
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(path, implicit_vr=False, little_endian=True)
    assert f"its pixels are packed as {name}" in refusal(folder)


def test_an_undecodable_slice_is_refused(tmp_path):
    stored = np.random.default_rng(0).integers(-1000, 2000, (24, 16, 6)).astype(np.int16)
    folder = write_series(tmp_path / "ct", positions(heights()), array=stored, packed="JPEG2000")
    first = sorted(folder.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-600])
    with pytest.raises(DataError, match="cannot be decoded"):
        read_volume(folder)


# --- Finding


def test_a_tree_gives_one_entry_per_image_series(tmp_path):
    write_series(tmp_path / "a" / "ct", positions(heights()))
    write_series(tmp_path / "mixed", positions(heights()), series="2")
    write_series(tmp_path / "mixed", positions(heights()), series="3")
    (tmp_path / "mixed" / "notes.txt").write_text("hello " * 100)
    (tmp_path / "mixed" / "DICOMDIR").write_bytes(bytes(300))
    nib.save(nib.Nifti1Image(voxels(), np.eye(4)), tmp_path / "scan.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_scans(tmp_path)
    assert found[0] == str(tmp_path / "a" / "ct")
    assert found[3] == str(tmp_path / "scan.nii.gz")
    assert all(path.startswith(f"{tmp_path / 'mixed'}::") for path in found[1:3])
    assert len({scan_id(path) for path in found}) == 4
    for path in found[:3]:
        assert np.array_equal(read_volume(path).array, voxels()[::-1, ::-1])
    with pytest.raises(DataError, match="2 DICOM image series are in this folder"):
        read_grid(tmp_path / "mixed")


def test_files_without_suffix_in_folders_of_their_own_are_one_series(tmp_path):
    for index, place in enumerate(positions(heights())):
        write_series(tmp_path / f"disc/{index % 2}", [place], first_index=index, array=voxels()[:, :, [index]])
    for path in list(tmp_path.rglob("*.dcm")):
        path.rename(path.with_suffix(""))
    found = find_scans(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{tmp_path / 'disc'}::")
    assert np.array_equal(read_volume(found[0]).array, voxels()[::-1, ::-1])
    assert np.array_equal(read_volume(tmp_path).array, voxels()[::-1, ::-1])


def test_what_is_no_scan_is_left_out_with_a_line(tmp_path):
    scan = write_series(tmp_path / "ct", positions(heights()))
    write_series(tmp_path / "ct", positions([0]), series="2", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "mip", positions(heights()), series="3", ImageType=["DERIVED", "SECONDARY", "MIP"])
    write_series(tmp_path / "report", positions(heights()), series="4", SOPClassUID=SECONDARY_CAPTURE)
    write_series(tmp_path / "rt", [None], series="5", Modality="RTSTRUCT")
    write_series(tmp_path / "single", positions([0]), series="6")
    write_series(tmp_path / "planes", positions([0]), series="7")
    write_series(
        tmp_path / "planes", positions([0]), series="7", first_index=1, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]
    )
    with pytest.warns(UserWarning) as told:
        assert find_scans(tmp_path) == [str(scan)]
    lines = "\n".join(str(warning.message) for warning in told)
    for words in ("scout", "derived", "secondary capture", "RTSTRUCT", "has one slice", "2 orientations"):
        assert words in lines
    assert len(told) == 6
    assert read_grid(scan).shape == (5, 4, 6)


def test_a_series_that_cannot_be_stacked_is_found_and_refused_when_it_is_opened(tmp_path):
    scan = write_series(tmp_path / "ct", positions(heights()))
    uneven = write_series(tmp_path / "uneven", positions([0, 1, 5]), series="2")
    assert find_scans(tmp_path) == [str(scan), str(uneven)]
    assert "cannot be stacked" in refusal(uneven)


def test_a_scout_in_the_series_itself_is_no_slice(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    write_series(folder, positions([100]), first_index=9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with pytest.warns(UserWarning, match="1 of the 7 images of DICOM series .* left out, a scout"):
        assert find_scans(folder) == [str(folder)]
    assert read_grid(folder).shape == (5, 4, 6)


@pytest.mark.parametrize(
    ("modality", "kind"),
    [
        ("SR", "1.2.840.10008.5.1.4.1.1.88.67"),
        ("MR", "1.3.46.670589.11.0.0.12.2"),
        ("CT", "1.2.840.10008.5.1.4.1.1.66"),
    ],
)
def test_a_report_or_raw_data_in_the_series_itself_is_no_slice(tmp_path, modality, kind):
    folder = write_series(tmp_path, positions(heights()))
    other = header("1", 9, None, {"Modality": modality, "SOPClassUID": kind, "Rows": None, "Columns": None})
    other.save_as(folder / "report.dcm", enforce_file_format=True)
    with pytest.warns(
        UserWarning, match=rf"1 of the 7 images of DICOM series \w+ left out, an object without pixels \({modality}\)"
    ):
        assert find_scans(tmp_path) == [str(folder)]
    assert np.array_equal(read_volume(folder).array, voxels()[::-1, ::-1])


def test_a_derived_series_is_used_where_it_is_named_or_alone(tmp_path):
    write_series(tmp_path / "ct", positions(heights()))
    derived = write_series(
        tmp_path / "smooth", positions(heights()), series="2", ImageType=["DERIVED", "PRIMARY", "AXIAL"]
    )
    with pytest.warns(UserWarning, match="to use it") as told:
        find_scans(tmp_path)
    address = str(told[0].message).split("(name ")[1].split(" to use it")[0]
    assert np.array_equal(read_volume(address).array, voxels()[::-1, ::-1])
    assert find_scans(derived) == [str(derived)]


def test_a_copied_series_counts_once(tmp_path):
    first = write_series(tmp_path / "a", positions(heights()))
    shutil.copytree(first, tmp_path / "b")
    with pytest.warns(UserWarning, match="6 DICOM slices left out, copies of those in"):
        assert find_scans(tmp_path) == [str(first)]


@pytest.mark.parametrize("wrong", [{"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, {"Rows": 2}])
def test_a_header_that_claims_half_of_the_pixels_is_refused(tmp_path, wrong):
    fields = {"PixelRepresentation": 0, **wrong}
    assert "but its Rows, Columns, BitsAllocated and NumberOfFrames" in refusal(
        write_series(tmp_path / "ct", positions(heights()), **fields)
    )


def test_what_has_the_uids_of_another_series_but_other_pixels_is_no_copy(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    write_series(tmp_path / "smoothed", positions(heights()), array=voxels() // 2)
    with pytest.warns(UserWarning, match="smoothed: 6 DICOM slices left out: by their UIDs .* but their pixels differ"):
        assert find_scans(tmp_path) == [str(folder)]


# --- Damage


def damage(folder: Path, index: int, old: bytes, new: bytes) -> Path:
    """Replace bytes of one slice, in the order of file names."""
    path = sorted(folder.iterdir())[index]
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))
    return path


def test_a_broken_group_length_is_a_damaged_file_of_its_series(tmp_path):
    good = write_series(tmp_path / "good", positions(heights()))
    bad = write_series(tmp_path / "bad", positions(heights()), series="2")
    path = damage(bad, 3, b"\x02\0\0\0UL\4\0", b"\x02\0\0\0UL\1\0")
    assert find_scans(tmp_path) == [str(bad), str(good)]
    assert refusal(bad).startswith(f"{path}: this DICOM file cannot be read")
    assert read_volume(good).array.shape == (5, 4, 6)


def test_a_damaged_slice_is_told_from_the_other_series_in_its_folder(tmp_path):
    folder = write_series(tmp_path / "mixed", positions(heights()))
    (folder / "._02_1_5.dcm").write_bytes(b"what macOS leaves behind")
    write_series(folder, positions(heights()), series="2")
    # The last slice: without it the series would seem whole.
    path = folder / "02_2_5.dcm"
    path.write_bytes(path.read_bytes().replace(b"\x02\0\0\0UL\4\0", b"\x02\0\0\0UL\1\0"))
    opened = []
    for address in find_scans(folder):
        try:
            opened.append(read_volume(address).array.shape)
        except DataError as error:
            assert str(error).startswith(f"{path}: this DICOM file cannot be read")
    assert opened == [(5, 4, 6)]


@pytest.mark.parametrize("content", [b"", b"\0" * 128 + b"DICM" + b"\xff" * 200, b"DICM" * 100, b"a text"])
def test_a_file_that_may_be_a_slice_of_the_one_series_beside_it_is_not_passed_over(tmp_path, content):
    folder = write_series(tmp_path / "ct", positions(heights()))
    (folder / "broken.dcm").write_bytes(content)
    assert find_scans(tmp_path) == [str(folder)]
    assert "broken.dcm: this DICOM file cannot be read" in refusal(folder)


def test_a_damaged_file_among_several_series_is_a_scan_of_its_own(tmp_path):
    folder = write_series(tmp_path / "mixed", positions(heights()))
    write_series(folder, positions(heights()), series="2")
    (folder / "broken.dcm").write_bytes(b"")
    found = find_scans(tmp_path)
    reasons = []
    for address in found:
        try:
            read_volume(address)
        except DataError as error:
            reasons.append(str(error))
    assert len(found) == 3
    assert reasons == [f"{folder}/broken.dcm: the file is empty; copy it again from its source."]


def test_a_pipe_or_a_dead_link_with_a_dicom_name_is_told_and_not_opened(tmp_path):
    for name in ("pipe", "link"):
        folder = write_series(tmp_path / name, positions(heights()), series="1" if name == "pipe" else "2")
        if name == "pipe":
            os.mkfifo(folder / "x.dcm")
        else:
            (folder / "x.dcm").symlink_to(folder / "nothing")
    assert "x.dcm: this DICOM file cannot be read: it is no regular file" in refusal(tmp_path / "pipe")
    with pytest.raises(DataError, match="it is no regular file"):
        read_kind(str(tmp_path / "pipe" / "x.dcm"))
    assert "x.dcm: this DICOM file cannot be read: No such file" in refusal(tmp_path / "link")


HOSTILE = [
    ("ImagePositionPatient", ["nan", "0", "6"], "ImagePositionPatient is (nan, 0, 6)"),
    ("ImagePositionPatient", ["0", "0", "1e300"], "ImagePositionPatient is (0, 0, 1e+300)"),
    ("ImagePositionPatient", ["0", "0"], "ImagePositionPatient is (0, 0), where 3 plausible numbers"),
    ("ImagePositionPatient", "Doe", "ImagePositionPatient is no list of 3 numbers"),
    ("ImagePositionPatient", "", "has no ImagePositionPatient, so"),
    ("ImageOrientationPatient", ["1", "0", "inf", "0", "1", "0"], "ImageOrientationPatient is (1, 0, inf"),
    ("PixelSpacing", ["nan", "1"], "PixelSpacing is (nan, 1)"),
    ("ImageOrientationPatient", ["0"] * 6, "ImageOrientationPatient is (0, 0, 0, 0, 0, 0), no two perpendicular"),
    ("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"], "is (1, 0, 0, 1, 0, 0), no two perpendicular"),
    ("PixelSpacing", ["-0.8", "0.7"], "(-0.8, 0.7) mm"),
    ("PixelSpacing", ["1e-9", "0.7"], "(1e-09, 0.7) mm, which no scan has"),
    ("PixelSpacing", ["0,8", "0,7"], "PixelSpacing is '0,8\\0,7', no list of 2 numbers"),
    ("RescaleSlope", "nan", "RescaleSlope is (nan)"),
    ("RescaleSlope", "0", "RescaleSlope is 0"),
    ("RescaleSlope", "1e300", "RescaleSlope is (1e+300)"),
    ("RescaleIntercept", "inf", "RescaleIntercept is (inf)"),
    ("RescaleIntercept", "Doe", "RescaleIntercept is no number"),
    ("NumberOfFrames", "1000000", "claims 1000000 frames and describes 1"),
]


@pytest.mark.parametrize(("name", "value", "said"), HOSTILE)
def test_a_value_that_no_slice_can_have_is_refused_with_file_and_value(tmp_path, name, value, said):
    folder = write_series(tmp_path / "ct", positions(heights()))
    path = sorted(folder.iterdir())[2]
    with disable_value_validation():
        data = pydicom.dcmread(path)
        kind = data[name].VR if name in data else "IS"
        text = value if isinstance(value, str) else "\\".join(value)
        # As bytes, so that nothing looks at it.
        data[name] = RawDataElement(Tag(name), kind, len(text), text.encode(), 0, False, True)
        data.save_as(path)
    assert said in refusal(folder) and "Doe" not in refusal(folder)


@pytest.mark.parametrize("element", [b"\x28\0\x52\x10DS", b"\x28\0\x53\x10DS", b"\x28\0\x03\x01US"])
def test_a_slice_that_alone_lacks_what_changes_its_voxels_is_refused(tmp_path, element):
    folder = write_series(tmp_path / "ct", positions(heights()))
    path = damage(folder, 2, element, b"\x29" + element[1:])
    assert refusal(folder).startswith(f"{path}: the DICOM header has no ")


def test_a_slice_whose_modality_is_damaged_does_not_take_the_series_away_in_silence(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    path = damage(folder, 0, b"\x08\0\x60\0CS\2\0CT", b"\x08\0\x60\0CS\2\0SR")
    assert f"{path}: among the slices" in refusal(folder) and "this one is no scan (SR)" in refusal(folder)
    path = damage(folder, 0, b"\x08\0\x60\0CS\2\0SR", b"\x08\0\x60\0CS\2\0\xff*")
    assert refusal(folder).startswith(f"{path}: this DICOM file cannot be used: its Modality")


def test_a_deflated_series_is_read_and_a_bomb_of_zeros_refused(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        data.save_as(path)
    assert np.array_equal(read_volume(folder).array, voxels()[::-1, ::-1])
    raw = path.read_bytes()
    start = raw.index(b"1.2.840.10008.1.2.1.99") + 22
    packed = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = b"".join([*(packed.compress(bytes(2**24)) for _ in range(17)), packed.flush()])
    path.write_bytes(raw[:start] + bomb)
    assert refusal(folder).startswith(f"{path}: this DICOM file cannot be read")


def test_a_slice_that_left_its_series_is_told_from_a_scout(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    damage(folder, 0, b"\x20\0\x0e\0UI\x08\0" + b"1.2.3.1\0", b"\x20\0\x0e\0UI\x08\0" + b"1.2.3.7\0")
    lost = [address for address in find_scans(folder) if "one slice" in str(_error_of(address))]
    assert len(lost) == 1


def _error_of(address: str) -> DataError | None:
    try:
        read_grid(address)
    except DataError as error:
        return error
    return None


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder, closed, scandir = write_series(tmp_path / "ct", positions(heights())), tmp_path / "closed", os.scandir
    closed.mkdir()

    def guarded(path):
        if path == str(closed):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.warns(UserWarning, match="closed: this folder cannot be read"):
        assert find_scans(tmp_path) == [str(folder)]


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", (8 * 2**16).to_bytes(4, "little")])
def test_sequences_without_an_end_are_given_up(tmp_path, monkeypatch, length):
    monkeypatch.setattr(headers, "_HEADER_S", 0.1)
    folder = write_series(tmp_path / "ct", positions(heights()))
    path = sorted(folder.iterdir())[3]
    raw = path.read_bytes()
    pixels = raw.index(b"\xe0\x7f\x10\0")
    # Items of no known length in one another, in the sequence of the frames.
    nested = b"\0\x52\x30\x92SQ\0\0" + length + b"\xfe\xff\0\xe0\xff\xff\xff\xff" * 2**16
    path.write_bytes(raw[:pixels] + nested + raw[pixels:])
    start = time.thread_time()
    assert refusal(folder).startswith(f"{path}: this DICOM file cannot be read")
    assert time.thread_time() - start < 5


@pytest.mark.parametrize("num_bytes", [200, 470, 620])
def test_a_slice_that_ends_in_its_header_is_told(tmp_path, num_bytes):
    folder = write_series(tmp_path / "ct", positions(heights()))
    # The last slice in space: without it the series would seem whole.
    path = folder / "02_1_5.dcm"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert find_scans(tmp_path) == [str(folder)]
    assert refusal(folder).startswith(f"{path}: this DICOM file cannot be")


def test_an_empty_file_without_suffix_is_told_beside_slices_alone(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "LICENSE").touch()
    assert find_scans(tmp_path) == [str(folder)] and read_grid(folder).shape == (5, 4, 6)
    (folder / "IM7").touch()
    assert "IM7: this DICOM file cannot be read: it is empty" in refusal(folder)
    (folder / "IM7").unlink()
    (folder / "IM7").symlink_to(folder / "nothing")
    assert "IM7: this DICOM file cannot be read: No such file" in refusal(folder)


@pytest.mark.parametrize("ending", ["", ".{}", ".dcm", "-{:032x}"])
@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 128, b"\0" * 2000, b"damaged bytes" * 100])
def test_what_is_left_of_a_slice_is_told_by_its_name(tmp_path, ending, content):
    folder = write_series(tmp_path / "ct", positions(heights()))
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"MR{number:04d}{ending.format(7**40 * (number + 1) % 2**128)}")
    # The last slice in space: without it the series would seem whole.
    last = max(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    last.write_bytes(content)
    assert find_scans(tmp_path) == [str(folder)]
    assert refusal(folder).startswith(f"{last}: this DICOM file cannot be read")


@pytest.mark.parametrize("name", ["LOCKFILE", "README", "notes.txt", "Thumbs.db", "pipe"])
def test_files_that_are_named_like_no_slice_are_none(tmp_path, name):
    folder = write_series(tmp_path / "ct", positions(heights()))
    if name == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).touch()
    assert find_scans(tmp_path) == [str(folder)] and read_grid(folder).shape == (5, 4, 6)


def test_a_damaged_file_among_several_series_belongs_to_the_one_that_it_is_named_like(tmp_path):
    folder = write_series(tmp_path / "mixed", positions(heights()))
    for path in list(folder.iterdir()):
        path.rename(folder / f"s{path.name}")
    write_series(folder, positions(heights()), series="2")
    (folder / "02_2_5.dcm").write_bytes(b"")
    reasons = [_error_of(address) for address in find_scans(folder)]
    assert [str(each).partition(":")[0] for each in reasons if each] == [f"{folder}/02_2_5.dcm"] and len(reasons) == 2


def test_slices_that_begin_with_their_second_element_are_read(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()))
    for number, path in enumerate(sorted(folder.iterdir())):
        raw = path.read_bytes()
        path.unlink()
        (folder / f"IM{number}").write_bytes(raw[raw.index(b"\x02\0\x02\0UI") :])
    assert np.array_equal(read_volume(folder).array, voxels()[::-1, ::-1])


@pytest.mark.parametrize("packed", ["", "JPEG"])
@pytest.mark.parametrize(("is_signed", "bits"), [(1, 16), (0, 16), (0, 12)])
def test_values_stored_for_black_on_white_are_not_inverted(tmp_path, is_signed, bits, packed):
    stored = voxels() + 50
    fields = {"PixelRepresentation": is_signed, "BitsStored": bits, "HighBit": bits - 1, "RescaleIntercept": -1024}
    folder = write_series(
        tmp_path, positions(heights()), array=stored, packed=packed, PhotometricInterpretation="MONOCHROME1", **fields
    )
    assert np.array_equal(read_volume(folder).array, stored[::-1, ::-1] - 1024)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a colour image \\(PALETTE COLOR\\)"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "a mosaic"),
    ],
)
def test_pixels_that_are_no_slice_are_left_out(tmp_path, fields, said):
    write_series(tmp_path, positions(heights()), **fields)
    with pytest.warns(UserWarning, match=said):
        assert find_scans(tmp_path) == []


def test_a_ct_without_rescaling_says_what_is_assumed(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()), RescaleSlope=None, RescaleIntercept=None)
    with pytest.warns(UserWarning, match="stored values count as HU"):
        assert read_grid(folder).assumed
    assert not read_grid(write_series(tmp_path / "mr", positions(heights()), Modality="MR", RescaleSlope=None)).assumed


@pytest.mark.parametrize("modality", ["ct", ""])
def test_a_modality_in_small_letters_or_left_to_the_class_is_known(tmp_path, modality):
    with disable_value_validation():
        folder = write_series(tmp_path / "ct", positions(heights()), Modality=modality)
    assert modality_of(folder) == "CT"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"Manufacturer": "SIEMENS ", "ManufacturerModelName": "Avanto", "MagneticFieldStrength": 1.494}, "1.5 T"),
        ({"Manufacturer": "GE", "ManufacturerModelName": "None", "MagneticFieldStrength": 30000}, "GE"),
        ({"ManufacturerModelName": "a\x1b[31m" + "b" * 60, "Manufacturer": "c" * 60}, None),
        ({"Manufacturer": "", "ManufacturerModelName": " unknown"}, None),
        ({}, None),
    ],
)
def test_the_scanner_is_told_where_the_header_says_it(tmp_path, fields, said):
    with disable_value_validation():
        found = scanner_of(write_series(tmp_path / "mr", positions(heights()), Modality="MR", **fields))
    if said == "1.5 T":
        said = "SIEMENS Avanto, 1.5 T"
    if "c" * 60 in fields.values():
        assert len(found) <= 80 and found.isprintable()
    else:
        assert found == said


def test_a_cache_keeps_the_scanner_of_a_series_and_nothing_of_the_patient(tmp_path):
    write_series(tmp_path / "data" / "a", positions(heights()), Manufacturer="SIEMENS", PatientName="Doe^Jane")
    write_series(tmp_path / "data" / "b", positions(heights()), series="2")
    cache(str(tmp_path / "data"), str(tmp_path / "cache"))
    scans = open_cache(tmp_path / "cache")
    assert sorted(map(str, (scan.scanner for scan in scans))) == ["None", "SIEMENS"]
    assert cohort_of(scans)["scanners"] == {"SIEMENS": 1}
    kept = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(b"Doe" in content or b"Jane" in content for content in kept)


def test_a_rescaling_by_a_table_is_refused(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [2, 0, 16], "HU", b"\0\0\1\0"
    fields = {"ModalityLUTSequence": [table], "RescaleSlope": None, "RescaleIntercept": None}
    assert "rescaled by a table" in refusal(write_series(tmp_path / "ct", positions(heights()), **fields))


def test_two_stacks_in_one_series_lack_no_slices(tmp_path):
    folder = write_series(tmp_path / "ct", positions([*heights(), *(200 + place for place in heights())]))
    assert "unevenly spaced" in refusal(folder) and "missing" not in refusal(folder)


def test_a_patient_whose_name_cannot_be_decoded_is_one_all_the_same(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()), PatientID="")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"Doe^Jane", b"D\xff\x1b^J\xfe\0e"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(patient_of(folder) or "") == 16


def test_a_header_that_claims_more_than_its_compressed_bytes_can_hold_is_refused(tmp_path):
    stored = np.zeros((24, 16, 6), np.int16)
    folder = write_series(tmp_path / "ct", positions(heights()), array=stored, packed="RLE", Rows=65535, Columns=65535)
    assert "compressed bytes cannot hold" in refusal(folder)
    folder = write_series(tmp_path / "raw", positions(heights()), Rows=65535, Columns=65535)
    assert "bytes of voxels, but the file holds" in refusal(folder)


def test_a_decoder_that_crashes_is_one_error_and_the_next_slice_is_read(tmp_path):
    stored = np.random.default_rng(0).integers(-1000, 2000, (24, 16, 6)).astype(np.int16)
    good = write_series(tmp_path / "good", positions(heights()), array=stored, packed="JPEG")
    bad = write_series(tmp_path / "bad", positions(heights()), array=stored, packed="JPEG", series="2")
    # A frame of 255 bits per value, at which the decoder of JPEG breaks off the process.
    damage(bad, 1, b"\xff\xc3\0\x0b\x10", b"\xff\xc3\0\x0b\xff")
    with pytest.raises(DataError, match=r"cannot be decoded \(SimpleITK ended with SIG"):
        read_volume(bad)
    assert np.array_equal(read_volume(good).array, stored[::-1, ::-1])


def spoil(raw: bytes, random: np.random.Generator) -> bytes:
    """Damage a file as disks, networks and strangers do."""
    spoilt, way = bytearray(raw), int(random.integers(5))
    pixels = raw.find(b"\xe0\x7f\x10\0")
    place = int(random.integers(0, pixels))
    if way == 0:
        for at in random.integers(0, pixels, int(random.integers(1, 9))):
            spoilt[at] = int(random.integers(256))
    elif way == 1:
        del spoilt[int(random.integers(len(raw))) :]
    elif way == 2:
        spoilt[place : place + 4] = int(random.choice([0, 1, 65535, 2**31, 2**32 - 1])).to_bytes(4, "little")
    elif way == 3:
        del spoilt[place : place + int(random.integers(1, 64))]
    else:
        item = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
        spoilt[140:140] = item * int(random.choice([1, 50, 3000]))
    return bytes(spoilt)


@pytest.mark.parametrize("kind", ["native", "JPEG", "frames"])
def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path, kind):
    random = np.random.default_rng(13)
    stored = random.integers(-1000, 2000, (24, 16, 6)).astype(np.int16)
    good = write_series(tmp_path / "good", positions(heights()), array=stored, series="2")
    if kind == "frames":
        bad = write_frames(tmp_path / "bad", [2] * 6)
    else:
        bad = write_series(
            tmp_path / "bad", positions(heights()), packed="" if kind == "native" else kind, array=stored
        )
    for _ in range(30):
        path = sorted(bad.iterdir())[int(random.integers(len(list(bad.iterdir()))))]
        raw = path.read_bytes()
        path.write_bytes(spoil(raw, random))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = find_scans(tmp_path)
            refused = []
            for address in found:
                try:
                    read_volume(address)
                except DataError as error:
                    refused.append(str(error))
        said = "\n".join([*refused, *(str(warning.message) for warning in told)])
        assert str(good) in found and str(good) not in said
        # Whatever is not read is told of, in one line each and without the patient.
        assert str(bad) in said or any(address.startswith(str(bad)) for address in found)
        assert not any(word in said for word in ("4711", "Doe", "Jane", "19700101"))
        assert all("\n" not in line for line in refused)
        path.write_bytes(raw)


@pytest.mark.parametrize(("implicit", "suffix"), [(True, ""), (True, ".dcm"), (False, "")])
def test_files_without_the_mark_of_dicom_are_read(tmp_path, implicit, suffix):
    folder = write_series(tmp_path / "ct", positions(heights()))
    (tmp_path / "bare").mkdir()
    for path in folder.iterdir():
        data = Dataset(pydicom.dcmread(path))
        target = tmp_path / "bare" / (path.stem + suffix)
        pydicom.dcmwrite(target, data, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert target.read_bytes()[128:132] != b"DICM"
    assert find_scans(tmp_path / "bare") == [str(tmp_path / "bare")]
    assert np.array_equal(read_volume(tmp_path / "bare").array, voxels()[::-1, ::-1])


def test_slices_that_share_a_uid_but_no_place_are_no_copies(tmp_path):
    folder = write_series(tmp_path / "ct", positions(heights()), SOPInstanceUID="1.2.3.1.1")
    assert np.array_equal(read_volume(folder).array, voxels()[::-1, ::-1])


# --- Patients


def test_the_patient_is_a_hash_that_is_the_same_for_all_their_series(tmp_path):
    first = write_series(tmp_path / "a", positions(heights()))
    second = write_series(tmp_path / "b", positions(heights()), series="2")
    other = write_series(tmp_path / "c", positions(heights()), series="3", PatientID="4712")
    unnamed = write_series(tmp_path / "d", positions(heights()), series="4", PatientID="")
    nobody = write_series(
        tmp_path / "e", positions(heights()), series="5", PatientID="", PatientName="", PatientBirthDate=""
    )
    keys = [patient_of(folder) for folder in (first, second, other, unnamed, nobody)]
    assert keys[0] == keys[1] and len(set(keys[:4])) == 3 and keys[4] is None
    for key in keys[:4]:
        assert len(key) == 16 and not any(word in key for word in ("4711", "Doe", "1970"))


def test_messages_and_warnings_never_name_the_patient(tmp_path):
    folder = write_series(tmp_path / "ct", positions([0, 1, 5]))
    write_series(tmp_path / "ct", positions([0]), series="2", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (folder / "broken.dcm").write_bytes(next(folder.iterdir()).read_bytes()[:600])
    with pytest.warns(UserWarning) as told:
        assert find_scans(tmp_path) == [str(folder)]
    with pytest.raises(DataError) as caught:
        read_grid(folder)
    lines = "\n".join([str(caught.value), *(str(warning.message) for warning in told)])
    assert not any(word in lines for word in ("4711", "Doe", "Jane", "19700101", "1.2.3"))


# --- Real series


@pytest.mark.parametrize(("name", "num_slices"), [("cip_ct64", 79), ("sts002_ct_rtstruct/image", 48)])
def test_real_series_agree_with_simple_itk(shared_data, name, num_slices):
    folder = shared_data / "dicom" / name
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    stored = sitk.GetArrayFromImage(image).T
    volume = read_volume(folder)
    assert volume.grid.shape == stored.shape and stored.shape[2] == num_slices
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.grid.from_ras(volume.array), stored)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    for index in [(0, 0, 0), tuple(size - 1 for size in stored.shape), tuple(size // 3 for size in stored.shape)]:
        point_mm = np.array(image.TransformIndexToPhysicalPoint([int(i) for i in index])) * (-1, -1, 1)
        found = np.linalg.solve(volume.affine, [*point_mm, 1])[:3]
        assert np.allclose(found, np.rint(found), atol=0.01)
        assert volume.array[tuple(np.rint(found).astype(int))] == stored[index]


def test_a_series_agrees_with_the_same_scan_in_nrrd(shared_data):
    series = read_volume(shared_data / "dicom" / "cip_ct64")
    scan = read_volume(shared_data / "formats" / "cip" / "ct-64.nrrd")
    assert np.array_equal(series.array, scan.array)
    assert np.allclose(series.affine, scan.affine, atol=1e-3)


def test_the_real_tree_gives_its_two_upright_series_and_tells_of_the_rest(shared_data):
    root = shared_data / "dicom"
    with pytest.warns(UserWarning) as told:
        found = [path for path in find_scans(root) if not path.endswith(".nrrd")]
    assert found == [str(root / "cip_ct64"), str(root / "ge_tilt_head"), str(root / "sts002_ct_rtstruct" / "image")]
    assert "RTSTRUCT" in "\n".join(str(warning.message) for warning in told)
    assert read_grid(root / "sts002_ct_rtstruct").shape == (161, 143, 48)


def test_the_real_tilted_head_is_refused_with_tilt_and_gaps(shared_data):
    sentence = refusal(shared_data / "dicom" / "ge_tilt_head")
    assert "tilted by 18.5 degrees" in sentence and "13 of 7.00 mm" in sentence
    with pytest.raises(DataError, match=r"18\.5 degrees"):
        read_volume(shared_data / "dicom" / "ge_tilt_head")
