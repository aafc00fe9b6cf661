"""What a case is, and every form of DATA read into cases: folders, descriptions, lists that users write, one scan."""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mim3d.core.errors import DataError, listed
from mim3d.core.files import read_csv, read_json
from mim3d.core.names import is_file_name, joined_name, printable, same_name, unescaped
from mim3d.core.settings import nearest
from mim3d.datasets.ids import unique_ids
from mim3d.scans.image_stacks import SLICE_SUFFIXES, is_slice, natural
from mim3d.scans.volumes import SUFFIXES, channels_of, find_scans, patient_of, scan_id, suffix_of

#: Columns of a list, and keys of an entry in JSON.
COLUMNS = ("image", "label", "class", "patient", "split", "labels", "id")
SPLITS = ("train", "val", "test")

IMAGE_FOLDERS = ("images", "imagesTr")
LABEL_FOLDERS = ("labels", "labelsTr", "masks")
_NEVER_IMAGES = (*LABEL_FOLDERS, "labelsTs", "labelsVal", "segmentations")
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scan of a data set with what belongs to it; all paths are absolute.

    Attributes:
        id: Name of the case, unique in its set and safe as a file name. It is empty where a source names none, until
            ``to_cases`` fills it in.
        images: One path per channel; a DICOM series counts as one path.
        label: Path of the label map, or None.
        class_name: Class of the whole scan, or None.
        patient: Name of the patient; cases of one patient are never separated by a split. Filled in as the id is.
        split: Declared part, "train", "val" or "test", or None.
        labelled: Labels, by name or value, that the label map has annotations of; None stands for all.
    """

    id: str = ""
    images: tuple[str, ...]
    label: str | None = None
    class_name: str | None = None
    patient: str = ""
    split: str | None = None
    labelled: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A case that cannot be used.

    Attributes:
        case: The case.
        reason: Why, in a sentence that names the file.
        lacking: Whether it lacks a label map or class rather than holding a bad file; then no split counts it.
    """

    case: Case
    reason: str
    lacking: bool = False


@dataclass(frozen=True, kw_only=True)
class CaseSet:
    """All cases of one data set.

    Attributes:
        root: Folder or list that the cases come from.
        form: "folder", "pairs", "msd", "nnunet", "csv", "json", "preset", "list" or "slices".
        cases: The cases in the order of the list, or by path for folders.
        labels: Declared label value -> name, with background 0 included; empty where nothing is declared.
        left_out: Cases that are known to be of no use.
    """

    root: str
    form: str
    cases: tuple[Case, ...]
    labels: dict[int, str]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def unreadable(self) -> tuple[Case, ...]:
        """Cases left out for their files. Splits count them, so that folds stay the same once a file is mended."""
        return tuple(each.case for each in self.left_out if not each.lacking)


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
    form, cases, labels = _read_form(root, not recursive_images_only)
    if recursive_images_only:
        cases = [replace(case, label=None, labelled=None) for case in cases]
    return CaseSet(root=root, form=form, cases=to_cases(cases, root), labels=labels)


def _read_form(path: str, with_labels: bool) -> tuple[str, list[Case], dict[int, str]]:
    """The form of DATA, its cases as declared, and the names of labels that it declares."""
    if os.path.isdir(path):
        description = os.path.join(path, "dataset.json")
        if not os.path.isfile(description):
            pair = pair_folders(path)
            if pair is None:
                return "folder", _read_tree(path), {}
            form = "msd" if pair[0].endswith("imagesTr") and pair[1].endswith("labelsTr") else "pairs"
            return form, _read_pairs(*pair, with_labels), {}
        path = description
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".csv":
        return "csv", _read_csv(path), {}
    if suffix != ".json":
        return "folder", [Case(images=(path,))], {}
    content = read_json(path)
    if isinstance(content, list):
        return "json", _read_json_list(content, path), {}
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a list of cases or a dataset.json, not a {type(content).__name__}.")
    labels = read_labels(content.get("labels"), path) if with_labels else {}
    # Only nnU-Net, from version 2 on, writes these keys.
    if "channel_names" in content or "file_ending" in content:
        return "nnunet", _read_nnunet(content, path), labels
    if isinstance(content.get("cases"), list):
        return "json", _read_json_list(content["cases"], path), labels
    return "msd", _read_msd(content, path), labels


