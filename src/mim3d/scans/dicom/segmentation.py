"""Label maps as DICOM Segmentation objects (PS3.3 A.51), tied to the slices of the series that was segmented.

The object names patient, study and frame of reference as the series does, which is what ties it to the patient in an
archive: those elements are copied from the slices into the file, on purpose, and nowhere else.

Segments have codes of SNOMED CT where their names are known (:mod:`mim3d.scans.dicom.terminology`), and colours.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.valuerep import DA, TM

from mim3d import __version__
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import atomic_file
from mim3d.core.names import printable
from mim3d.core.warned import silenced
from mim3d.scans.dicom.headers import read_header
from mim3d.scans.dicom.series import Stack, open_series
from mim3d.scans.dicom.terminology import colour_of, meaning_of
from mim3d.scans.files import warn_once
from mim3d.scans.grids import spacing_of
from mim3d.scans.volumes import DICOM, format_of

#: What is said of another scan, after its name.
NO_SERIES = " is no DICOM series, and a DICOM-SEG refers to the slices of one; use --format auto."

#: Longest text of a segment's label (value representation LO).
_MAX_LABEL = 64

#: Elements that a Segmentation must have but that may be empty (type 2), where the slices lack them.
_MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber",
)  # fmt: skip


def require_highdicom() -> None:
    """Refuse to go on without the library that writes DICOM-SEG.

    Raises:
        ConfigError: The library is not installed.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise ConfigError("format dicom_seg needs the package highdicom; install it with pip install 'mim3d[dicom]'.")


def write_dicom_seg(
    path: str | os.PathLike[str], labels: npt.NDArray[Any], series: str, names: Mapping[int, str], *, algorithm: str
) -> None:
    """Write a label map as a binary DICOM Segmentation; the file appears whole or not at all.

    Every declared label is a segment, in rising order of its value, whether a voxel has it or not; frames without a
    voxel of their segment are left out.

    Args:
        path: File to be written.
        labels: Label map (X, Y, Z) on the RAS+ form of the series' grid.
        series: DICOM series that was segmented: a folder, or ``folder::hash``.
        names: Label value -> name; background 0 may be among them.
        algorithm: Name of the network, without anything about a patient.

    Raises:
        ConfigError: Highdicom is not installed.
        DataError: There is no DICOM series, it lacks what a Segmentation takes over from it, or has another grid.
    """
    require_highdicom()
    import highdicom
    from highdicom.seg import Segmentation

    stack, sources = _sources_of(series)
    values = sorted(value for value in names if value != 0)
    # Segments are numbered from 1 in the order of their values; stored axes of a stack are column, row, slice.
    numbers = np.zeros(
        max([*values, int(labels.max(initial=0))]) + 1, dtype=np.uint8 if len(values) < 256 else np.uint16
    )
    numbers[values] = np.arange(1, len(values) + 1)
    pixels = np.ascontiguousarray(numbers[stack.grid.from_ras(labels)].T)
    segments = [_segment(number, names[value], algorithm) for number, value in enumerate(values, start=1)]
    try:
        if not all(name.isascii() for name in names.values()):
            _write_in_unicode(sources[0])
        # Libraries quote what they find odd in a header, a patient's name for one; that belongs into no log.
        with silenced(), atomic_file(path) as part:
            segmentation = Segmentation(
                source_images=sources,
                pixel_array=pixels,
                segmentation_type="BINARY",
                segment_descriptions=segments,
                series_instance_uid=highdicom.UID(),
                series_number=300,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="mim3d",
                manufacturer_model_name="mim3d",
                software_versions=__version__,
                device_serial_number="0",
                series_description=_description([segment.SegmentLabel for segment in segments]),
                content_description="Segmentation by mim3d",
            )
            segmentation.save_as(part)
    except (DataError, OSError, MemoryError):
        raise
    except Exception as error:  # Values of headers that the libraries do not expect make them raise anything.
        raise _unfit(series, error) from None


def require_source(series: str) -> None:
    """Refuse a scan that no DICOM Segmentation can refer to, before work is done for it; only headers are read.

    Raises:
        DataError: There is no DICOM series, it cannot be stacked, or lacks what a Segmentation takes over from it.
    """
    if format_of(series) is not DICOM:
        raise DataError(f"{series}{NO_SERIES}")
    _sources_of(series)


