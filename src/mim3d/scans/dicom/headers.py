"""DICOM headers: what mim3d needs of each slice or frame, without the pixels and without the patient."""

import errno
import io
import math
import operator
import os
import re
import stat
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal, cast

import pydicom
from pydicom.charset import default_encoding
from pydicom.config import disable_value_validation
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_sequence
from pydicom.multival import MultiValue
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from mim3d.core.errors import DataError
from mim3d.core.warned import silenced

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality", "ImageType",
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "NumberOfFrames", "GantryDetectorTilt", "PhotometricInterpretation", "ModalityLUTSequence",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate",
    "Manufacturer", "ManufacturerModelName", "MagneticFieldStrength",
)  # fmt: skip

#: Elements whose loss in one slice would change its voxels without a word.
_VALUE_TAGS = ("RescaleSlope", "RescaleIntercept", "BitsAllocated", "BitsStored", "PixelRepresentation")

#: What of a functional group is read.
_FRAME_SEQUENCES = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
)  # fmt: skip

#: Files with these suffixes are taken for DICOM though they lack the mark of a DICOM file (old exports).
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")

#: First element of a file without the mark, with or without its type; some sixty bits that other files hardly show.
_FIRST_ELEMENT = re.compile(
    rb"(?:\x02\0[\0\x01]|\x08\0[\0\x01\x05\x08\x12-\x18])\0(?:[A-Z][A-Z].\0|..\0\0)|\x02\0[\x02-\x18]\0UI.\0", re.DOTALL
)

#: Series and modality in the bytes of a header that cannot be parsed: the element, its type and length, its value.
_SERIES_BYTES = re.compile(rb"\x20\0\x0e\0(?:UI..|..\0\0)([0-9.]{1,64})[\0 ]?[\x20\x28]\0", re.DOTALL)
_MODALITY_BYTES = re.compile(rb"\x08\0\x60\0(?:CS..|..\0\0)([A-Z]{2,16})", re.DOTALL)

#: Classes of images of CT, MR and PET, and of their forms of many frames -> modality.
_VOLUME_CLASSES = {
    f"1.2.840.10008.5.1.4.1.1.{number}": modality
    for modality, numbers in {"CT": ("2", "2.1", "2.2"), "MR": ("4", "4.1"), "PT": ("128", "130")}.items()
    for number in numbers
}

#: Objects that belong to a series begin so.
_OF_SERIES = "1.2.840.10008.5.1.4.1.1."

#: Bytes of a damaged file that are searched for its series.
_SEARCHED_BYTES = 2**18

#: No pixel is smaller or larger, in millimetres.
_PIXEL_MM = (1e-4, 1e3)

#: What may be shown of a text that should be numbers: it cannot be a name.
_NUMBER_TEXT = re.compile(r"[-+0-9.,;eE\\ ]{1,64}")

#: No position or spacing in millimetres, no angle and no element of a unit vector is larger.
_MAX_GEOMETRY = 1e6

#: No factor or offset of a rescaling is larger; values stay far below the largest of single precision.
_MAX_RESCALE = 1e12

#: A deflated header and its pixels take at most this much once unpacked.
_MAX_INFLATED_BYTES = 2**28
_DEFLATED_SYNTAX = DeflatedExplicitVRLittleEndian.encode()

#: Ways of packing pixels that SimpleITK reads: deflated, RLE, JPEG, JPEG-LS and JPEG 2000.
_DECODED_SYNTAXES = (
    DeflatedExplicitVRLittleEndian,
    *(
        f"1.2.840.10008.1.2.{number}"
        for number in ("5", "4.50", "4.51", "4.57", "4.70", "4.80", "4.81", "4.90", "4.91")
    ),
)

#: Length of pixels that are packed, whatever the header says.
_UNKNOWN_BYTES = 2**32 - 1