def pair_folders(folder: str) -> tuple[str, str] | None:
    """The image and label subfolders of a folder that has both, as absolute paths; None where one is missing.

    Raises:
        DataError: There are several folders of images or of labels.
    """
    names = {name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))}
    images = [name for name in IMAGE_FOLDERS if name in names]
    labels = [name for name in LABEL_FOLDERS if name in names]
    if not images or not labels:
        return None
    if len(images) > 1 or len(labels) > 1:
        raise DataError(
            f"{folder}: holds {listed(images + labels)}; which belong together is not clear, so keep one folder "
            "of images and one of labels, or write a CSV list with the columns image,label."
        )
    return os.path.join(folder, images[0]), os.path.join(folder, labels[0])


def _read_pairs(image_folder: str, label_folder: str, with_labels: bool) -> list[Case]:
    """Images and labels of the same file name; an image without a label stays unlabelled."""
    images = _group_channels(scans_in(image_folder), image_folder)
    labels = _by_id(scans_in(label_folder), label_folder) if with_labels else {}
    orphans = sorted(set(labels) - set(images))
    if orphans:
        raise DataError(
            f"{label_folder}: no image of the same name in {image_folder} for {listed(orphans)}; a label must be "
            "named like its image."
        )
    return [Case(id=name, images=paths, label=labels.get(name)) for name, paths in images.items()]


def _read_tree(folder: str) -> list[Case]:
    """Every scan in a tree; label folders beside image folders or scans are left out."""
    paths = [path for path in scans_in(folder) if not _is_beside_images(path, folder)]
    if not paths:
        raise DataError(f"{folder}: only label maps in here; give the folder of the images.")
    if re.fullmatch(r"images(Tr|Ts|Val)", os.path.basename(folder)):
        return [Case(id=name, images=files) for name, files in _group_channels(paths, folder).items()]
    return [Case(images=(path,)) for path in paths]


def scans_in(folder: str) -> list[str]:
    """Sorted scans below a folder, without hidden files (``._x.nii.gz``).

    Raises:
        DataError: There is none.
    """
    paths = [path for path in find_scans(folder) if not os.path.basename(path).startswith(".")]
    if not paths:
        raise DataError(f"{folder}: no scan in here; expected {', '.join(SUFFIXES)} or DICOM series.")
    return paths


def _group_channels(paths: Iterable[str], folder: str) -> dict[str, tuple[str, ...]]:
    """Case name -> channel files of one folder, in channel order.

    Names count as channels (``case_0000``, ``case_0001``) only where every file ends in four digits and every
    case has the same channels from 0000 on; otherwise each file is a case.
    """
    named = _by_id(paths, folder)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name, path in named.items():
        match = _CHANNEL.match(name)
        groups[match["case"] if match else name][match["channel"] if match else ""] = path
    channels = {tuple(sorted(group)) for group in groups.values()}
    expected = tuple(f"{index:04d}" for index in range(len(next(iter(channels), ()))))
    if channels != {expected}:
        return {name: (path,) for name, path in named.items()}
    return {case: tuple(group[channel] for channel in expected) for case, group in groups.items()}


def _by_id(paths: Iterable[str], folder: str) -> dict[str, str]:
    """Scans of a folder by their names.

    Raises:
        DataError: Two have the same name.
    """
    named: dict[str, str] = {}
    for path in paths:
        other = named.setdefault(scan_id(path), path)
        if other != path:
            raise DataError(f"{folder}: {other} and {path} have the same name; rename or move one.")
    return named


