"""How each published data set lies on disk, and the cases of a fold read from a folder as its owners publish it."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.datasets.cases import Case, CaseSet, read_slice_folders, to_cases
from mim3d.datasets.entries import Entry
from mim3d.datasets.published.folds import fold_numbers
from mim3d.datasets.published.presets import Preset
from mim3d.datasets.splits import Split, declared_split, split_cases
from mim3d.scans.grids import split_channel
from mim3d.scans.volumes import channels_of

_NIFTI = r"\.nii(\.gz)?"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the files of a data set, whatever folders lie above them.

    Attributes:
        image: pattern of the end of an image's path, with the number of its case as ``case``.
        label: the same of a label map.
        example: both for a message, with the number to be filled in.
        num_digits: to which the numbers of cases are filled up in file names.
    """

    image: str
    label: str
    example: str
    num_digits: int = 4

    @classmethod
    def decathlon(cls, stem: str, num_digits: int = 3) -> "Layout":
        """A task of the Decathlon, whose images and label maps share their names."""
        pattern, file = rf"{stem}_(?P<case>\d+){_NIFTI}", stem + "_{0}.nii.gz"
        return cls(
            image=f"imagesTr/{pattern}",
            label=f"labelsTr/{pattern}",
            example=f"imagesTr/{file} with labelsTr/{file}",
            num_digits=num_digits,
        )

    def files_of(self, number: str) -> str:
        """The names of a case's files, for a message."""
        first, line, more = number.partition("_")
        return self.example.format(first.zfill(self.num_digits) + line + more)


#: Layout of each set whose cases are files; CC-CCII is folders of slices.
LAYOUTS: dict[str, Layout] = {
    "BTCV": Layout(
        image=rf"img(?P<case>\d{{4}}){_NIFTI}",
        label=rf"label(?P<case>\d{{4}}){_NIFTI}",
        example="imagesTr/img{0}.nii.gz with labelsTr/label{0}.nii.gz",
    ),
    "MM-WHS CT": Layout(
        image=rf"ct_train_(?P<case>\d{{4}})_image{_NIFTI}",
        label=rf"ct_train_(?P<case>\d{{4}})_label{_NIFTI}",
        example="ct_train_{0}_image.nii.gz with ct_train_{0}_label.nii.gz",
    ),
    "MSD Spleen": Layout.decathlon("spleen", num_digits=1),
    "MSD Liver": Layout.decathlon("liver", num_digits=1),
    "MSD Lung": Layout.decathlon("lung"),
    "MSD Pancreas": Layout.decathlon("pancreas"),
    "MSD HepaticVessel": Layout.decathlon("hepaticvessel"),
    "MSD Colon": Layout.decathlon("colon"),
    "AMOS22": Layout(
        image=rf"images(Tr|Va)/amos_(?P<case>\d{{4}}){_NIFTI}",
        label=rf"labels(Tr|Va)/amos_(?P<case>\d{{4}}){_NIFTI}",
        example="imagesTr/amos_{0}.nii.gz with labelsTr/amos_{0}.nii.gz (or imagesVa and labelsVa)",
    ),
    "FLARE22": Layout(
        image=rf"FLARE22_Tr_(?P<case>\d{{4}})_0000{_NIFTI}",
        label=rf"FLARE22_Tr_(?P<case>\d{{4}}){_NIFTI}",
        example="images/FLARE22_Tr_{0}_0000.nii.gz with labels/FLARE22_Tr_{0}.nii.gz",
    ),
    "COVID-19-20": Layout(
        image=rf"volume-covid19-A-(?P<case>\d{{4}}(_\d+)?)_ct{_NIFTI}",
        label=rf"volume-covid19-A-(?P<case>\d{{4}}(_\d+)?)_seg{_NIFTI}",
        example="volume-covid19-A-{0}_ct.nii.gz with volume-covid19-A-{0}_seg.nii.gz",
    ),
    "BraTS": Layout.decathlon("BRATS"),
}


