"""Whose scans are whose, where names alone say it: one patient often comes under several names.

``CT_images_STS_003`` and ``PET_images_STS_003``, ``s01_T1`` and ``s01_T2``, ``patient3_pre`` and ``patient3_post``. A
part of the names that takes few values, which most patients share, is no part of the patient's name. Where all names
say where the patient's ends (``sub-01_ses-2_T1w``, ``TCGA-06-0119_2001``), or count or date scans behind a patient's
number (``LUNG-0001_0``, ``12_20200131``), patients may have different numbers of scans. Names without such a
regularity are left as they are: every case is a patient of its own then.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypedDict

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.names import joined_name
from mim3d.scans.modality import modality_name

#: Values that a part of the names may take, and the share of patients that each of them must have.
MAX_VALUES = 8
LEAST_SHARE = 0.6

#: Parts of names that number what follows: a number behind one of them may be a visit, any other is a patient.
_NUMBERED = {"ses", "session", "visit", "v", "tp", "time", "timepoint", "scan", "phase", "frame", "echo", "run", "week"}

#: Values that tell sets or classes apart, each of which counts its own patients from 1.
_SETS = {
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "test",
    "testing",
    "benign",
    "malignant",
    "malign",
    "normal",
}
_SETS |= {"abnormal", "healthy", "control", "positive", "negative", "pos", "neg", "covid", "ncp", "cp", "case", "site"}

#: Values that name a time.
_TIMES = {"pre", "post", "baseline", "followup", "before", "after", "inspiration", "expiration", "insp", "exp"}

#: Folders that are those of one patient, as BIDS and many others name them.
_PATIENT_FOLDER = re.compile(r"(?i)(sub|subj|subject|pat|patient|case|person)[-_ ]?\w*\d\w*")

#: Up to where a name is the patient's, by words for a patient and by the forms of archives.
_SUBJECT = re.compile(
    r".*?(?<![a-z0-9])(?:(?:sub|subj|subject|pat|patient|participant)[_\-. ]?(?=[a-z]*\d)[a-z0-9]+|tcga-\w\w-\w{4}"
    r"|oas[12]_\d{4}|oas3\d{4}|\d{3}_s_\d{4}|lidc-idri-\d{4}|brats-[a-z]+-\d{5})(?![a-z0-9])",
    re.IGNORECASE,
)

#: A patient with the date or the number of a scan behind.
_DATED = re.compile(r"(.*\d.*?)[_\-. ]+(?:19|20)\d\d[\-._]?[01]\d[\-._]?[0-3]\d")
_COUNTED = re.compile(r"(.*\d{3,})[_\-. ]+0*(\d)")

#: Words in front of what names a set of patients of its own.
_SET_WORDS = {"cohort", "batch", "group", "center", "centre", "hospital", "site", "part", "set", "fold"}

_Parts = tuple[str, ...]


class UserStatements(TypedDict):
    """What a user says of a data set that it does not say itself.

    Attributes:
        modality: What made the images; None where nothing is said.
        patient_pattern: Regular expression that finds the patient in the name of a case; None where nothing is said.
    """

    modality: str | None
    patient_pattern: str | None


def patients_of_folders(paths: Sequence[str], root: str) -> dict[str, str]:
    """Path -> patient, for scans that share a folder named like one of a patient: ``sub-01/ses-2/...``, ``patient001``.

    Args:
        paths: Paths of scans.
        root: The folder that they lie below.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders = os.path.relpath(path, root).split(os.sep)[:-1]
        place = next((index for index, name in enumerate(folders) if _PATIENT_FOLDER.fullmatch(name)), None)
        if place is not None:
            found[joined_name(folders[: place + 1])].append(path)
    return {path: patient for patient, shared in found.items() if len(shared) > 1 for path in shared}


def patients_of_names(names: Sequence[str]) -> dict[str, str]:
    """Name -> patient, for names that show a regularity; empty where they show none.

    Args:
        names: Names of cases, each once.
    """
    stems = _stems(names)
    regular = _by_regularity(list(dict.fromkeys(stems.values())))
    patients = {name: regular.get(stem, stem) for name, stem in stems.items()}
    return patients if len(set(patients.values())) < len(names) else {}