#: Seconds of work that a header may take, and bytes of its file for which there is one second more.
_HEADER_S = 1.0
_HEADER_BYTES_PER_S = 2**21


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
        colours: What pixels mean, MONOCHROME2 where the header does not say.
        inverted_from: Sum of a stored value and of what a decoder makes of it that turns white on black into black on
            white; None where values are as they are stored.
        itemsize: Bytes per value once unpacked, at least 2.
        num_frames: Number of frames in the file.
        pixel_offset: Byte of the file where the pixels start.
        native_bytes: Size of the pixels of the whole file; None where they are compressed.
        position: Centre of the first pixel in LPS millimetres, or None.
        orientation: Unit vectors along a row and down a column in LPS, or None.
        pixel_spacing: Distance between rows and between columns in millimetres, or None.
        tilt_degrees: Tilt of the gantry.
        slope: Factor of the rescaling.
        intercept: Offset of the rescaling, added after the factor.
        present: Those elements that change voxel values and that the header has.
        doubtful: Whether the file is no DICOM file at all, unless there are slices beside it.
        fault: Sentence that says why the slice cannot be used; None where it can. Of a file that cannot be parsed the
            path and the reason are known, and the series and the modality where its bytes still show them.
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
    colours: str
    inverted_from: int | None
    itemsize: int
    num_frames: int
    pixel_offset: int
    native_bytes: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    tilt_degrees: float
    slope: float
    intercept: float
    present: frozenset[str]
    doubtful: bool = False
    fault: str | None


class _Bounded:
    """Bytes that are never asked for more than there are, and not for ever, whatever lengths and sequences claim.

    Args:
        stream: The bytes.
        until_s: Time of this thread at which reading is given up, see ``_deadline_s``.
    """

    def __init__(self, stream: BinaryIO, until_s: float) -> None:
        self._stream, self._until_s = stream, until_s
        self.seek, self.tell = stream.seek, stream.tell
        self._size_bytes = stream.seek(0, os.SEEK_END)
        stream.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Read bytes, fewer where the end comes first."""
        if time.thread_time() > self._until_s:
            raise TimeoutError
        start = self._stream.tell()
        if size < 0:
            # The whole rest is read of a deflated file alone.
            raise _DeflatedError(self._inflated(start))
        return self._stream.read(max(0, min(size, self._size_bytes - start)))

    def _inflated(self, start: int) -> bytes:
        """The file as if the part from here on had been stored without compression."""
        self._stream.seek(0)
        head = self._stream.read(start).replace(_DEFLATED_SYNTAX, _DEFLATED_SYNTAX[:-3] + bytes(3))
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        rest = inflater.decompress(self._stream.read(), _MAX_INFLATED_BYTES)
        if inflater.unconsumed_tail:
            raise ValueError("more is deflated in the file than a scan can hold")
        return head + rest


def _deadline_s(size_bytes: int) -> float:
    # Of this thread, so that a slow disk or a busy machine does not count.
    return time.thread_time() + _HEADER_S + size_bytes / _HEADER_BYTES_PER_S


class _DeflatedError(Exception):
    """Raised where a file turns out to be deflated; holds it inflated."""

    def __init__(self, content: bytes) -> None:
        self.content = content


#: Held by the thread that reads a header.
_settings_in_use = threading.RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom from warning of odd bytes: that is no concern of the user, and may quote the patient."""
    # pydicom's settings are those of all threads.
    with _settings_in_use, disable_value_validation(), silenced():
        yield


