"""What a case is, and every form of DATA read into cases: folders, descriptions, lists that users write, one scan."""

import os
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.files import read_json
from mim3d.core.names import file_name, is_file_name, joined_name, number_of, printable, same_name
from mim3d.core.settings import nearest
from mim3d.datasets.descriptions import read_description, read_folds
from mim3d.datasets.ids import endings_apart, unique_ids
from mim3d.datasets.label_maps import sort_tree
from mim3d.datasets.lists import Entry, beside, channel_names, read_list, tables_not_read, told_classes
from mim3d.datasets.mistaken import not_scans, sets_of_labels
from mim3d.datasets.patients import described, patients_by_pattern, patients_of_folders, patients_of_names
from mim3d.scans.files import PREDICTIONS_MARK
from mim3d.scans.image_stacks import SLICE_SUFFIXES, is_slice, natural
from mim3d.scans.modality import declared_modality, modality_of_channels
from mim3d.scans.volumes import SUFFIXES, find_scans, patient_of, scan_id, suffix_of

SPLITS = ("train", "val", "test")

#: Other names of the parts of a data set, in lists.
_OTHER_SPLITS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}

IMAGE_FOLDERS = ("images", "imagesTr")
LABEL_FOLDERS = ("labels", "labelsTr", "masks")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz")
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
        fold: Declared number of the fold that holds the case out, or None.
        modality: What made the images, as a list declares it, such as "CT"; None where nothing says so.
    """

    id: str = ""
    images: tuple[str, ...]
    label: str | None = None
    class_name: str | None = None
    patient: str = ""
    split: str | None = None
    labelled: tuple[str, ...] | None = None
    fold: int | None = None
    modality: str | None = None


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
        ignore_label: Declared value of voxels that nothing is known of; it is none of ``labels``.
        regions: Declared unions of labels, name -> label values, in their order; empty where there are none.
        region_values: Declared label value that each region gives in predictions, or None.
        channels: Declared names of the images of every case, such as "CT"; empty where nothing is declared.
        notes: What was said when the set was read: what was passed over, and what contradicts itself.
    """

    root: str
    form: str
    cases: tuple[Case, ...]
    labels: dict[int, str]
    left_out: tuple[LeftOut, ...] = ()
    ignore_label: int | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    region_values: tuple[int, ...] | None = None
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def unreadable(self) -> tuple[Case, ...]:
        """Cases left out for their files. Splits count them, so that folds stay the same once a file is mended."""
        return tuple(each.case for each in self.left_out if not each.lacking)

    @property
    def label_values(self) -> dict[int, str]:
        """Every value that a label map may hold -> name: the labels and the ignored value."""
        return with_ignored(self.labels, self.ignore_label)

    @property
    def label_sets(self) -> tuple[str, ...]:
        """Folders of the data sets that label maps come from, where the root is a folder around data sets."""
        return sets_of_labels(self.root, [case.label for case in self.cases if case.label is not None])


def with_ignored(labels: Mapping[int, str], ignore_label: int | None) -> dict[int, str]:
    """Label value -> name, with that of the ignored value."""
    return {**labels} if ignore_label is None else {**labels, ignore_label: "ignore"}


