"""What a case is, and every form of DATA read into cases."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mim3d.core.errors import DataError, listed
from mim3d.core.files import read_json
from mim3d.datasets.dataset_json import is_nnunet, read_labels, read_msd, read_nnunet
from mim3d.datasets.entries import Entry, unique_ids
from mim3d.datasets.folders import pair_folders, read_pairs, read_tree
from mim3d.datasets.lists import read_csv, read_json_list
from mim3d.scans.grids import require_same_grid
from mim3d.scans.image_stacks import SLICE_SUFFIXES, is_slice, natural
from mim3d.scans.volumes import patient_of, read_grid


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scan of a data set with what belongs to it; all paths are absolute.

    Attributes:
        id: Name of the case, unique in its set and safe as a file name.
        images: One path per channel; a DICOM series counts as one path.
        label: Path of the label map, or None.
        class_name: Class of the whole scan, or None.
        patient: Name of the patient; cases of one patient are never separated by a split.
        split: Declared part, "train", "val" or "test", or None.
        labelled: Labels, by name or value, that the label map has annotations of; None stands for all.
    """

    id: str
    images: tuple[str, ...]
    label: str | None = None
    class_name: str | None = None
    patient: str
    split: str | None = None
    labelled: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class CaseSet:
    """All cases of one data set.

    Attributes:
        root: Folder or list that the cases come from.
        form: "folder", "pairs", "msd", "nnunet", "csv", "json", "preset", "list" or "slices".
        cases: The cases in the order of the list, or by path for folders.
        labels: Declared label value -> name, with background 0 included; empty where nothing is declared.
    """

    root: str
    form: str
    cases: tuple[Case, ...]
    labels: dict[int, str]


def read_cases(data: str | Path, *, recursive_images_only: bool = False) -> CaseSet:
    """Read any form of DATA; nothing but names, lists and DICOM headers is opened.

    Known forms: a folder of scans or DICOM series at any depth; a folder with ``images`` or ``imagesTr`` beside
    ``labels``, ``labelsTr`` or ``masks`` holding files of the same names; a Medical Segmentation Decathlon folder or
    its ``dataset.json``; an nnU-Net raw folder; a CSV or JSON list with the columns image, label, class, patient,
    split, labels and id; a single scan.

    Args:
        data: The folder, list or scan.
        recursive_images_only: Leave out all labels (and never take a label map for a scan).

    Raises:
        DataError: Nothing is there, nothing in it is readable, or a list contradicts itself.
    """
    root = os.path.abspath(data)
    if not os.path.exists(root):
        raise DataError(f"{data}: no such file or folder.")
    form, entries, labels = _read_entries(root, not recursive_images_only)
    if recursive_images_only:
        entries = [replace(entry, label=None, labelled=None) for entry in entries]
    return CaseSet(root=root, form=form, cases=to_cases(entries, root), labels=labels)


def _read_entries(path: str, with_labels: bool) -> tuple[str, list[Entry], dict[int, str]]:
    """The form of DATA, its entries, and the names of labels that it declares."""
    if os.path.isdir(path):
        description = os.path.join(path, "dataset.json")
        if not os.path.isfile(description):
            pair = pair_folders(path)
            if pair is None:
                return "folder", read_tree(path), {}
            form = "msd" if pair[0].endswith("imagesTr") and pair[1].endswith("labelsTr") else "pairs"
            return form, read_pairs(*pair, with_labels=with_labels), {}
        path = description
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".csv":
        return "csv", read_csv(path), {}
    if suffix != ".json":
        return "folder", [Entry(images=(path,))], {}
    content = read_json(path)
    if isinstance(content, list):
        return "json", read_json_list(content, path), {}
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a list of cases or a dataset.json, not a {type(content).__name__}.")
    labels = read_labels(content.get("labels"), path) if with_labels else {}
    if is_nnunet(content):
        return "nnunet", read_nnunet(content, path), labels
    if isinstance(content.get("cases"), list):
        return "json", read_json_list(content["cases"], path), labels
    return "msd", read_msd(content, path), labels