def read_header(path: str, *, every: bool = False) -> tuple[Any, int, int]:
    """The elements of a DICOM file that mim3d looks at, the byte where its pixels start, and how many bytes they take.

    Args:
        path: The file.
        every: Whether all elements before the pixels are read.

    Raises:
        DataError: The file is no DICOM file, or damaged.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file, so it is not opened")
        with open(path, "rb") as stream, _quiet():
            try:
                return _parse(_Bounded(stream, _deadline_s(os.path.getsize(path))), every)
            except _DeflatedError as deflated:
                content = deflated.content
                header, start, size_bytes = _parse(_Bounded(io.BytesIO(content), _deadline_s(len(content))), every)
                header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
                return header, start, size_bytes
    except Exception as error:  # Damaged bytes make pydicom raise anything.
        # The text of the error is left out: it may quote the patient's name.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise DataError(f"{path}: the DICOM header cannot be read ({reason}); copy the file again.") from error


def _parse(stream: _Bounded, every: bool) -> tuple[Any, int, int]:
    tags = None if every else list(_TAGS)
    header = pydicom.dcmread(cast(BinaryIO, stream), stop_before_pixels=True, specific_tags=tags, force=True)
    # Tag, type and length stand before the pixels; implicit syntaxes leave the type out, whatever the file says it is.
    start = stream.tell()
    head = stream.read(12)
    num_bytes = 12 if head[4:6] in (b"OW", b"OB", b"OF", b"OD", b"UN") else 8
    order: Literal["little", "big"] = "little" if header.original_encoding[1] else "big"
    return header, start + num_bytes, int.from_bytes(head[num_bytes - 4 : num_bytes], order)


def read_kind(path: str) -> str:
    """The SOP class UID of a DICOM file, which says what kind of object it is; empty where the header has none.

    Raises:
        DataError: The file is no DICOM file, or damaged.
    """
    header, *_ = read_header(path)
    try:
        with _quiet():
            return str(header.get("SOPClassUID") or "")
    except Exception as error:  # Values are converted when they are asked for, and raise anything.
        raise DataError(f"{path}: the kind of the DICOM object cannot be read.") from error


def read_identity(path: str) -> tuple[str, ...]:
    """What identifies the patient of a DICOM file, empty where the header has nothing; it must be shown nowhere.

    Raises:
        DataError: The file is no DICOM file, or damaged.
    """
    header, *_ = read_header(path)
    try:
        with _quiet():
            number = header.get("PatientID")
            names = ("PatientID", "IssuerOfPatientID") if number else ("PatientName", "PatientBirthDate")
            return tuple(str(header.get(name) or "").strip() for name in names)
    except Exception as error:  # Values are converted when they are asked for, and raise anything.
        raise DataError(f"{path}: the patient in the DICOM header cannot be read.") from error


def read_slices(path: str) -> tuple[Slice, ...]:
    """The slices of a file: one, or one per frame; none for a file that is not DICOM or not of a series.

    A file that should be DICOM but cannot be used gives a slice with its fault. Only regular files are opened.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        return _by_name(path, str(error.strerror))
    if not stat.S_ISREG(status.st_mode):
        return _by_name(path, "it is no regular file, so it is not opened")
    return _read_slices(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=32768)
def _read_slices(path: str, _modified_ns: int, size_bytes: int) -> tuple[Slice, ...]:
    named = _is_old_export(path)
    if size_bytes == 0:
        return _by_name(path, "it is empty")
    try:
        with open(path, "rb") as stream:
            head = stream.read(132)
            marked = head[128:] == b"DICM"
            known = named or marked or _FIRST_ELEMENT.match(head)
            if known or _is_bare(path):
                head += stream.read(_SEARCHED_BYTES)
            if not (known or _SERIES_BYTES.search(head)):
                return ()
    except OSError as error:
        return _by_name(path, str(error.strerror))
    try:
        header, pixel_offset, pixel_bytes = read_header(path)
        with _quiet():
            uids = (header.get("SeriesInstanceUID"), header.get("SOPInstanceUID"))
            kind = UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""))
            deflated = header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
            if kind in _VOLUME_CLASSES and (not header.get("Rows") or (pixel_offset > size_bytes and not deflated)):
                return (_unreadable(path, "its header ends before its image or is damaged", head),)
            if all(uid and re.fullmatch("[!-~]+", str(uid)) for uid in uids) and (kind or header.get("Rows")):
                return _slices_of(path, header, pixel_offset, pixel_bytes)
        if kind.name != kind and not kind.startswith(_OF_SERIES):
            if kind != MediaStorageDirectoryStorage:
                warnings.warn(f"{path}: left out, a DICOM object of no series.", stacklevel=5)
            return ()
        reason = "its header names no series or instance"
    except Exception as error:  # Values are converted when they are asked for, and raise anything.
        cause = error.__cause__ if isinstance(error, DataError) else error
        reason = f"its header is damaged ({type(cause).__name__})"
    certain = named or marked or _SERIES_BYTES.search(head) is not None
    return (_unreadable(path, reason, head, doubtful=not certain),)


