"""What a data set is: every form of DATA read into cases, with splits by patient."""

import os
from pathlib import Path

from mim3d.core.errors import DataError
from mim3d.datasets.dataset_json import is_nnunet, read_json, read_labels, read_msd, read_nnunet
from mim3d.datasets.folders import pair_folders, read_pairs, read_tree
from mim3d.datasets.grid_checks import check_cases
from mim3d.datasets.ids import Entry, to_cases
from mim3d.datasets.lists import read_csv, read_json_list
from mim3d.datasets.records import Case, CaseSet, Split
from mim3d.datasets.splits import split_cases

__all__ = ["Case", "CaseSet", "Split", "check_cases", "read_cases", "split_cases"]


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
        DataError: Nothing there, nothing readable in it, or a list that contradicts itself.
    """
    root = os.path.abspath(data)
    if not os.path.exists(root):
        raise DataError(f"{data}: no such file or folder.")
    with_labels = not recursive_images_only
    if os.path.isdir(root):
        form, entries, labels = _read_folder(root, with_labels)
    else:
        form, entries, labels = _read_file(root, with_labels)
    return CaseSet(root=root, form=form, cases=to_cases(entries, root), labels=labels if with_labels else {})


_Found = tuple[str, list[Entry], dict[int, str]]


def _read_folder(root: str, with_labels: bool) -> _Found:
    description = os.path.join(root, "dataset.json")
    if os.path.isfile(description):
        return _read_json_file(description, with_labels)
    pair = pair_folders(root)
    if pair is None:
        return "folder", read_tree(root), {}
    form = "msd" if pair[0].endswith("imagesTr") and pair[1].endswith("labelsTr") else "pairs"
    return form, read_pairs(*pair, with_labels=with_labels), {}


def _read_file(path: str, with_labels: bool) -> _Found:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".csv":
        return "csv", read_csv(path, with_labels=with_labels), {}
    if suffix == ".json":
        return _read_json_file(path, with_labels)
    return "folder", [Entry(images=(path,))], {}


def _read_json_file(path: str, with_labels: bool) -> _Found:
    content = read_json(path)
    if isinstance(content, list):
        return "json", read_json_list(content, path, with_labels=with_labels), {}
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a list of cases or a dataset.json, not a {type(content).__name__}.")
    labels = read_labels(content.get("labels"), path) if with_labels else {}
    if is_nnunet(content):
        return "nnunet", read_nnunet(content, path, with_labels=with_labels), labels
    if isinstance(content.get("cases"), list):
        return "json", read_json_list(content["cases"], path, with_labels=with_labels), labels
    return "msd", read_msd(content, path, with_labels=with_labels), labels
