"""What a data set says of itself in a dataset.json: Decathlon, MONAI and nnU-Net lists of cases, labels and folds."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mim3d.core.errors import DataError, listed
from mim3d.core.files import read_json
from mim3d.core.names import number_of, printable
from mim3d.datasets.lists import Entry, beside, read_columns, said_of_guesses
from mim3d.scans.volumes import channels_of, scan_id, suffix_of

#: Keys that lists of cases stand under, and the part of the data set that each declares.
LISTS = {
    "training": None,
    "train": None,
    "validation": "val",
    "valid": "val",
    "val": "val",
    "test": "test",
    "testing": "test",
}

#: Keys that are read, by form.
_READ = {
    "nnunet": {"labels", "regions_class_order", "channel_names", "modality", "file_ending", "dataset", "numTraining"},
    "json": {"labels", "regions_class_order", "channel_names", "modality", "cases", "numTraining"},
    "msd": {"labels", "regions_class_order", "channel_names", "modality", "numTraining", *LISTS},
}

#: Keys that say nothing about how the cases are to be used; ``relase`` is how the Decathlon spells it.
_IRRELEVANT = set(
    "name dataset_name description reference references licence license release relase version date author authors "
    "citation url contact converted_by tensorimagesize numtest numvalidation quantitative "
    "overwrite_image_reader_writer image_reader_writer".split()
)

#: Names of channels by which nnU-Net chooses a mapping of intensities that mim3d has not.
_OTHER_MAPPINGS = {"nonorm", "rescale_to_0_1", "rescale_0_1", "rgb_to_0_1"}

#: The label of voxels that nothing is known of, as nnU-Net names it.
IGNORE = "ignore"

#: What label value 0 is called.
_BACKGROUND = ("background", "bg", "none", "air", "clear label", "0", "label_0")


@dataclass(frozen=True, kw_only=True)
class LabelDeclaration:
    """What the values of label maps stand for.

    Attributes:
        names: Label value -> name with background 0; empty where nothing is declared. The ignored value is none of
            them.
        regions: Name -> label values of structures that may lie in one another, in their order; empty without.
        region_values: Label value that each region gives in predictions; None where that is not declared.
        ignore_label: Label value of voxels that nothing is known of.
        notes: What is to be said of it.
    """

    names: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    region_values: tuple[int, ...] | None = None
    ignore_label: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Description:
    """A description of a data set, read in full.

    Attributes:
        form: "msd", "nnunet" or "json".
        entries: Where a case is declared, for messages -> what is declared of it, by the columns of a list.
        labels: What the values of label maps stand for.
        channels: What each image of a case is, such as "CT"; empty where that is not declared.
        notes: What is to be said of the description: what it declares and nothing uses, and what contradicts the files.
    """

    form: str
    entries: dict[str, Entry]
    labels: LabelDeclaration
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_description(content: Any, path: str, *, with_labels: bool = True) -> Description:
    """Read the content of a JSON file that describes a data set.

    Args:
        content: The content: a list of cases, or an object as the Decathlon, MONAI or nnU-Net write it.
        path: Path of the file; the paths in it are relative to its folder.
        with_labels: Whether it matters what the values of label maps stand for.

    Raises:
        DataError: The content is no description, or contradicts itself.
    """
    if isinstance(content, list):
        keys = _Keys()
        entries = _json_entries(content, path, keys)
        return Description(form="json", entries=entries, labels=LabelDeclaration(), notes=keys.notes(path))
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a list of cases or a dataset.json, not a {type(content).__name__}.")
    channels = _read_channels(content, path)
    keys = _Keys()
    # Only nnU-Net, from version 2 on, writes these keys.
    if "channel_names" in content or "file_ending" in content:
        form = "nnunet"
        entries, notes = _read_nnunet(content, path, len(channels), keys)
    elif isinstance(content.get("cases"), list):
        form, notes = "json", []
        entries = _json_entries(content["cases"], path, keys)
    else:
        form, notes = "msd", []
        entries = _read_msd(content, path, len(channels), keys)
    keys.unused[:0] = [
        printable(str(key)) for key in content if key not in _READ[form] and str(key).lower() not in _IRRELEVANT
    ]
    number = sum(entry.get("split") is None for entry in entries.values())
    declared = content.get("numTraining")
    if isinstance(declared, int) and declared != number:
        notes.append(f"{path}: numTraining is {declared}, but it lists {number_of(number, 'case')} to train on.")
    labels = LabelDeclaration()
    if with_labels:
        labels = read_labels(content.get("labels"), path, content.get("regions_class_order"))
    if with_labels and not labels.regions and content.get("regions_class_order") is not None:
        keys.unused.append("regions_class_order")
    mappings = [name for name in channels if name.lower() in _OTHER_MAPPINGS]
    if mappings:
        notes.append(
            f"{path}: {listed(mappings)} as the name of a channel asks for a mapping of intensities that mim3d does "
            "not have: CT in HU is clipped to a window, other scans get their z-score."
        )
    notes = [*labels.notes, *notes, *keys.notes(path)]
    return Description(form=form, entries=entries, labels=labels, channels=channels, notes=tuple(notes))


@dataclass
class _Keys:
    """The keys that a description names and that are not read, or read as another.

    Attributes:
        unused: Keys that nothing uses.
        guessed: Other names of keys -> the key.
    """

    unused: list[str] = field(default_factory=list)
    guessed: dict[str, str] = field(default_factory=dict)

    def entry(self, item: Any, where: str) -> Entry:
        """An item of a list by the columns of a list; the name of a file alone is that of an image.

        Raises:
            DataError: It is something else, or lacks an image.
        """
        item = {"image": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise DataError(f'{where}: must be an object like {{"image": "scan.nii.gz"}}.')
        found = read_columns(list(item), where)
        self.unused += found.unused
        self.guessed |= found.guessed
        return {found.columns[str(key)]: value for key, value in item.items() if str(key) in found.columns}

    def notes(self, path: str) -> tuple[str, ...]:
        """The one sentence that names all keys that nothing uses, and one on those that are read by another name."""
        different = list(dict.fromkeys(self.unused))
        said = [said_of_guesses(path, self.guessed)] if self.guessed else []
        if different:
            said.append(f"{path}: {listed(different, 12)} {'is' if len(different) == 1 else 'are'} not used by mim3d.")
        return tuple(said)


def _read_channels(content: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """The names of channels, from ``{"0": "CT"}``, a list, or a single name."""
    key = "channel_names" if content.get("channel_names") is not None else "modality"
    declared = content.get(key)
    if declared is None:
        return ()
    if isinstance(declared, str):
        return (declared,)
    if isinstance(declared, Mapping):
        by_number = {str(number).strip(): name for number, name in declared.items()}
        wanted = [str(number) for number in range(len(by_number))]
        if set(wanted) != by_number.keys():
            raise DataError(f'{path}: "{key}" must number its channels from 0, not {listed(list(declared))}.')
        declared = [by_number[number] for number in wanted]
    if not isinstance(declared, list):
        raise DataError(f'{path}: "{key}" must be like {{"0": "CT"}}, not {declared!r}.')
    return tuple(printable(str(name)) for name in declared)


def _json_entries(items: Sequence[Any], path: str, keys: _Keys) -> dict[str, Entry]:
    """The entries of a list by their places."""
    places = {f"{path}, entry {number}": item for number, item in enumerate(items, start=1)}
    return {where: keys.entry(item, where) for where, item in places.items()}


def _read_msd(content: Mapping[str, Any], path: str, num_channels: int, keys: _Keys) -> dict[str, Entry]:
    """The cases of Decathlon and MONAI lists; files named ``._x`` and scans to test on that are mere names are left."""
    if not any(isinstance(content.get(key), list) and content[key] for key in ("training", "train")):
        raise DataError(f'{path}: needs a list "training" of entries like {{"image": ..., "label": ...}}.')
    entries: dict[str, Entry] = {}
    for key, split in LISTS.items():
        items = content.get(key) or ()
        if not isinstance(items, (list, tuple)):
            raise DataError(f'{path}: "{key}" must be a list of cases, not a {type(items).__name__}.')
        for number, item in enumerate(items, start=1):
            if isinstance(item, str) and split == "test":
                # The Decathlon names the scans of its challenge so; they have no labels.
                continue
            entry = keys.entry(item, f'{path}, entry {number} of "{key}"')
            image = entry["image"]
            if not image:
                raise DataError(f'{path}: entry {number} of "{key}" has no "image".')
            named = image if isinstance(image, list) else [image]
            if any(os.path.basename(str(name)).startswith("._") for name in named):
                continue
            declared = {} if split is None else {"split": split}
            where = f'{path}, entry {number} of "{key}"'
            entries[where] = {**entry, **declared, **_with_channels(named, path, num_channels)}
    return entries


def _with_channels(named: Sequence[Any], path: str, num_channels: int) -> Entry:
    """The images of an entry, with the files or volumes of all channels where it names one for all."""
    images = [beside(path, name) for name in named]
    first = images[0]
    if len(images) > 1:
        return {"image": images}
    channels = _channel_files(first)
    if channels and not os.path.exists(first):
        return {"id": scan_id(first), "image": list(channels)}
    stem, suffix = _stem(first)
    if num_channels > 1 and os.path.isfile(first):
        several = _channel_files(stem.removesuffix("_0000") + suffix) if stem.endswith("_0000") else ()
        if len(several) == num_channels:
            return {"id": os.path.basename(stem).removesuffix("_0000"), "image": list(several)}
        return {"image": list(channels_of(first))}
    return {"image": images}


def _channel_files(path: str) -> tuple[str, ...]:
    """nnU-Net 1 lists ``x.nii.gz`` for the files ``x_0000.nii.gz``, ``x_0001.nii.gz``, ...; else nothing."""
    stem, suffix = _stem(path)
    channels = (f"{stem}_{channel:04d}{suffix}" for channel in itertools.count())
    return tuple(itertools.takewhile(os.path.exists, channels))


def _stem(path: str) -> tuple[str, str]:
    suffix = suffix_of(path)
    return path.removesuffix(suffix), suffix


def _read_nnunet(
    content: Mapping[str, Any], path: str, num_channels: int, keys: _Keys
) -> tuple[dict[str, Entry], list[str]]:
    """The cases of an nnU-Net raw folder, ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``, and notes."""
    if isinstance(content.get("dataset"), dict):
        return _nnunet_mapping(content["dataset"], path, num_channels, keys), []
    ending = str(content.get("file_ending", ".nii.gz"))
    ending = ending if ending.startswith(".") else f".{ending}"
    num_channels = num_channels or 1
    image_folder, label_folder = (os.path.join(os.path.dirname(path), name) for name in ("imagesTr", "labelsTr"))
    names, labels = (
        sorted(name for name in os.listdir(folder) if not name.startswith(".")) if os.path.isdir(folder) else []
        for folder in (image_folder, label_folder)
    )
    first = f"_0000{ending}"
    ids = [name.removesuffix(first) for name in names if name.endswith(first)]
    if not ids:
        there = f"; there are {listed(names, 3)}" if names else ""
        raise DataError(f"{image_folder}: no image named CASE{first}, as {path} says{there}.")
    entries: dict[str, Entry] = {}
    for case_id in ids:
        # A case that lacks one of them is left out when its headers are read, and does not stop the others.
        channels = [f"{case_id}_{channel:04d}{ending}" for channel in range(num_channels)]
        label = beside(path, os.path.join("labelsTr", case_id + ending))
        entries[f"{path}, case {case_id}"] = {
            "id": case_id,
            "image": [os.path.join(image_folder, name) for name in channels],
            "label": label if os.path.exists(label) else None,
        }
    read = {os.path.basename(image) for entry in entries.values() for image in entry["image"]}
    notes = []
    for folder, here, used in (
        (image_folder, names, read),
        (label_folder, labels, {case_id + ending for case_id in ids}),
    ):
        others = [name for name in here if name not in used and suffix_of(name)]
        if others:
            said = f"{num_channels} channel{'s' * (num_channels > 1)} and {ending}"
            notes.append(f"{folder}: {listed(others, 3)} not read, since {path} declares {said}.")
    return entries, notes


def _nnunet_mapping(cases: Mapping[str, Any], path: str, num_channels: int, keys: _Keys) -> dict[str, Entry]:
    """The cases under the key ``dataset``; of theirs that is read what nnU-Net reads."""
    entries: dict[str, Entry] = {}
    for case_id, item in cases.items():
        if not isinstance(item, dict) or not isinstance(item.get("images"), list) or not item["images"]:
            raise DataError(f'{path}: case {case_id!r} of "dataset" needs a list "images".')
        if num_channels and len(item["images"]) != num_channels:
            raise DataError(
                f'{path}: case {case_id!r} of "dataset" has {number_of(len(item["images"]), "image")}, but '
                f'"channel_names" {num_channels}.'
            )
        keys.unused += [printable(str(key)) for key in item if key not in ("images", "label")]
        entries[f"{path}, case {case_id}"] = {"id": case_id, "image": item["images"], "label": item.get("label")}
    return entries


def read_labels(declared: Any, path: str, region_values: Any = None) -> LabelDeclaration:
    """What label values stand for, from ``{"1": "liver"}`` (Decathlon) or ``{"liver": 1}`` (nnU-Net), 0 included.

    Where a name has several values (``"tumour": [1, 2]``), every name but the background is a region, as in nnU-Net; a
    value that is no region by itself is called ``label_1`` ... The name ``ignore`` is never a label.

    Args:
        declared: The entry "labels" of a dataset.json; None stands for no labels.
        path: Path of the file, for messages.
        region_values: The entry "regions_class_order".

    Raises:
        DataError: The labels have neither form, a value is outside 0 to 65535, or one value has two names.
    """
    if declared is None or declared == {}:
        return LabelDeclaration()
    if isinstance(declared, list) and declared and str(declared[0]).lower() == "background":
        declared = dict(zip(map(str, range(len(declared))), declared, strict=True))
    if not isinstance(declared, dict):
        raise DataError(f'{path}: "labels" must map values to names, not be a {type(declared).__name__}.')
    members: dict[str, list[int]] = {}
    names: dict[int, str] = {}
    ignored: list[int] = []
    with_regions = any(isinstance(value, list) and len(value) > 1 for value in declared.values())
    for name, values in _named_values(declared, path):
        if name.lower() == IGNORE:
            ignored = values
            continue
        if len(values) == 1 and not (with_regions and isinstance(declared.get(name), list)):
            if values[0] in names:
                raise DataError(f"{path}: label value {values[0]} has two names, {names[values[0]]!r} and {name!r}.")
            names[values[0]] = name
        members[name] = values
    if len(ignored) > 1 or 0 in ignored or {*ignored} & {value for each in members.values() for value in each}:
        raise DataError(f'{path}: "{IGNORE}" must be one label value above 0 that nothing else has, not {ignored}.')
    regions = {name: tuple(values) for name, values in members.items() if values != [0]} if with_regions else {}
    every = {value for values in members.values() for value in values}
    names |= {value: f"label_{value}" for value in every - names.keys()}
    notes = []
    if names.setdefault(0, "background").lower() not in _BACKGROUND:
        notes.append(f"{path}: label value 0 is called {names[0]!r}, but voxels of 0 count as background.")
    return LabelDeclaration(
        names=dict(sorted(names.items())),
        regions=regions,
        region_values=_region_values(region_values, regions, path) if regions else None,
        ignore_label=ignored[0] if ignored else None,
        notes=tuple(notes),
    )


def _named_values(declared: Mapping[Any, Any], path: str) -> Iterator[tuple[str, list[int]]]:
    """Each name of a declaration with its label values."""

    def value_of(written: Any) -> int:
        try:
            number = int(written)
            whole = number == float(written) and not isinstance(written, bool)
        except (TypeError, ValueError, OverflowError):
            number, whole = -1, False
        if not whole or not 0 <= number <= 65535:
            raise DataError(f"{path}: label value {written!r} is not a whole number from 0 to 65535.")
        return number

    for key, value in declared.items():
        if isinstance(value, list):
            if not value:
                raise DataError(f"{path}: label {key!r} has no value.")
            yield printable(str(key)), list(dict.fromkeys(map(value_of, value)))
        elif str(key).strip().isdigit():
            if isinstance(value, (dict, list)) or value is None:
                raise DataError(f"{path}: label value {key} must have a name, not {value!r}.")
            yield printable(str(value)), [value_of(key)]
        else:
            yield printable(str(key)), [value_of(value)]


def _region_values(declared: Any, regions: Mapping[str, Sequence[int]], path: str) -> tuple[int, ...] | None:
    """The label values of regions in predictions, as nnU-Net declares them in the order of the regions."""
    if declared is None:
        return None
    whole = isinstance(declared, list) and all(isinstance(each, int) and 0 < each <= 65535 for each in declared)
    if not whole or len(declared) != len(regions):
        raise DataError(
            f'{path}: "regions_class_order" is {declared!r}, but needs a label value above 0 for each of '
            f"{listed(list(regions))}."
        )
    return tuple(declared)


@dataclass(frozen=True, kw_only=True)
class DeclaredFolds:
    """The folds of nnU-Net's ``splits_final.json``.

    Attributes:
        fold: Id of a case -> the fold that holds it out.
        unlisted: Ids that no fold trains on or holds out.
        notes: What is to be said of the file.
    """

    fold: dict[str, int] = field(default_factory=dict)
    unlisted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_folds(description: str, ids: Sequence[str]) -> DeclaredFolds:
    """Read the ``splits_final.json`` beside a description; nothing is declared where there is none.

    Folds that one number per case cannot say (a case held out twice, or left out of some folds) are not used, and a
    note says so.

    Args:
        description: Path of the dataset.json.
        ids: Ids of its cases.

    Raises:
        DataError: The file cannot be read, or is no list of training and validation cases.
    """
    path = os.path.join(os.path.dirname(description), "splits_final.json")
    if not os.path.isfile(path):
        return DeclaredFolds()
    content = read_json(path)
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and all(isinstance(part.get(key), list) for key in ("train", "val")) for part in content
    ):
        raise DataError(f'{path}: must be a list of folds like {{"train": [...], "val": [...]}}.')
    # Some write the names of files.
    parts = [[set(map(_case_name, part[key])) for key in ("train", "val")] for part in content]
    every = {name for train, val in parts for name in train | val}
    if every.isdisjoint(ids):
        there = listed(sorted(every)) if every else "nothing"
        return DeclaredFolds(notes=(f"{path}: not used, since it names {there} and no case here.",))
    fold: dict[str, int] = {}
    for number, (train, val) in enumerate(parts):
        twice = sorted((val & fold.keys()) | (val & train))
        partly = sorted(every - train - val)
        if twice or partly:
            what = f"holds {twice[0]} out twice" if twice else f"leaves {partly[0]} out of fold {number}"
            return DeclaredFolds(notes=(f"{path}: not used, since it {what}; folds are drawn by patient instead.",))
        fold |= dict.fromkeys(val, number)
    missing = sorted(every - set(ids))
    unlisted = tuple(name for name in ids if name not in every)
    notes = [f"{path}: names {listed(missing)}, which are no cases here."] if missing else []
    if unlisted:
        notes.append(f"{path}: does not name {listed(unlisted)}, which are neither trained on nor held out.")
    return DeclaredFolds(fold=fold, unlisted=unlisted, notes=tuple(notes))


def _case_name(name: object) -> str:
    base = os.path.basename(str(name))
    return base.removesuffix(suffix_of(base))
