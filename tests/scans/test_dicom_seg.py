"""DICOM-SEG: voxels, geometry and references read back by other software; patients named in the file alone."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.config import disable_value_validation
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.published.presets import published_presets
from mim3d.scans.dicom import terminology
from mim3d.scans.dicom.segmentation import require_highdicom, require_source, write_dicom_seg
from mim3d.scans.dicom.terminology import meaning_of
from mim3d.scans.volumes import read_grid, read_volume

highdicom = pytest.importorskip("highdicom")

NAMES = {0: "background", 2: "liver", 5: "liver tumour", 9: "spleen"}
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
#: Rows run along the patient's height, columns to the back: slices from side to side.
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (float(np.cos(0.3)), float(np.sin(0.3)), 0.0, -float(np.sin(0.3)), float(np.cos(0.3)), 0.0)


def write_series(folder: Path, orientation=AXIAL, num_slices: int = 6, **changes: object) -> Path:
    """A CT series of 5 columns and 4 rows; files are named against the order of the slices."""
    folder.mkdir(parents=True)
    normal = np.cross(orientation[:3], orientation[3:])
    for index in range(num_slices):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{index + 1}"
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.3.4", "1.2.3", "1.2.3.9"
        data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "4711", "Doe", "19700101", "F"
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20200102", "101112", "1", "A1"
        data.ReferringPhysicianName = "Roe^Richard"
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 4, 5, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.PixelSpacing, data.SliceThickness = [0.8, 0.7], 2.5
        data.ImageOrientationPatient = [round(value, 8) for value in orientation]
        data.ImagePositionPatient = [round(float(value), 6) for value in np.array([-10, 20, 30]) + 2.5 * index * normal]
        data.RescaleSlope, data.RescaleIntercept, data.InstanceNumber = 1, 0, index + 1
        for name, value in changes.items():
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)
        data.PixelData = np.full((4, 5), index, dtype=np.int16).tobytes()
        data.save_as(folder / f"{num_slices - index:03}.dcm", enforce_file_format=True)
    return folder


def label_map(shape, values=(0, 2, 5)) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array(values, dtype=np.uint8), shape)


def sources_of(folder: Path) -> list[pydicom.Dataset]:
    """Headers by their place along the normal."""
    found = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.glob("*.dcm"))]
    return sorted(found, key=lambda data: int(data.SOPInstanceUID.rpartition(".")[2]))


def read_back(path: Path, sources: list[pydicom.Dataset]) -> np.ndarray:
    """(slice, row, column) segment numbers of the slices of the source, found by their SOP instances."""
    segmentation = highdicom.seg.segread(path)
    return segmentation.get_pixels_by_source_instance(
        [data.SOPInstanceUID for data in sources], combine_segments=True, assert_missing_frames_are_empty=True
    )


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
def test_voxels_come_back_on_the_slices_they_were_found_on(tmp_path, orientation):
    series = write_series(tmp_path / "ct", orientation)
    scan = read_volume(series)
    labels = label_map(scan.array.shape)
    # One whole slice without a label: its frames are left out and read as background.
    labels[scan.array == 2] = 0
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    sources = sources_of(series)
    numbers = read_back(tmp_path / "seg.dcm", sources)
    # The scan holds the number of each slice, so the value of a voxel tells which slice it must lie on.
    stored = scan.grid.from_ras(labels)
    image = scan.grid.from_ras(scan.array)
    for index in range(len(sources)):
        place = int(np.flatnonzero(image[0, 0] == index)[0])
        assert np.array_equal(np.array([0, 2, 5, 9])[numbers[index]], stored[..., place].T)


def test_frames_have_the_geometry_of_the_source(tmp_path):
    series = write_series(tmp_path / "ct", OBLIQUE)
    labels = label_map(read_grid(series).ras_shape)
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    source = sources_of(series)[0]
    shared = written.SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].PixelSpacing == source.PixelSpacing
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == source.ImageOrientationPatient
    places = {tuple(data.ImagePositionPatient) for data in sources_of(series)}
    frames = [tuple(f.PlanePositionSequence[0].ImagePositionPatient) for f in written.PerFrameFunctionalGroupsSequence]
    assert set(frames) == places
    assert written.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert written.StudyInstanceUID == source.StudyInstanceUID
    assert written.SeriesInstanceUID != source.SeriesInstanceUID and written.Modality == "SEG"
    referred = written.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    assert len(referred.ReferencedInstanceSequence) == 6


def test_every_declared_label_is_a_segment_with_its_name(tmp_path):
    series = write_series(tmp_path / "ct")
    labels = label_map(read_grid(series).ras_shape)
    long = {**NAMES, 11: "x" * 80}
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), long, algorithm="mim3d abc")
    segments = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    assert [s.SegmentLabel for s in segments] == ["liver", "liver tumour", "spleen", "x" * 64]
    assert [s.SegmentNumber for s in segments] == [1, 2, 3, 4]
    kinds = [s.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for s in segments]
    assert kinds[:3] == ["Anatomical Structure", "Morphologically Abnormal Structure", "Anatomical Structure"]
    assert all(s.SegmentAlgorithmType == "AUTOMATIC" and s.SegmentAlgorithmName == "mim3d abc" for s in segments)


def segments_of(tmp_path: Path, *names: str) -> list[pydicom.Dataset]:
    """Segments of a file with such labels, read back by highdicom."""
    series = write_series(tmp_path / "ct")
    labels = np.ones(read_grid(series).ras_shape, dtype=np.uint8)
    known = dict(enumerate(["background", *names]))
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), known, algorithm="mim3d abc")
    segmentation = highdicom.seg.segread(tmp_path / "seg.dcm")
    return [segmentation.get_segment_description(number) for number in range(1, len(names) + 1)]


def test_known_organs_have_codes_sides_and_colours(tmp_path):
    liver, kidney, gland, ventricle = segments_of(
        tmp_path, "liver", "kidney_left", "Right adrenal gland", "Left ventricle"
    )
    assert liver.segmented_property_type == codes.SCT.Liver and kidney.segmented_property_type == codes.SCT.Kidney
    assert liver.segmented_property_category == codes.SCT.AnatomicalStructure
    sides = [
        segment.SegmentedPropertyTypeCodeSequence[0].get("SegmentedPropertyTypeModifierCodeSequence")
        for segment in (liver, kidney, gland, ventricle)
    ]
    assert sides[0] is None and sides[3] is None, "the left ventricle is no ventricle that lies left"
    assert sides[1][0].CodeValue == codes.SCT.Left.value and sides[2][0].CodeValue == codes.SCT.Right.value
    colours = {tuple(segment.RecommendedDisplayCIELabValue) for segment in (liver, kidney, gland, ventricle)}
    assert len(colours) == 4


def test_altered_tissue_has_its_morphology_and_the_organ_it_lies_in(tmp_path):
    tumour, oedema, metastases = segments_of(tmp_path, "Left kidney tumor", "oedema", "liver metastases")
    assert tumour.segmented_property_type == codes.SCT.Neoplasm and oedema.segmented_property_type == codes.SCT.Edema
    assert metastases.segmented_property_type == codes.SCT.NeoplasmMetastatic
    assert all(
        each.segmented_property_category == codes.SCT.MorphologicallyAbnormalStructure for each in (tumour, oedema)
    )
    assert tumour.anatomic_regions == [codes.SCT.Kidney] and metastases.anatomic_regions == [codes.SCT.Liver]
    assert tumour.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeValue == codes.SCT.Left.value


def test_unknown_labels_keep_a_code_of_their_own_with_their_name(tmp_path):
    first, second = segments_of(tmp_path, "prostate or uterus", "my thing")
    assert first.segmented_property_type.scheme_designator == "99MIM3D"
    assert second.segmented_property_type.meaning == "my thing" == second.segment_label
    assert tuple(first.RecommendedDisplayCIELabValue) != tuple(second.RecommendedDisplayCIELabValue)


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("gall bladder", "Gallbladder"), ("Esophagus", "Esophagus"), ("postcava", "InferiorVenaCava"), ("Lungs", "Lung"),
     ("kidney_R", "Kidney"), ("RightKidney", "Kidney"), ("myocardium of the left ventricle", "LeftVentricleMyocardium"),
     ("portal vein and splenic vein", "BloodVessel"), ("portal and splenic veins", "BloodVessel"),
     ("Vessel", "BloodVessel"), ("heart_ventricle_left", "LeftVentricle"), ("lymph node", None),
     ("liver lobe", None), ("lung vessels", None)],
)  # fmt: skip
def test_names_are_found_however_they_are_spelt(name, keyword):
    assert meaning_of(name).keyword == keyword


def test_published_organs_and_every_keyword_have_a_code():
    uncoded = {
        name
        for preset in published_presets().values()
        for value, name in (preset.labels or {}).items()
        if value and meaning_of(name).keyword is None
    }
    assert uncoded <= {"prostate or uterus"}
    found = [meaning_of(name) for name in (*terminology._ANATOMY, *terminology._VARIANTS)]
    assert all(hasattr(codes.SCT, meaning.keyword) for meaning in found)


def test_the_series_says_what_is_segmented(tmp_path):
    segments_of(tmp_path, "liver", "spleen", *[f"structure number {index}" for index in range(9)])
    text = pydicom.dcmread(tmp_path / "seg.dcm").SeriesDescription
    assert text == "mim3d segmentation: liver, spleen, structure number 0, ..." and len(text) <= 64


def test_a_map_without_any_label_is_written_too(tmp_path):
    series = write_series(tmp_path / "ct")
    labels = np.zeros(read_grid(series).ras_shape, dtype=np.uint8)
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    assert not read_back(tmp_path / "seg.dcm", sources_of(series)).any()


def test_the_patient_is_named_in_the_file_and_nowhere_else(tmp_path, capfd, caplog):
    series = write_series(tmp_path / "ct")
    labels = label_map(read_grid(series).ras_shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (written.PatientID, str(written.PatientName)) == ("4711", "Doe")
    said = "".join([*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in caught)])
    assert "Doe" not in said and "4711" not in said


def test_headers_that_lack_what_the_file_needs_are_refused_without_naming_the_patient(tmp_path):
    series = write_series(tmp_path / "ct", FrameOfReferenceUID=None)
    labels = np.zeros(read_grid(series).ras_shape, dtype=np.uint8)
    with pytest.raises(DataError, match=r"ct: .*FrameOfReferenceUID is missing.*--format nii.gz") as refused:
        write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    assert "Doe" not in str(refused.value) and refused.value.__cause__ is None
    assert not (tmp_path / "seg.dcm").exists()


def test_elements_that_anonymising_took_away_are_left_empty(tmp_path):
    gone = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "SliceThickness")
    series = write_series(tmp_path / "ct", **dict.fromkeys(gone))
    labels = label_map(read_grid(series).ras_shape)
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not written.PatientID and not written.StudyDate
    assert written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 2.5


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("StudyDate", "yesterday"), ("StudyTime", "9999"), ("PatientBirthDate", "1970"), ("PatientSex", "Q")],
)
def test_what_a_header_holds_wrongly_and_may_lack_is_left_empty(tmp_path, keyword, value):
    with disable_value_validation():
        series = write_series(tmp_path / "ct", **{keyword: value})
        with pytest.warns(UserWarning, match=f"no proper {keyword}, so") as said:
            write_dicom_seg(
                tmp_path / "seg.dcm", label_map(read_grid(series).ras_shape), str(series), NAMES, algorithm="a"
            )
    assert not any(value in str(each.message) for each in said)
    assert not pydicom.dcmread(tmp_path / "seg.dcm")[keyword].value


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 6", "Doe"),
        ("KLINGON", "Doe"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 192", "Müller"),
    ],
)
def test_names_in_any_character_set_come_through(tmp_path, character_set, name):
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        series = write_series(tmp_path / "ct", SpecificCharacterSet=character_set, PatientName=name)
    write_dicom_seg(tmp_path / "seg.dcm", label_map(read_grid(series).ras_shape), str(series), NAMES, algorithm="a")
    assert str(pydicom.dcmread(tmp_path / "seg.dcm").PatientName) == name


@pytest.mark.parametrize(
    ("name", "label"),
    [("肝臓", "肝臓"), ("läsion", "läsion"), ("left\\right", "left/right"), (" ", "label 1"), ("a\nb", "a/nb")],
)
def test_labels_of_any_name_come_through(tmp_path, name, label):
    series = write_series(
        tmp_path / "ct", SpecificCharacterSet="ISO_IR 100", PatientName="Müller", ReferringPhysicianName="Bär"
    )
    shape = read_grid(series).ras_shape
    write_dicom_seg(tmp_path / "seg.dcm", label_map(shape, (0, 2)), str(series), {2: name}, algorithm="a")
    found = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == [label]
    assert str(found.PatientName) == "Müller" and str(found.ReferringPhysicianName) == "Bär"


def test_slices_of_several_frames_of_reference_are_refused_for_what_they_are(tmp_path):
    series = write_series(tmp_path / "ct")
    path = next(iter(sorted(series.iterdir())))
    data = pydicom.dcmread(path)
    data.FrameOfReferenceUID = "1.2.3.99"
    data.save_as(path)
    with pytest.raises(DataError, match="slices differ in FrameOfReferenceUID"):
        require_source(str(series))


def test_a_map_of_another_grid_is_refused(tmp_path):
    series = write_series(tmp_path / "ct")
    with pytest.raises(DataError, match="does not fit the grid"):
        write_dicom_seg(tmp_path / "seg.dcm", np.zeros((2, 3, 4), np.uint8), str(series), NAMES, algorithm="a")


def test_without_highdicom_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'mim3d\[dicom\]'"):
        require_highdicom()


def test_a_real_series_is_written_and_read_back(shared_data, tmp_path):
    series = shared_data / "dicom" / "cip_ct64"
    scan = read_volume(series)
    labels = np.select([scan.array < -500, scan.array > 200], [2, 5]).astype(np.uint8)
    write_dicom_seg(tmp_path / "seg.dcm", labels, str(series), NAMES, algorithm="mim3d abc")
    segmentation = highdicom.seg.segread(tmp_path / "seg.dcm")
    volume = segmentation.get_volume(combine_segments=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    places = np.argwhere(volume.array == 2)
    world = places @ affine[:3, :3].T + affine[:3, 3]
    inverse = np.linalg.inv(scan.affine)
    found = np.rint(world @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    assert len(found) == (labels == 5).sum() > 1000
    assert (labels[tuple(found.T)] == 5).all()