def _is_beside_images(path: str, root: str) -> bool:
    """Whether a folder of labels, with images next to it, lies between the root and this file."""
    folder = os.path.dirname(path.split("::")[0])
    while len(folder) > len(root):
        parent, name = os.path.split(folder)
        if name in _NEVER_IMAGES and any(
            other != name and (re.match(r"images($|T[rs]$|Val$)", other) or suffix_of(other))
            for other in os.listdir(parent)
        ):
            return True
        folder = parent
    return False


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
    cases = []
    for folder, names, found in os.walk(top):
        names[:] = sorted((name for name in names if not name.startswith(".")), key=natural)
        if not any(is_slice(name) for name in found):
            continue
        parts = [printable(part) for part in os.path.relpath(folder, top).split(os.sep)]
        if len(parts) < 2:
            raise DataError(
                f"{folder}: images lie here, but a scan needs a folder of its own in that of its class "
                "(class/patient/scan/1.png); move them, or give the folder above."
            )
        cases.append(Case(images=(folder,), class_name=parts[0], patient=parts[1], id=joined_name(parts)))
    if not cases:
        raise DataError(
            f"{top}: no folder of slices; expected images ({', '.join(SLICE_SUFFIXES)}) as class/patient/scan/1.png."
        )
    return CaseSet(root=top, form="slices", cases=to_cases(cases, top), labels={})


def read_table(path: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The column names of a CSV file, and its rows, each with its place in words for messages; blank rows are skipped.

    Raises:
        DataError: The file cannot be read as CSV.
    """
    (_, header), *rows = read_csv(path) or [(0, [])]
    return [name.strip() for name in header], [(f"{path}, line {line}", row) for line, row in rows]


def _read_csv(path: str) -> list[Case]:
    """Cases of a CSV list; paths are relative to the list's folder, ``;`` separates channels."""
    header, rows = read_table(path)
    _check_columns(header, path)
    cases = {}
    for where, row in rows:
        if len(row) > len(header):
            raise DataError(f"{where}: {len(row)} cells but {len(header)} columns; quote cells that hold a comma.")
        cases[where] = _listed_case(dict(zip(header, row, strict=False)), where, path)
    return _checked(cases, path)


def _read_json_list(items: Sequence[Any], path: str) -> list[Case]:
    """Cases of a JSON list of objects with the same keys as the CSV columns; ``image`` may be a list."""
    cases = {}
    for number, item in enumerate(items, start=1):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict):
            raise DataError(f'{where}: must be an object like {{"image": "scan.nii.gz"}}.')
        _check_columns(list(item), where)
        cases[where] = _listed_case(item, where, path)
    return _checked(cases, path)


def _check_columns(names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in COLUMNS:
            raise DataError(f"{where}: unknown column {name!r}.{nearest(name, COLUMNS)}")
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name!r} appears twice.")
    if "image" not in names:
        raise DataError(f"{where}: no column 'image'; known columns are {', '.join(COLUMNS)}.")


def _listed_case(row: Mapping[str, Any], where: str, path: str) -> Case:
    """One row; lists within a cell are separated by ``;``, in JSON they may be lists."""

    def text(column: str) -> str:
        value = row.get(column)
        return "" if value is None else str(value).strip()

    def texts(column: str) -> list[str]:
        value = row.get(column) or ""
        return [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(";"))]

    listed_images = row.get("image")
    images = tuple(map(str, listed_images)) if isinstance(listed_images, list) else channel_names(text("image"), path)
    label, split = text("label"), text("split")
    if not images or not all(name.strip() for name in images):
        raise DataError(f"{where}: no image; every case needs one.")
    if split and split not in SPLITS:
        raise DataError(f"{where}: unknown split {split!r}.{nearest(split, SPLITS)}")
    return Case(
        images=tuple(_beside(path, name) for name in images),
        label=_beside(path, label) if label else None,
        class_name=printable(text("class")) or None,
        patient=printable(text("patient")),
        split=split or None,
        id=text("id"),
        labelled=tuple(printable(name) for name in texts("labels") if name) or None,
    )