def read_cases(
    data: str | Path,
    *,
    recursive_images_only: bool = False,
    modality: str | None = None,
    patient_pattern: str | None = None,
    channels: Sequence[str] = (),
) -> CaseSet:
    """Read any form of DATA; nothing but names, lists and headers is opened, and what may be a label map among scans.

    What a set declares and nothing uses is named in one warning; so are label maps that lie among scans, which are
    never taken for scans.

    Known forms: a folder of scans or DICOM series at any depth, with label maps beside them as KiTS, BraTS or
    AbdomenAtlas have them; a folder with ``images`` or ``imagesTr`` beside
    ``labels``, ``labelsTr`` or ``masks`` holding files of the same names; a Medical Segmentation Decathlon folder or
    its ``dataset.json``; an nnU-Net raw folder, with the folds of a ``splits_final.json`` in it; a MONAI list with
    folds; a CSV (separated by commas, ``;`` or tabs) or JSON list with the columns image, label, class, patient, split,
    labels, id, fold and modality; a ``.txt`` with an image in each line; a single scan.

    Args:
        data: The folder, list or scan.
        recursive_images_only: Leave out all labels (and never take a label map for a scan).
        modality: What made all images, such as CT; one for each channel separated by ``;``. It goes before what the
            set declares.
        patient_pattern: Regular expression that finds the patient in the name of a case.
        channels: What the images of a case are to be, such as ``t1c`` and ``t2f``: images of a tree that are called so
            are one case, where labels are left out. With labels, the label maps say what belongs together.

    Raises:
        ConfigError: The pattern is no regular expression, or ``modality`` names none.
        DataError: Nothing is there, nothing in it is readable, a list contradicts itself, or the pattern finds nothing.
    """
    root = os.path.abspath(data)
    if not os.path.exists(root):
        raise DataError(f"{data}: no such file or folder; check the path, or name the place where the scans lie now.")
    found = _read_form(root, not recursive_images_only, channels)
    cases = found.cases
    if recursive_images_only:
        cases = tuple(replace(case, label=None, labelled=None) for case in cases)
    # What a list says of a case itself goes before what its set says.
    of_set = declared_modality(found.channels)
    found = _with_modality(replace(found, cases=to_cases(cases, root)), modality, of_set)
    found = _with_patients(found, patient_pattern)
    if alike := [found.cases[row].images[0] for row in endings_apart(found.cases)]:
        share = number_of(len(alike), "scan", "share")
        said = f"{share} the name of another but for its ending, and may be copies: {listed(alike)}."
        found = replace(found, notes=(*found.notes, f"{found.root}: {said} Remove those that are."))
    if found.form in ("msd", "nnunet"):
        found = _with_folds(found)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found


def _with_modality(found: CaseSet, said: str | None, channels: str | None) -> CaseSet:
    """The cases with what is declared of each; what declares nothing is noted, or refused where the user says it.

    Raises:
        ConfigError: What the user says is no modality, or not one for each channel.
    """
    unused: dict[str, Case] = {}
    for case in found.cases:
        declared = said or case.modality
        if declared and None in modality_of_channels(declared, len(case.images)):
            unused.setdefault(declared, case)
    for declared, case in unused.items():
        if said:
            raise ConfigError(
                f"modality {declared!r} is not known, or not one for each of the {len(case.images)} channels of "
                f"{case.id}; use CT, MR, PT, US or another of DICOM's, one for all channels or one for each, such as "
                '"CT;PT".'
            )
    notes = found.notes
    if unused:
        notes += (
            f"{found.root}: modality {listed(list(unused))} says nothing that mim3d knows (CT, MR, PT, US and others "
            "of DICOM's, one for each channel); headers and voxels decide what these scans are.",
        )
    cases = tuple(replace(case, modality=said or case.modality or channels) for case in found.cases)
    return replace(found, cases=cases, notes=notes)


def _with_patients(found: CaseSet, pattern: str | None) -> CaseSet:
    """The cases with the patients that a pattern or the regularity of their names gives to those that name none."""
    names = [case.id for case in found.cases if pattern is not None or case.patient == case.id]
    patients = patients_of_names(names) if pattern is None else patients_by_pattern(names, pattern)
    cases = tuple(replace(case, patient=patients.get(case.id, case.patient)) for case in found.cases)
    notes = (f"{found.root}: {described(patients)}",) if patients and pattern is None else ()
    return replace(found, cases=cases, notes=(*found.notes, *notes))


def _read_form(path: str, with_labels: bool, channels: Sequence[str]) -> CaseSet:
    """The cases of DATA as they are declared, with what is declared of all of them."""

    def plain(form: str, cases: Iterable[Case], notes: tuple[str, ...] = ()) -> CaseSet:
        return CaseSet(root=path, form=form, cases=tuple(cases), labels={}, notes=notes)

    description = os.path.join(path, "dataset.json") if os.path.isdir(path) else path
    if os.path.isdir(path) and not os.path.isfile(description):
        found = _read_folder(path, with_labels, channels)
        return replace(found, notes=(*found.notes, *tables_not_read(path)))
    suffix = os.path.splitext(description)[1].lower()
    if suffix in (".csv", ".tsv", ".txt"):
        entries, notes = read_list(path)
        entries, said = told_classes(entries, path)
        return plain("csv", _listed_cases(entries, path), (*notes, *said))
    if suffix != ".json":
        return plain("folder", [Case(images=(path,))])
    declared = read_description(read_json(description), description, with_labels=with_labels)
    entries, said = told_classes(declared.entries, description, declared.labels.names)
    return CaseSet(
        root=path,
        form=declared.form,
        cases=tuple(_listed_cases(entries, description, check_ids=declared.form != "nnunet")),
        labels={} if said else declared.labels.names,
        ignore_label=declared.labels.ignore_label,
        regions=declared.labels.regions,
        region_values=declared.labels.region_values,
        channels=declared.channels,
        notes=(*(note for note in declared.notes if not said or note not in declared.labels.notes), *said),
    )