def read_preset(
    preset: Preset, folder: str | os.PathLike[str], fold: int | None, *, strict: bool | None = None
) -> tuple[CaseSet, Split]:
    """The cases of a published data set, each declared as trained on or held out by a fold.

    Names alone are read, and the headers of files that hold several channels. Hidden files, other sets in the same
    tree and cases that belong to no fold (test cases, the MRI of AMOS22) are passed over.

    Args:
        preset: of the data set.
        folder: where it lies, or any folder above it.
        fold: the one that is held out; None declares every case as trained on.
        strict: what becomes of a fold whose cases are not all there. None refuses where one to be held out is missing
            and warns of those to train on; True refuses both; False warns of both.

    Raises:
        ConfigError: no such fold.
        DataError: no folder, no case, a case that is there twice, a part of the fold that is empty, or cases missing
            that ``strict`` refuses.
    """
    root = os.path.abspath(folder)
    root = os.path.dirname(root) if os.path.isfile(root) else root
    if not os.path.isdir(root):
        raise DataError(f"{folder}: no such folder; give the folder of {preset.name} as its owners publish it.")
    numbers = fold_numbers(preset.name)
    cases = _read_slices(preset, root) if numbers is None else _read_files(preset, root, frozenset().union(*numbers))
    declared = declare_fold(preset, root, cases, fold, strict=strict)
    return CaseSet(root=root, form="preset", cases=declared, labels=dict(preset.labels)), declared_split(declared)


def declare_fold(
    preset: Preset, root: str, cases: Sequence[Case], fold: int | None, *, strict: bool | None = None
) -> tuple[Case, ...]:
    """Those of the cases that belong to a fold, each declared as trained on or held out, by the names of its files.

    Args:
        preset: of the data set.
        root: where the cases come from, for messages.
        cases: of the data set, as read from its files or kept in a cache.
        fold: as for ``read_preset``.
        strict: as for ``read_preset``.

    Raises:
        ConfigError: no such fold.
        DataError: as for ``read_preset``.
    """
    if fold is not None and not 0 <= fold < preset.num_folds:
        raise ConfigError(f"preset {preset.name} has the folds 0 to {preset.num_folds - 1}, but fold is {fold}.")
    numbers = fold_numbers(preset.name)
    if numbers is None:
        return _seeded(cases, fold, preset.num_folds)
    by_number = {_number_of(preset, case): case for case in cases}
    every, held_out = frozenset().union(*numbers), numbers[fold] if fold is not None else frozenset()
    here = every & by_number.keys()
    if not here:
        raise DataError(_none_here(preset, root))
    _require_cases(preset, root, fold, here, strict)
    return tuple(
        replace(by_number[number], split="val" if number in held_out else "train")
        for number in sorted(here, key=_place)
    )


def _read_slices(preset: Preset, root: str) -> tuple[Case, ...]:
    """The scans below the folders of the classes, each a folder of slice images; folders of other names are left.

    Raises:
        DataError: no folder, or more than one, holds folders of the classes.
    """
    homes = []
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if len(preset.classes.keys() & set(names)) > 1:
            homes.append(folder)
            names.clear()
    if len(homes) != 1:
        found = f"{listed(homes)} all hold" if homes else "no folder in here holds"
        raise DataError(
            f"{root}: {found} the folders {', '.join(preset.classes)} of {preset.name}; give one folder of it, as its "
            f"owners publish it ({preset.url})."
        )
    return tuple(case for case in read_slice_folders(homes[0]).cases if case.class_name in preset.classes)


