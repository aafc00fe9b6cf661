"""Cases from folders without a description: scans in a tree, or image and label folders side by side."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable

from mim3d.core.errors import DataError, listed
from mim3d.datasets.entries import Entry
from mim3d.scans.formats import SUFFIXES, suffix_of
from mim3d.scans.volumes import find_scans, scan_id

IMAGE_FOLDERS = ("images", "imagesTr")
LABEL_FOLDERS = ("labels", "labelsTr", "masks")
_NEVER_IMAGES = (*LABEL_FOLDERS, "labelsTs", "labelsVal", "segmentations")
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


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


def read_pairs(image_folder: str, label_folder: str, *, with_labels: bool = True) -> list[Entry]:
    """Pair images and labels of the same file name; an image without a label stays unlabelled.

    Args:
        image_folder: Folder of images; the channels of a case may be separate files.
        label_folder: Folder of label maps.
        with_labels: Whether the label maps are looked at.

    Raises:
        DataError: There are no images, or no labels where they are looked at, or a label has no image.
    """
    images = group_channels(scans_in(image_folder), image_folder)
    labels = {scan_id(path): path for path in scans_in(label_folder)} if with_labels else {}
    orphans = sorted(set(labels) - set(images))
    if orphans:
        raise DataError(
            f"{label_folder}: no image of the same name in {image_folder} for {listed(orphans)}; a label must be "
            "named like its image."
        )
    return [Entry(id=name, images=paths, label=labels.get(name)) for name, paths in images.items()]


def read_tree(folder: str) -> list[Entry]:
    """Every scan in a tree; label folders beside image folders or scans are left out.

    Raises:
        DataError: Nothing in the tree is readable.
    """
    paths = [path for path in scans_in(folder) if not _is_beside_images(path, folder)]
    if not paths:
        raise DataError(f"{folder}: only label maps in here; give the folder of the images.")
    if re.fullmatch(r"images(Tr|Ts|Val)", os.path.basename(folder)):
        return [Entry(id=name, images=files) for name, files in group_channels(paths, folder).items()]
    return [Entry(images=(path,)) for path in paths]


def scans_in(folder: str) -> list[str]:
    """Sorted scans below a folder, without hidden files (``._x.nii.gz``).

    Raises:
        DataError: There is none.
    """
    paths = [path for path in find_scans(folder) if not os.path.basename(path).startswith(".")]
    if not paths:
        raise DataError(f"{folder}: no scan in here; expected {', '.join(SUFFIXES)} or DICOM series.")
    return paths


def group_channels(paths: Iterable[str], folder: str) -> dict[str, tuple[str, ...]]:
    """Case name -> channel files of one folder, in channel order.

    Names count as channels (``case_0000``, ``case_0001``) only where every file ends in four digits and every
    case has the same channels from 0000 on; otherwise each file is a case.

    Raises:
        DataError: Two files have the same name.
    """
    named: dict[str, str] = {}
    for path in paths:
        name = scan_id(path)
        if name in named:
            raise DataError(f"{folder}: {named[name]} and {path} have the same name; rename or move one.")
        named[name] = path
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name, path in named.items():
        match = _CHANNEL.match(name)
        groups[match["case"] if match else name][match["channel"] if match else ""] = path
    channels = {tuple(sorted(group)) for group in groups.values()}
    expected = tuple(f"{index:04d}" for index in range(len(next(iter(channels), ()))))
    if channels != {expected}:
        return {name: (path,) for name, path in named.items()}
    return {case: tuple(group[channel] for channel in expected) for case, group in groups.items()}


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