def _read_folder(folder: str, with_labels: bool, channels: Sequence[str]) -> CaseSet:
    """A folder that nothing describes: images beside labels, or a tree."""
    pair = pair_folders(folder)
    if pair is None:
        return _read_tree(folder, with_labels, channels)
    cases = _read_pairs(*pair, with_labels)
    if not cases:
        return _read_unlike_pairs(folder, *pair, with_labels=with_labels)
    form = "msd" if pair[0].endswith("imagesTr") and pair[1].endswith("labelsTr") else "pairs"
    return CaseSet(root=folder, form=form, cases=tuple(cases), labels={}, notes=_folders_not_read(folder, pair))


def _with_folds(found: CaseSet) -> CaseSet:
    """A data set with the folds of the ``splits_final.json`` beside its description, where it declares none itself."""
    if any(case.fold is not None or case.split == "val" for case in found.cases):
        return found
    description = os.path.join(found.root, "dataset.json") if os.path.isdir(found.root) else found.root
    folds = read_folds(description, [case.id for case in found.cases])
    cases = tuple(
        replace(case, fold=folds.fold.get(case.id), split="test" if case.id in folds.unlisted else case.split)
        for case in found.cases
    )
    return replace(found, cases=cases, notes=(*found.notes, *folds.notes))


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
    """Images and labels of the same file name, in the same subfolder where several have it.

    An image without a label stays unlabelled. A label without an image is a case whose image is missing: it is left out
    when headers are read. There are no cases where no label is named like an image.
    """
    images = _group_channels(scans_in(image_folder), image_folder)
    labels = _by_place(scans_in(label_folder), label_folder) if with_labels else {}
    stems = {place: _stem_of(place, files[0])[0] for place, files in images.items()}
    if twice := [path for place, path in labels.items() if _stem_of(place, path)[1] and place not in images]:
        raise DataError(f"{label_folder}: {' and '.join(twice[:2])} have the same name; rename or move one.")
    # Without labels the names of files are enough.
    names = {_name_of(_stem_of(place, path)[0]) for place, path in labels.items()} or {
        scan_id(name) for _, _, files in os.walk(label_folder) for name in files if suffix_of(name)
    }
    if names and names.isdisjoint(map(_name_of, stems.values())):
        return []
    label_of = {place: labels.pop(place) for place in images if place in labels}
    # Copies of a scan under another ending share its label map.
    label_of |= {place: labels[stem] for place, stem in stems.items() if stem != place and stem in labels}
    used = set(label_of.values())
    labels = {place: path for place, path in labels.items() if path not in used}
    by_name, left = (_by_name(places) for places in (images.keys() - label_of.keys(), labels))
    label_of |= {by_name[name]: labels.pop(left[name]) for name in by_name.keys() & left.keys()}
    for place, label in labels.items():
        images[place] = (os.path.join(image_folder, os.path.relpath(label, label_folder)),)
    label_of |= labels
    stems |= {place: place for place in images.keys() - stems.keys()}
    return [Case(id=_name_of(stems[place]), images=paths, label=label_of.get(place)) for place, paths in images.items()]


def _name_of(place: str) -> str:
    return file_name(os.path.basename(place))


def _by_name(places: Iterable[str]) -> dict[str, str]:
    """Places by the name that no other of them has."""
    found: dict[str, list[str]] = defaultdict(list)
    for place in places:
        found[_name_of(place)].append(place)
    return {name: each[0] for name, each in found.items() if len(each) == 1}


def _read_unlike_pairs(folder: str, image_folder: str, label_folder: str, *, with_labels: bool) -> CaseSet:
    """Images and labels of different names, such as ``P1__CT`` and ``P1``.

    Raises:
        DataError: Nothing tells which belong together.
    """
    found = _read_tree(folder, with_labels)
    if with_labels and not any(case.label for case in found.cases):
        raise DataError(
            f"{label_folder}: no image of the same name in {image_folder} for "
            f"{listed(sorted(map(scan_id, scans_in(label_folder))))}; a label must be named like its image."
        )
    return found


