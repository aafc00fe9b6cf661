"""DICOM headers: what mim3d needs of each slice or frame, without the pixels and without the patient."""

import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.misc import is_dicom
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from mim3d.core.errors import DataError

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality", "ImageType",
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames", "GantryDetectorTilt",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate",
)  # fmt: skip

#: Files with these suffixes are taken for DICOM though they lack the mark of a DICOM file (old exports).
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")

#: What pydicom raises at bytes that are no sound header.
_DAMAGE = (
    InvalidDicomError, OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    NotImplementedError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The header of one slice, or of one frame of a multi-frame file, without patient data.

    Attributes:
        path: File of the slice.
        frame: Number of the frame in a multi-frame file, from 0; None for a file of one slice.
        series_uid: Series instance UID.
        study_uid: Study instance UID; empty where the header has none.
        slice_uid: SOP instance UID.
        modality: Modality, such as CT.
        secondary_capture: Whether the object is a secondary capture.
        image_type: Values of the image type in upper case.
        rows: Number of rows.
        columns: Number of columns.
        num_values: Values per pixel; 3 for colours.
        itemsize: Bytes per value once unpacked, at least 2.
        pixel_offset: Byte of the file where the pixels start.
        native_bytes: Size of the pixels of the whole file; None where they are compressed.
        position: Centre of the first pixel in LPS millimetres, or None.
        orientation: Unit vectors along a row and down a column in LPS, or None.
        pixel_spacing: Distance between rows and between columns in millimetres, or None.
        tilt_degrees: Tilt of the gantry.
        slope: Factor of the rescaling.
        intercept: Offset of the rescaling, added after the factor.
    """

    path: str
    frame: int | None
    series_uid: str
    study_uid: str
    slice_uid: str
    modality: str
    secondary_capture: bool
    image_type: tuple[str, ...]
    rows: int
    columns: int
    num_values: int
    itemsize: int
    pixel_offset: int
    native_bytes: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    tilt_degrees: float
    slope: float
    intercept: float


def read_header(path: str) -> tuple[Any, int]:
    """The elements of a DICOM file that mim3d looks at, and the byte where its pixels start.

    Raises:
        DataError: The file is no DICOM file, or damaged.
    """
    try:
        with open(path, "rb") as stream:
            header = pydicom.dcmread(
                stream, stop_before_pixels=True, specific_tags=list(_TAGS), force=_is_old_export(path)
            )
            # Tag, type and length stand before the pixels; implicit syntaxes leave the type out.
            implicit = header.file_meta.get("TransferSyntaxUID") in (None, ImplicitVRLittleEndian)
            return header, stream.tell() + (8 if implicit else 12)
    except _DAMAGE as error:
        # The text of the error is left out: it may quote the patient's name.
        raise DataError(f"{path}: the DICOM header cannot be read; copy the file again.") from error


def read_slices(path: str) -> tuple[Slice, ...]:
    """The slices of a file: one, or one per frame; none for a file that is not DICOM or names no series."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return _read_slices(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=32768)
def _read_slices(path: str, _modified_ns: int, size_bytes: int) -> tuple[Slice, ...]:
    if size_bytes < 132 or not (_is_old_export(path) or _has_mark(path)):
        return ()
    try:
        header, pixel_offset = read_header(path)
        if not header.get("SeriesInstanceUID") or not header.get("SOPInstanceUID"):
            if header.file_meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
                warnings.warn(f"{path}: left out, its DICOM header names no series; it may be damaged.", stacklevel=5)
            return ()
        frames = header.get("PerFrameFunctionalGroupsSequence")
        if not frames:
            return (_slice(path, header, None, [], pixel_offset),)
        shared = list(header.get("SharedFunctionalGroupsSequence") or [])
        return tuple(_slice(path, header, index, [frame, *shared], pixel_offset) for index, frame in enumerate(frames))
    except (DataError, *_DAMAGE):
        warnings.warn(f"{path}: left out, its DICOM header is damaged.", stacklevel=5)
        return ()


def _has_mark(path: str) -> bool:
    try:
        return is_dicom(path)
    except OSError:
        return False


def _is_old_export(path: str) -> bool:
    return path.lower().endswith(_DICOM_SUFFIXES)


def _slice(path: str, header: Any, frame: int | None, groups: Sequence[Any], pixel_offset: int) -> Slice:
    # A multi-frame file keeps geometry and rescaling in the one-item sequences of its functional groups.
    places = [element.value[0] for group in groups for element in group if element.VR == "SQ" and element.value]
    places.append(header)

    def first(name: str) -> Any:
        values = (place.get(name) for place in places)
        return next((value for value in values if value is not None and value != ""), None)

    def floats(name: str, count: int) -> tuple[float, ...] | None:
        value = first(name)
        if value is None or isinstance(value, str | float) or len(value) != count:
            return None
        return tuple(float(number) for number in value)

    def number(name: str, default: float) -> float:
        value = first(name)
        return default if value is None else float(value)

    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    num_values, bits = int(header.get("SamplesPerPixel") or 1), int(header.get("BitsAllocated") or 16)
    num_frames = int(header.get("NumberOfFrames") or 1)
    syntax = header.file_meta.get("TransferSyntaxUID")
    native = syntax in (None, ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
    kinds = header.get("ImageType") or ()
    return Slice(
        path=path,
        frame=frame,
        series_uid=str(header.SeriesInstanceUID),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        slice_uid=str(header.SOPInstanceUID),
        modality=str(header.get("Modality") or ""),
        secondary_capture=str(header.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE),
        image_type=tuple(str(kind).upper() for kind in ([kinds] if isinstance(kinds, str) else kinds)),
        rows=rows,
        columns=columns,
        num_values=num_values,
        itemsize=max(2, bits // 8),
        pixel_offset=pixel_offset,
        native_bytes=rows * columns * num_values * num_frames * bits // 8 if native else None,
        position=floats("ImagePositionPatient", 3),
        orientation=floats("ImageOrientationPatient", 6),
        pixel_spacing=floats("PixelSpacing", 2),
        tilt_degrees=number("GantryDetectorTilt", 0.0),
        slope=number("RescaleSlope", 1.0),
        intercept=number("RescaleIntercept", 0.0),
    )