def _sources_of(series: str) -> tuple[Stack, list[Any]]:
    """The stack of a series, and the headers of its files with all that a Segmentation takes over from them."""
    stack = open_series(series)
    paths = list(dict.fromkeys(item.path for item in stack.slices))
    if len(paths) not in (1, len(stack.slices)):
        raise DataError(
            f"{stack.grid.path}: the series mixes files of one and of several slices, which no DICOM-SEG can refer "
            "to; use --format nii.gz."
        )
    headers, odd = [], list[str]()
    try:
        with silenced():
            for path in paths:
                header, *_ = read_header(path, every=True)
                odd += _tidy(header, spacing_of(stack.grid.affine)[2])
                headers.append(header)
    except DataError:
        raise
    except Exception as error:
        raise _unfit(series, error) from None
    for name in ("FrameOfReferenceUID", "StudyInstanceUID"):
        if len({header.get(name) for header in headers}) > 1:
            raise DataError(
                f"{series}: the slices differ in {name}, so no DICOM-SEG can refer to all; use --format nii.gz."
            )
    if odd:
        names = " and ".join(sorted(set(odd)))
        warn_once(f"{series}: the headers hold no proper {names}, so the DICOM-SEG has none.")
    return stack, headers


def _tidy(header: Any, thickness_mm: float) -> list[str]:
    """Fill in what a header lacks and empty what it may lack but holds wrongly; the names of what was emptied."""
    from highdicom.enum import PatientSexValues, SpecificCharacterSetValues

    for keyword in ("FrameOfReferenceUID", "StudyInstanceUID"):
        if not header.get(keyword):
            raise AttributeError(keyword, name=keyword)
    checks = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM, "PatientSex": PatientSexValues}
    odd = []
    for keyword in _MAY_BE_EMPTY:
        value = header.get(keyword)
        try:
            if value and keyword in checks:
                checks[keyword](value)
        except ValueError:
            odd.append(keyword)
            value = None
        if value is None:
            setattr(header, keyword, "")
    sets = header.get("SpecificCharacterSet") or []
    known = {each.value for each in SpecificCharacterSetValues}
    if not known.issuperset([sets] if isinstance(sets, str) else sets):
        # The library knows no sets that begin with the default one, as in Japan.
        _write_in_unicode(header)
    if not header.get("SliceThickness"):
        header.SliceThickness = f"{thickness_mm:.6g}"
    return odd


def _write_in_unicode(header: Any) -> None:
    """Let the texts of a header be written in Unicode, which holds those of every other set."""
    header.decode()
    header.SpecificCharacterSet = "ISO_IR 192"


def _unfit(series: str, error: Exception) -> DataError:
    # The text of the error is left out: it may quote the patient.
    missing = f" (element {error.name} is missing)" if isinstance(error, AttributeError) and error.name else ""
    return DataError(
        f"{series}: the headers of the DICOM series lack what a DICOM-SEG takes over from them, or differ in it"
        f"{missing}; use --format nii.gz."
    )


def _segment(number: int, name: str, algorithm: str) -> Any:
    from highdicom.color import CIELabColor
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from highdicom.sr.coding import CodedConcept
    from pydicom.sr.codedict import codes

    meaning = meaning_of(name)
    # A backslash separates values; a label without any letter is not allowed.
    name = printable(name).replace("\\", "/").strip()[:_MAX_LABEL] or f"label {number}"
    if meaning.keyword is None:
        # Names of labels are the user's own; a scheme that begins with 99 is private (PS3.16 8.1).
        kind = CodedConcept(f"label{number}", "99MIM3D", name)
    else:
        kind = CodedConcept.from_code(getattr(codes.SCT, meaning.keyword))
    algorithms = AlgorithmIdentificationSequence(algorithm[:_MAX_LABEL], codes.DCM.ArtificialIntelligence, __version__)
    segment = SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=(
            codes.SCT.MorphologicallyAbnormalStructure if meaning.is_altered else codes.SCT.AnatomicalStructure
        ),
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithms,
        anatomic_regions=None if meaning.organ is None else [getattr(codes.SCT, meaning.organ)],
        display_color=CIELabColor(*colour_of(meaning, number)),
    )
    if meaning.side is not None:
        side = CodedConcept.from_code(getattr(codes.SCT, meaning.side))
        # A side belongs to the anatomy: of altered tissue that is its region (PS3.3 table 10-5).
        if meaning.organ is not None:
            segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [side]
        else:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
    return segment


def _description(names: Sequence[str]) -> str:
    """What is segmented, as the description of a series: as many names as it holds."""
    kept = list(names)
    while True:
        more = ", ..." if len(kept) < len(names) else ""
        text = f"mim3d segmentation: {', '.join(kept)}{more}"
        if len(text) <= _MAX_LABEL:
            return text
        if not kept:
            return "mim3d segmentation"
        kept.pop()