def _folders_not_read(folder: str, pair: tuple[str, str]) -> tuple[str, ...]:
    """What is said of images and labels beside the folders that are read; scans to test on stay out without a word."""
    read = [os.path.basename(each) for each in pair]
    others = [
        name
        for name in sorted(os.listdir(folder))
        if re.fullmatch(r"(?i)(images|labels|masks)[_-]?(va|val|valid|validation|un|unlabell?ed)", name)
        and os.path.isdir(os.path.join(folder, name))
    ]
    if not others:
        return ()
    return (
        f"{folder}: {listed(others)} not read beside {listed(read)}; to hold them out or learn from them, list all "
        "cases in a CSV with the columns image,label,split.",
    )


def _read_tree(folder: str, with_labels: bool, channels: Sequence[str] = ()) -> CaseSet:
    """Every scan in a tree, with the label maps that belong to them; other label maps are left out."""
    paths = scans_in(folder)
    if re.fullmatch(r"images(Tr|Ts|Val)", os.path.basename(folder)):
        groups = _group_channels(paths, folder)
        cases = tuple(Case(id=_name_of(_stem_of(place, files[0])[0]), images=files) for place, files in groups.items())
        return CaseSet(root=folder, form="folder", cases=cases, labels={})
    found = sort_tree(paths, folder, with_labels=with_labels, channels=channels)
    patients = patients_of_folders([case.images[0] for case in found.cases], folder)
    has_labels, notes = any(case.label for case in found.cases), found.notes
    if with_labels and not has_labels:
        predicted = sorted(
            place for place, _, names in os.walk(folder) if PREDICTIONS_MARK in names and place != folder
        )
        if predicted:
            notes += (
                f"{listed(predicted)}: predictions are not read; to learn from them, list them in a CSV as label.",
            )
    return CaseSet(
        root=folder,
        form="pairs" if has_labels else "folder",
        cases=tuple(
            Case(id=c.name, images=c.images, label=c.label, patient=patients.get(c.images[0], c.patient))
            for c in found.cases
        ),
        labels={},
        channels=found.channels,
        notes=notes,
    )


def scans_in(folder: str, *, with_predictions: bool = False) -> list[str]:
    """Sorted scans below a folder, without hidden files (``._x.nii.gz``).

    Args:
        folder: The folder.
        with_predictions: Whether those in folders of predictions below it are among them.

    Raises:
        DataError: There is none.
    """
    found = find_scans(folder, with_predictions=with_predictions)
    paths = [path for path in found if not os.path.basename(path).startswith(".")]
    if not paths:
        packed = [name for _, _, names in os.walk(folder) for name in names if name.lower().endswith(_ARCHIVES)]
        hint = f" Archives are not opened; unpack {listed(sorted(packed), 3)} first." if packed else ""
        raise DataError(
            f"{folder}: no scan in here; expected {', '.join(SUFFIXES)} or DICOM series.{hint or not_scans(folder)}"
        )
    return paths


def _group_channels(paths: Iterable[str], folder: str) -> dict[str, tuple[str, ...]]:
    """Place of a case in one folder -> its channel files, in channel order.

    Names count as channels (``case_0000``, ``case_0001``) only where every file ends in four digits and every
    case has the same channels from 0000 on; otherwise each file is a case.
    """
    named = _by_place(paths, folder)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for place, path in named.items():
        name, ending = _stem_of(place, path)
        match = _CHANNEL.match(name)
        groups[(match["case"] if match else name) + ending][match["channel"] if match else ""] = path
    channels = {tuple(sorted(group)) for group in groups.values()}
    expected = tuple(f"{index:04d}" for index in range(len(next(iter(channels), ()))))
    if channels != {expected}:
        twice = [place for place, path in named.items() if _stem_of(place, path)[1]]
        if twice and any(len(group) > 1 for group in groups.values()):
            raise DataError(f"{folder}: {listed(twice)} have the same name but for the ending; rename or move one.")
        return {name: (path,) for name, path in named.items()}
    return {case: tuple(group[channel] for channel in expected) for case, group in groups.items()}


def _by_place(paths: Iterable[str], folder: str) -> dict[str, str]:
    """Scans of a folder by their places in it, without suffixes where these are not what tells two of them apart.

    Raises:
        DataError: Two have the same name.
    """
    files: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        place = os.path.relpath(path, folder)
        files[unicodedata.normalize("NFC", place.removesuffix(suffix_of(place)))].append(path)
    named: dict[str, str] = {}
    for place, found in files.items():
        for path in found:
            other = named.setdefault(place + suffix_of(path) if len(found) > 1 else place, path)
            if other != path:
                raise DataError(f"{folder}: {other} and {path} have the same name; rename or move one.")
    return named