def read_slice_folders(root: str | os.PathLike[str]) -> CaseSet:
    """Cases of a tree of slice images, ``class/patient/scan/1.png`` or ``class/scan/1.png``, as CC-CCII is published.

    The first folder below ``root`` names the class, the second the patient; ids are made of all of them. No image is
    opened.

    Raises:
        DataError: There is no such folder, images lie in no folder of a class, or no folder holds slice images.
    """
    top = os.path.abspath(root)
    if not os.path.isdir(top):
        raise DataError(f"{top}: no such folder; check the path and that the disk is mounted.")
    entries = []
    for folder, names, found in os.walk(top):
        names[:] = sorted((name for name in names if not name.startswith(".")), key=natural)
        if not any(is_slice(name) for name in found):
            continue
        parts = os.path.relpath(folder, top).split(os.sep)
        if len(parts) < 2:
            raise DataError(
                f"{folder}: images lie here, but a scan needs a folder of its own in that of its class "
                "(class/patient/scan/1.png); move them, or give the folder above."
            )
        case_id = re.sub(r"[^\w.-]+", "-", "_".join(parts))
        entries.append(Entry(images=(folder,), class_name=parts[0], patient=parts[1], id=case_id))
    if not entries:
        raise DataError(
            f"{top}: no folder of slices; expected images ({', '.join(SLICE_SUFFIXES)}) as class/patient/scan/1.png."
        )
    return CaseSet(root=top, form="slices", cases=to_cases(entries, top), labels={})


def to_cases(entries: Sequence[Entry], root: str) -> tuple[Case, ...]:
    """Give every entry its id, see ``unique_ids``, and its patient.

    The patient is the declared one, else the salted hash of a DICOM series, else the id.

    Raises:
        DataError: The same image is listed twice, or two entries would share an id.
    """
    first_row: dict[tuple[str, ...], int] = {}
    for row, entry in enumerate(entries, start=1):
        if entry.images in first_row:
            raise DataError(
                f"{root}: entries {first_row[entry.images]} and {row} are the same image {entry.images[0]}; "
                "list every image once."
            )
        first_row[entry.images] = row
    return tuple(
        Case(
            id=case_id,
            images=entry.images,
            label=entry.label,
            class_name=entry.class_name,
            patient=entry.patient or _dicom_patient(entry.images[0]) or case_id,
            split=entry.split,
            labelled=entry.labelled,
        )
        for case_id, entry in zip(unique_ids(entries, root), entries, strict=True)
    )


def _dicom_patient(path: str) -> str | None:
    """The hashed patient of a DICOM series; other files hold no patient worth opening them for."""
    try:
        return patient_of(path) if "::" in path or os.path.isdir(path) else None
    except DataError:
        return None


def check_cases(cases: CaseSet, *, need_labels: bool) -> None:
    """Check every case by its headers, before any work.

    Args:
        cases: The data set.
        need_labels: Whether a case without a label map is refused.

    Raises:
        DataError: The first fault found: a case without a label map where one is needed, a missing or unreadable file,
            or channels and label maps on different grids.
    """
    unlabelled = [case.id for case in cases.cases if case.label is None]
    if need_labels and unlabelled:
        raise DataError(
            f"{cases.root}: no label for {listed(unlabelled)} ({len(unlabelled)} of {len(cases.cases)} cases); every "
            "case needs one here, so add the labels or leave these cases out."
        )
    files = [[*case.images, *([case.label] if case.label else [])] for case in cases.cases]
    missing = [path for paths in files for path in paths if not os.path.exists(path.split("::")[0])]
    if missing:
        raise DataError(f"{cases.root}: these files do not exist: {listed(missing)}; correct or remove their entries.")
    for first, *others in files:
        grid = read_grid(first)
        for path in others:
            require_same_grid(grid, read_grid(path))