def _read_files(preset: Preset, root: str, wanted: frozenset[str]) -> tuple[Case, ...]:
    """The cases whose image and label map are both there, in rising order of their numbers."""
    from mim3d.scans.dicom.series import walk

    layout = LAYOUTS[preset.name]
    paths = list(walk(root))
    images = _by_number(paths, layout.image, preset, wanted)
    labels = _by_number(paths, layout.label, preset, wanted)
    entries = [
        Entry(
            images=_channels(preset, images[number]),
            label=labels[number],
            # What follows the number tells several scans of one patient apart.
            patient=f"{preset.name} {number.partition('_')[0]}",
        )
        for number in sorted(images.keys() & labels.keys(), key=_place)
    ]
    return to_cases(entries, root)


def _none_here(preset: Preset, root: str) -> str:
    numbers = fold_numbers(preset.name) or ()
    first = min(frozenset().union(*numbers), key=_place)
    return (
        f"{root}: no case of {preset.name} in here; expected files such as {LAYOUTS[preset.name].files_of(first)}, as "
        f"its owners publish them ({preset.url})."
    )


def _number_of(preset: Preset, case: Case) -> str:
    path, _ = split_channel(case.images[0])
    return _number(path, LAYOUTS[preset.name].image)


def _number(path: str, pattern: str) -> str:
    """The number of the case that a path belongs to, without leading zeros; empty for another path."""
    match = re.fullmatch(rf"(?:.*/)?{pattern}", path.replace(os.sep, "/"), re.DOTALL)
    return re.sub(r"^0+(?=\d)", "", match["case"]) if match else ""


def _by_number(paths: Iterable[str], pattern: str, preset: Preset, wanted: frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        number = _number(path, pattern)
        if number in wanted and found.setdefault(number, path) != path:
            raise DataError(
                f"{path}: the same case of {preset.name} as {found[number]}; keep one copy of the data set below the "
                "folder, or name the folder of one."
            )
    return found


def _place(number: str) -> tuple[int, str]:
    first, _, more = number.partition("_")
    return int(first), more


def _channels(preset: Preset, path: str) -> tuple[str, ...]:
    if len(preset.channels) == 1:
        return (path,)
    channels = channels_of(path)
    if len(channels) != len(preset.channels):
        raise DataError(
            f"{path}: holds {len(channels)} channels, but {preset.name} has {len(preset.channels)} "
            f"({', '.join(preset.channels)}) in one file; give the set as its owners publish it ({preset.url})."
        )
    return channels


def _seeded(cases: Sequence[Case], fold: int | None, num_folds: int) -> tuple[Case, ...]:
    """The cases with a part each, dealt out by patient."""
    if fold is None:
        return tuple(replace(case, split="train") for case in cases)
    held_out = {case.id for case in split_cases(cases, fold=fold, num_folds=num_folds).val}
    return tuple(replace(case, split="val" if case.id in held_out else "train") for case in cases)


def _require_cases(preset: Preset, root: str, fold: int | None, present: Iterable[str], strict: bool | None) -> None:
    """Hold what is there against the lists of a fold.

    Raises:
        DataError: a part is empty, or cases are missing that ``strict`` refuses.
    """
    folds, here = fold_numbers(preset.name), set(present)
    assert folds is not None
    every = frozenset().union(*folds)
    held_out = folds[fold] if fold is not None else frozenset()
    named = preset.name if fold is None else f"fold {fold} of {preset.name}"
    for numbers, part, refused in (
        (held_out, "holds out", strict is not False),
        (every - held_out, "trains on", strict is True),
    ):
        missing = sorted(numbers - here, key=_place)
        if not missing:
            continue
        first = LAYOUTS[preset.name].files_of(missing[0])
        text = (
            f"{root}: {len(missing)} of the {len(numbers)} cases that {named} {part} are not here, the first is {first}"
        )
        if len(missing) == len(numbers):
            raise DataError(f"{text}; without any of them there is nothing to compare, so add some of them.")
        if refused:
            remedy = "" if strict else ", or go on without them by --strict false"
            raise DataError(f"{text}; add them ({preset.url}){remedy}.")
        warnings.warn(f"{text}; scores cannot be compared with those of the whole set.", stacklevel=3)