def _stem_of(place: str, path: str) -> tuple[str, str]:
    """A place of ``_by_place`` without suffix, and the suffix where it has one."""
    ending = suffix_of(path)
    return (place.removesuffix(ending), ending) if place.endswith(ending) else (place, "")


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


def _listed_cases(entries: Mapping[str, Entry], path: str, *, check_ids: bool = True) -> list[Case]:
    """The cases of a list, of which there must be some; ids that a user chose can be names of files of their own."""
    if not entries:
        raise DataError(f"{path}: lists no cases; add at least one row with an image.")
    cases = {where: _listed_case(entry, where, path) for where, entry in entries.items()}
    first: dict[str, str] = {}
    for where, name in ((where, case.id) for where, case in cases.items() if case.id and check_ids):
        if not is_file_name(name):
            raise DataError(f"{where}: the id {name!r} cannot be the name of a file; use letters, digits, _ and -.")
        # Case is ignored, as some file systems do.
        other = first.setdefault(same_name(name), where)
        if other != where:
            raise DataError(
                f"{where}: the id {name!r} is that of an earlier row ({cases[other].id}); give every case its own."
            )
    return list(cases.values())


def _listed_case(entry: Entry, where: str, path: str) -> Case:
    """What a list declares of one case."""

    def text(column: str) -> str:
        value = entry.get(column)
        if isinstance(value, (list, dict)):
            raise DataError(f"{where}: {column!r} must be one value, not {value!r}.")
        return "" if value is None else str(value).strip()

    def texts(column: str) -> list[str]:
        value = entry.get(column) or ""
        return [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(";"))]

    listed_images = entry.get("image")
    images = tuple(map(str, listed_images)) if isinstance(listed_images, list) else channel_names(text("image"), path)
    label, split, fold = text("label"), text("split").lower(), text("fold")
    split = _OTHER_SPLITS.get(split, split)
    if not images or not all(name.strip() for name in images):
        raise DataError(f"{where}: no image; every case needs one.")
    if isinstance(entry.get("label"), (int, float)):
        raise DataError(f'{where}: the label {label} is no file; if it is the class of the scan, call it "class".')
    if split and split not in SPLITS:
        raise DataError(f"{where}: unknown split {split!r}.{nearest(split, SPLITS)}")
    if fold and not re.fullmatch(r"\d{1,6}(\.0)?", fold):
        raise DataError(f"{where}: the fold {fold!r} is no whole number from 0.")
    return Case(
        images=tuple(beside(path, name) for name in images),
        label=beside(path, label) if label else None,
        class_name=printable(text("class")) or None,
        patient=printable(text("patient")),
        split=split or None,
        id=text("id"),
        labelled=tuple(printable(name) for name in texts("labels") if name) or None,
        fold=int(float(fold)) if fold else None,
        modality=printable(";".join(name for name in texts("modality") if name)) or None,
    )


def to_cases(declared: Sequence[Case], root: str) -> tuple[Case, ...]:
    """Give every case that a source declares its id, see ``unique_ids``, and its patient.

    The patient is the declared one, else the salted hash of a DICOM series, else the id without the ending that tells
    two files of one name apart.

    Raises:
        DataError: The same image is listed twice.
    """
    first_row: dict[tuple[str, ...], int] = {}
    for row, case in enumerate(declared, start=1):
        first = first_row.setdefault(case.images, row)
        if first != row:
            raise DataError(
                f"{root}: entries {first} and {row} are the same image {case.images[0]}; list every image once."
            )
    apart = endings_apart(declared)
    ids = enumerate(unique_ids(declared, root))
    names = [(case_id, case_id.removesuffix(f"_{apart[row]}") if row in apart else case_id) for row, case_id in ids]
    return tuple(
        replace(case, id=case_id, patient=case.patient or _dicom_patient(case.images[0]) or patient)
        for (case_id, patient), case in zip(names, declared, strict=True)
    )


def _dicom_patient(path: str) -> str | None:
    """The hashed patient of a DICOM series; other formats are known by their names, and not opened."""
    try:
        return patient_of(path)
    except DataError:
        return None