def _checked(cases: Mapping[str, Case], path: str) -> list[Case]:
    """The cases, of which there must be some, with declared ids that can be names of files of their own."""
    if not cases:
        raise DataError(f"{path}: lists no cases; add at least one row with an image.")
    first: dict[str, str] = {}
    for where, name in ((where, case.id) for where, case in cases.items() if case.id):
        if not is_file_name(name):
            raise DataError(f"{where}: the id {name!r} cannot be the name of a file; use letters, digits, _ and -.")
        # Case is ignored, as some file systems do.
        other = first.setdefault(same_name(name), where)
        if other != where:
            raise DataError(
                f"{where}: the id {name!r} is that of an earlier row ({cases[other].id}); give every case its own."
            )
    return list(cases.values())


def _read_msd(description: Mapping[str, Any], path: str) -> list[Case]:
    """The ``training`` entries of a Decathlon dataset.json; files named ``._x`` are skipped."""
    training = description.get("training")
    if not isinstance(training, list) or not training:
        raise DataError(f'{path}: needs a list "training" of entries like {{"image": ..., "label": ...}}.')
    in_one_file = len(description.get("modality") or ()) > 1
    cases = []
    for number, item in enumerate(training, start=1):
        item = {"image": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not item.get("image"):
            raise DataError(f'{path}: entry {number} of "training" has no "image".')
        named = item["image"] if isinstance(item["image"], list) else [item["image"]]
        if any(os.path.basename(str(name)).startswith("._") for name in named):
            continue
        images = tuple(_beside(path, name) for name in named)
        case_id = ""
        channels = _channel_files(images[0])
        if channels:
            case_id = os.path.basename(images[0]).removesuffix(suffix_of(images[0]))
            images = channels if len(images) == 1 else images
        elif in_one_file and len(images) == 1 and os.path.isfile(images[0]):
            images = channels_of(images[0])
        label = item.get("label")
        cases.append(Case(id=case_id, images=images, label=_beside(path, label) if label else None))
    return cases


def _channel_files(path: str) -> tuple[str, ...]:
    """nnU-Net 1 lists ``x.nii.gz`` for the files ``x_0000.nii.gz``, ``x_0001.nii.gz``, ...; else nothing."""
    folder, name = os.path.split(path)
    suffix = suffix_of(name)
    stem = name.removesuffix(suffix)
    channels = (os.path.join(folder, f"{stem}_{channel:04d}{suffix}") for channel in itertools.count())
    return () if os.path.exists(path) else tuple(itertools.takewhile(os.path.exists, channels))


def _read_nnunet(description: Mapping[str, Any], path: str) -> list[Case]:
    """The cases of an nnU-Net raw folder: ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``."""
    cases = []
    if isinstance(description.get("dataset"), dict):
        for case_id, item in description["dataset"].items():
            if not isinstance(item, dict) or not isinstance(item.get("images"), list) or not item["images"]:
                raise DataError(f'{path}: case {case_id!r} of "dataset" needs a list "images".')
            images = tuple(_beside(path, name) for name in item["images"])
            label = item.get("label")
            cases.append(Case(id=str(case_id), images=images, label=_beside(path, label) if label else None))
        return cases
    ending = str(description.get("file_ending", ".nii.gz"))
    num_channels = len(description.get("channel_names") or {"0": ""})
    image_folder = os.path.join(os.path.dirname(path), "imagesTr")
    names = sorted(os.listdir(image_folder)) if os.path.isdir(image_folder) else []
    first = f"_0000{ending}"
    ids = [name.removesuffix(first) for name in names if name.endswith(first) and not name.startswith(".")]
    if not ids:
        raise DataError(f"{image_folder}: no image named CASE{first}, as {path} says.")
    for case_id in ids:
        channels = [f"{case_id}_{channel:04d}{ending}" for channel in range(num_channels)]
        missing = sorted(set(channels) - set(names))
        if missing:
            raise DataError(f"{image_folder}: case {case_id} lacks {listed(missing)} of {num_channels} channels.")
        images = tuple(os.path.join(image_folder, name) for name in channels)
        label = _beside(path, os.path.join("labelsTr", case_id + ending))
        cases.append(Case(id=case_id, images=images, label=label if os.path.exists(label) else None))
    return cases


def _beside(path: str, name: object) -> str:
    """The absolute path of a file that a list or description names relative to its own folder.

    Letters may be composed otherwise there than on this disk, and control characters written as escapes.
    """
    folder, text = os.path.dirname(path), str(name)
    forms = (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")), unescaped(text))
    places = [os.path.abspath(os.path.join(folder, form)) for form in dict.fromkeys(forms)]
    return next((place for place in places if is_there(place)), places[0])


def channel_names(cell: str, path: str) -> tuple[str, ...]:
    """The images that a cell of a list names; ``;`` separates channels, unless it belongs to the name of a file.

    Args:
        cell: Names of images, relative to the folder of the list.
        path: The list.
    """
    parts, names = cell.split(";"), []
    while parts:
        wholes = [";".join(parts[:count]).strip() for count in range(1, len(parts) + 1)]
        there = (count for count, whole in enumerate(wholes, start=1) if whole and is_there(_beside(path, whole)))
        count = next(there, 1)
        names.append(wholes[count - 1])
        parts = parts[count:]
    return tuple(names)


def is_there(address: str) -> bool:
    """Whether the file or folder of a scan's address exists."""
    return os.path.exists(address.split("::")[0])


def read_labels(declared: Any, path: str) -> dict[int, str]:
    """Label value -> name, from ``{"1": "liver"}`` (Decathlon) or ``{"liver": 1}`` (nnU-Net), 0 included.

    A nnU-Net region (``"tumour": [1, 2]``) names no single value; its values are declared as ``label_1`` ...

    Args:
        declared: The entry "labels" of a dataset.json; None stands for no labels.
        path: Path of the file, for messages.

    Raises:
        DataError: The labels have neither form, a value is outside 0 to 65535, or one value has two names.
    """
    if declared is None:
        return {}
    if not isinstance(declared, dict):
        raise DataError(f'{path}: "labels" must map values to names, not be a {type(declared).__name__}.')

    def value_of(written: Any) -> int:
        try:
            number = int(written)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number <= 65535:
            raise DataError(f"{path}: label value {written!r} is not a whole number from 0 to 65535.")
        return number

    labels: dict[int, str] = {}
    regions: set[int] = set()
    for key, value in declared.items():
        if isinstance(value, list):
            regions.update(map(value_of, value))
            continue
        number, name = (value_of(key), value) if str(key).isdigit() else (value_of(value), key)
        if number in labels:
            raise DataError(f"{path}: label value {number} has two names, {labels[number]!r} and {name!r}.")
        labels[number] = printable(str(name))
    labels |= {number: f"label_{number}" for number in regions - set(labels)}
    labels.setdefault(0, "background")
    return dict(sorted(labels.items()))


def to_cases(declared: Sequence[Case], root: str) -> tuple[Case, ...]:
    """Give every case that a source declares its id, see ``unique_ids``, and its patient.

    The patient is the declared one, else the salted hash of a DICOM series, else the id.

    Raises:
        DataError: The same image is listed twice, or two cases would share an id.
    """
    first_row: dict[tuple[str, ...], int] = {}
    for row, case in enumerate(declared, start=1):
        first = first_row.setdefault(case.images, row)
        if first != row:
            raise DataError(
                f"{root}: entries {first} and {row} are the same image {case.images[0]}; list every image once."
            )
    return tuple(
        replace(case, id=case_id, patient=case.patient or _dicom_patient(case.images[0]) or case_id)
        for case_id, case in zip(unique_ids(declared, root), declared, strict=True)
    )


def _dicom_patient(path: str) -> str | None:
    """The hashed patient of a DICOM series; other files hold no patient worth opening them for."""
    try:
        return patient_of(path) if "::" in path or os.path.isdir(path) else None
    except DataError:
        return None