def _is_old_export(path: str) -> bool:
    return path.lower().endswith(_DICOM_SUFFIXES)


def _is_bare(path: str) -> bool:
    """Whether a file is named by a number without a suffix, as archives name slices."""
    return re.fullmatch(r"[^.]*[0-9][^.]*", os.path.basename(path)) is not None


def name_form(path: str) -> str:
    """The name of a file with its folder, and without the numbers that tell slices apart."""
    folder, name = os.path.split(path)
    return os.path.join(folder, re.sub("[A-Fa-f]*[0-9][0-9A-Fa-f]*", "#", name))


def read_stray(path: str) -> Slice | None:
    """A file that is not recognised as DICOM, as the damaged slice that its name says it is.

    None stands for a sound DICOM object of no series.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return _unreadable(path, "it is no regular file, so it is not opened", doubtful=True)
        with open(path, "rb") as stream:
            head = stream.read(132)
    except OSError as error:
        return _unreadable(path, str(error.strerror), doubtful=True)
    if head[128:] == b"DICM":
        return None
    reason = "it does not begin as a DICOM file" if len(head) > 131 else "it ends before its header"
    return _unreadable(path, reason if head else "it is empty", doubtful=True)


def _by_name(path: str, reason: str) -> tuple[Slice, ...]:
    """A file of which nothing can be read: a slice if it is named like one, perhaps one if it is just a number."""
    named = _is_old_export(path)
    return (_unreadable(path, reason, doubtful=not named),) if named or _is_bare(path) else ()


def _unreadable(path: str, reason: str, head: bytes = b"", *, doubtful: bool = False) -> Slice:
    """What is known of a slice that cannot be read."""
    series, modality = _SERIES_BYTES.search(head), _MODALITY_BYTES.search(head)
    return Slice(
        path=path,
        frame=None,
        series_uid=series[1].decode().rstrip(".") if series else "",
        study_uid="",
        slice_uid=path,
        modality=modality[1].decode() if modality else "",
        secondary_capture=False,
        image_type=(),
        rows=0,
        columns=0,
        num_values=1,
        colours="MONOCHROME2",
        inverted_from=None,
        itemsize=2,
        num_frames=1,
        pixel_offset=0,
        native_bytes=None,
        position=None,
        orientation=None,
        pixel_spacing=None,
        tilt_degrees=0.0,
        slope=1.0,
        intercept=0.0,
        present=frozenset(),
        doubtful=doubtful,
        fault=f"{path}: this DICOM file cannot be read: {reason}; copy it again from its source.",
    )


def _slices_of(path: str, header: Any, pixel_offset: int, pixel_bytes: int) -> tuple[Slice, ...]:
    until_s = _deadline_s(os.path.getsize(path))
    frames = _items(header, "PerFrameFunctionalGroupsSequence", until_s)
    if not frames:
        return (_slice(path, header, None, 1, [header], pixel_offset, pixel_bytes),)

    def places(group: Any) -> list[Any]:
        """The items that hold geometry and rescaling, in the one-item sequences of a functional group."""
        return [item for name in _FRAME_SEQUENCES for item in _items(group, name, until_s)[:1]]

    shared = [place for group in _items(header, "SharedFunctionalGroupsSequence", until_s) for place in places(group)]
    return tuple(
        _slice(path, header, index, len(frames), [*places(frame), *shared, header], pixel_offset, pixel_bytes)
        for index, frame in enumerate(frames)
    )


def _items(dataset: Any, name: str, until_s: float) -> list[Any]:
    """The items of a sequence; those of a known length are parsed here, for pydicom would do so without any bounds."""
    element = dataset.get_item(name) if name in dataset else None
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        stream = cast(BinaryIO, _Bounded(io.BytesIO(element.value), until_s))
        implicit, little = element.is_implicit_VR, element.is_little_endian
        return list(read_sequence(stream, implicit, little, len(element.value), [default_encoding]))
    return list(getattr(element, "value", None) or [])


def _slice(
    path: str,
    header: Any,
    frame: int | None,
    num_described: int,
    places: Sequence[Any],
    pixel_offset: int,
    pixel_bytes: int,
) -> Slice:
    values = _Values(places)
    rows, columns = values.whole("Rows", 0, (0, 65535)), values.whole("Columns", 0, (0, 65535))
    num_values, bits = values.whole("SamplesPerPixel", 1, (1, 4)), values.whole("BitsAllocated", 16, (1, 64))
    bits_stored, is_signed = values.whole("BitsStored", bits, (1, bits)), values.whole("PixelRepresentation", 1, (0, 1))
    values.whole("HighBit", bits - 1, (0, bits - 1))
    num_frames = values.whole("NumberOfFrames", 1, (0, 2**31)) or 1
    position, spacing = values.floats("ImagePositionPatient", 3), values.floats("PixelSpacing", 2)
    orientation = values.floats("ImageOrientationPatient", 6)
    values.check_plane(orientation, spacing)
    tilt_degrees = values.number("GantryDetectorTilt", 0.0)
    slope = values.number("RescaleSlope", 1.0, _MAX_RESCALE)
    intercept = values.number("RescaleIntercept", 0.0, _MAX_RESCALE)
    modality = str(header.get("Modality") or _VOLUME_CLASSES.get(str(header.get("SOPClassUID")), "")).strip().upper()
    if not re.fullmatch("[A-Z]{0,16}", modality):
        # The text may be anything, and is not shown.
        modality = ""
        values.faults.append("its Modality is no code such as CT")
    if num_frames != num_described:
        values.faults.append(f"it claims {num_frames} frames and describes {num_described}")
    if slope == 0 and modality != "PT":
        # Slices of PET without any count are stored so.
        values.faults.append("its RescaleSlope is 0, which gives every voxel the same value")
    if values.first("ModalityLUTSequence") is not None and values.first("RescaleSlope") is None:
        values.faults.append("its values are rescaled by a table (ModalityLUTSequence), which is not read")
    syntax = header.file_meta.get("TransferSyntaxUID")
    native = syntax in (None, ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
    if not native and syntax not in _DECODED_SYNTAXES:
        shown = syntax.name if re.fullmatch("[0-9.]{1,64}", str(syntax)) else "none"
        values.faults.append(f"its pixels are packed as {shown}, which is not read here, as unpacked ones are")
    native_bytes = rows * columns * num_values * num_frames * bits // 8
    if native and 0 < 2 * native_bytes <= pixel_bytes < _UNKNOWN_BYTES:
        values.faults.append(
            f"it holds {pixel_bytes} bytes of pixels, but its Rows, Columns, BitsAllocated and NumberOfFrames "
            f"({rows}, {columns}, {bits}, {num_frames}) claim {native_bytes}"
        )
    kinds = header.get("ImageType") or ()
    colours = str(header.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    return Slice(
        path=path,
        frame=frame,
        series_uid=str(header.SeriesInstanceUID),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        slice_uid=str(header.SOPInstanceUID),
        modality=modality,
        secondary_capture=str(header.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE),
        image_type=tuple(str(kind).upper() for kind in ([kinds] if isinstance(kinds, str) else kinds)),
        rows=rows,
        columns=columns,
        num_values=num_values,
        colours=colours if re.fullmatch("[A-Z0-9_ ]{1,16}", colours) else "unknown",
        inverted_from=(-1 if is_signed else 2**bits_stored - 1) if colours == "MONOCHROME1" else None,
        itemsize=max(2, bits // 8),
        num_frames=num_frames,
        pixel_offset=pixel_offset,
        native_bytes=native_bytes if native else None,
        position=position,
        orientation=orientation,
        pixel_spacing=spacing,
        tilt_degrees=tilt_degrees,
        slope=slope,
        intercept=intercept,
        present=frozenset(name for name in _VALUE_TAGS if values.first(name) is not None),
        fault=f"{path}: this DICOM file cannot be used: {values.faults[0]}; export it again."
        if values.faults
        else None,
    )


class _Values:
    """Values of a header that may be anything; what is no plausible number is remembered as a fault.

    Args:
        places: Data sets that are asked in turn.
    """

    def __init__(self, places: Sequence[Any]) -> None:
        self._places = places
        self.faults: list[str] = []

    def first(self, name: str) -> Any:
        """The first value that is not empty, else None."""
        values = (place.get(name) for place in self._places)
        return next((value for value in values if value is not None and value != "" and value != []), None)

    def floats(self, name: str, count: int, most: float = _MAX_GEOMETRY) -> tuple[float, ...] | None:
        """That many numbers of at most some size; None where the header has no value, or another one."""
        value: Any = None
        try:
            value = self.first(name)
            if value is None:
                return None
            single = isinstance(value, str | bytes | int | float)
            numbers = tuple(float(number) for number in ([value] if single else value))
        except Exception:  # Conversion to numbers by pydicom; the text may be the patient's name in a wrong place.
            texts = [value] if isinstance(value, str) else value if isinstance(value, MultiValue) else ()
            text = "\\".join(map(str, texts))
            shown = f"'{text}', " if _NUMBER_TEXT.fullmatch(text) else ""
            self.faults.append(f"its {name} is {shown}no {'number' if count == 1 else f'list of {count} numbers'}")
            return None
        if len(numbers) == count and all(math.isfinite(number) and abs(number) <= most for number in numbers):
            return numbers
        shown = ", ".join(f"{number:g}" for number in numbers[:8])
        need = "a plausible number" if count == 1 else f"{count} plausible numbers"
        self.faults.append(f"its {name} is ({shown}), where {need} {'is' if count == 1 else 'are'} needed")
        return None

    def check_plane(self, orientation: tuple[float, ...] | None, spacing: tuple[float, ...] | None) -> None:
        """Refuse pixels of no size, and rows and columns in no directions of the room."""
        if spacing is not None and not all(_PIXEL_MM[0] <= size <= _PIXEL_MM[1] for size in spacing):
            self.faults.append(f"its PixelSpacing is ({spacing[0]:g}, {spacing[1]:g}) mm, which no scan has")
        if orientation is not None:
            across, down = orientation[:3], orientation[3:]
            lengths = math.hypot(*across), math.hypot(*down)
            if min(lengths) < 0.99 or max(lengths) > 1.01 or abs(sum(map(operator.mul, across, down))) > 1e-3:
                shown = ", ".join(f"{value:g}" for value in orientation)
                self.faults.append(f"its ImageOrientationPatient is ({shown}), no two perpendicular unit vectors")

    def number(self, name: str, default: float, most: float = _MAX_GEOMETRY) -> float:
        """One number, or the default where the header has none."""
        found = self.floats(name, 1, most)
        return default if found is None else found[0]

    def whole(self, name: str, default: int, limits: tuple[int, int]) -> int:
        """One whole number within limits, or the default where the header has none."""
        value = self.number(name, float(default), math.inf)
        if value.is_integer() and limits[0] <= value <= limits[1]:
            return int(value)
        self.faults.append(f"its {name} is {value:g}, which no scan has")
        return default