def _stems(names: Sequence[str]) -> dict[str, str]:
    """Name -> the part of it that is the patient's, where all names say so alike; else the name itself."""
    if all(matches := [_SUBJECT.match(name) for name in names]):
        return {name: match[0] for name, match in zip(names, matches, strict=True) if match}
    if all(matches := [_DATED.fullmatch(name) for name in names]):
        return {name: match[1] for name, match in zip(names, matches, strict=True) if match}
    numbers: dict[str, set[int]] = defaultdict(set)
    if all(matches := [_COUNTED.fullmatch(name) for name in names]):
        for match in matches:
            if match:
                numbers[match[1]].add(int(match[2]))
    first = min((number for own in numbers.values() for number in own), default=0)
    # Every patient's scans are counted from the same number on; years count patients.
    is_counted = first < 2 and all(own == set(range(first, first + len(own))) for own in numbers.values())
    if numbers and is_counted and not all(re.search(r"(?<!\d)(19|20)\d\d$", stem) for stem in numbers):
        return {name: match[1] for name, match in zip(names, matches, strict=True) if match}
    return {name: name for name in names}


def _by_regularity(names: Sequence[str]) -> dict[str, str]:
    """Name -> patient where a part of the names takes few values, which most patients share; empty without."""
    parts = {name: tuple(re.split(r"[_\-. ]+", name)) for name in names}
    if len({len(own) for own in parts.values()}) != 1:
        return {}
    number = len(next(iter(parts.values())))
    kept = tuple(range(number))
    # One part after the other: sequence and time point of one patient vary independently.
    while (varying := _varying_part(parts, kept)) is not None:
        kept = tuple(place for place in kept if place != varying)
    if len(kept) == number:
        return {}
    return {name: "_".join(own[place] for place in kept) for name, own in parts.items()}


def _varying_part(parts: Mapping[str, _Parts], kept: tuple[int, ...]) -> int | None:
    """The place of a part that is no part of the patient's name; None where there is none."""
    rows = {tuple(own[place] for place in kept) for own in parts.values()}
    best: tuple[int, int] | None = None
    for index, place in enumerate(kept):
        groups: dict[_Parts, set[str]] = defaultdict(set)
        for row in rows:
            groups[row[:index] + row[index + 1 :]].add(row[index])
        values = set().union(*groups.values())
        if len(kept) < 2 or not 2 <= len(values) <= MAX_VALUES or values & _SETS:
            continue
        known = all(value.lower() in _TIMES or modality_name(value) for value in values)
        before = {row[index - 1].lower() for row in rows} if index else set()
        is_number = any(value.isdigit() for value in values) and not before <= _NUMBERED
        # Few values of many patients; as many of both could be either. Data sets in front count patients of their own.
        too_many = not known and (len(values) >= len(groups) or place == 0)
        shared = min(sum(value in group for group in groups.values()) for value in values)
        if before & _SET_WORDS or is_number or too_many or shared < LEAST_SHARE * len(groups):
            continue
        if best is None or len(values) < best[0]:
            best = len(values), place
    return None if best is None else best[1]


def described(patients: Mapping[str, str]) -> str:
    """The sentence that says who is taken for one patient, with an example."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, patient in patients.items():
        groups[patient].append(name)
    patient, names = max(groups.items(), key=lambda item: len(item[1]))
    return (
        f"{len(patients)} cases are taken for {len(groups)} patients by the regularity of their names: {listed(names)} "
        f"are '{patient}', which count as one in splits and intervals. If that is wrong, give a list with a column "
        "patient, or cache and train with --patient_pattern."
    )


def patients_by_pattern(names: Sequence[str], pattern: str) -> dict[str, str]:
    r"""Name -> patient: what a pattern finds in each name, or its first group.

    Args:
        names: Names of cases.
        pattern: Regular expression such as ``STS_\d+``.

    Raises:
        ConfigError: It is no regular expression.
        DataError: It finds nothing in a name.
    """
    try:
        searched = {name: re.search(pattern, name) for name in names}
    except re.error as error:
        raise ConfigError(f"patient_pattern {pattern!r} is no regular expression ({error}).") from error
    missing = [
        name for name, match in searched.items() if match is None or not (match[1] if match.re.groups else match[0])
    ]
    if missing:
        raise DataError(
            f"patient_pattern {pattern!r} finds no patient in {listed(missing)} ({len(missing)} of {len(names)} "
            "cases); make it match every case's name."
        )
    return {name: match[1] if match.re.groups else match[0] for name, match in searched.items() if match is not None}
