"""Published lists of scans to pre-train on: which sets they draw from, and the scans of a list below one folder.

Nothing is downloaded. The lists name public sets; what is there is found by the names of the folders in which their
owners publish them, or in which the authors of the lists do so converted to NIfTI (``HNSCC_convert_v1``), whatever lies
between them and the folder that is given.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.names import number_of, verb_of
from mim3d.core.settings import nearest
from mim3d.datasets.cases import Case, CaseSet, to_cases
from mim3d.datasets.published.folds import fold_numbers
from mim3d.datasets.published.presets import NIFTI, Preset, plain
from mim3d.datasets.published.sets.btcv import BTCV
from mim3d.scans.grids import split_series
from mim3d.scans.volumes import find_scans

#: Folders between the one that is given and that of a set: ``root/manifest-1600709154662/LIDC-IDRI``.
MAX_DEPTH = 3

#: Folders and files (without suffix) that hold label maps or masks in one set or another.
_MASK_FOLDER = re.compile(r"(labels?|masks?|seg|segmentations?)([^a-z].*|[TV][a-z].*)?", re.IGNORECASE)
_MASK_FILE = re.compile(r".*[_-](seg|mask|label|segmentation)s?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ScanSet:
    """A public set that a list draws from.

    Attributes:
        name: Name of the set in the list.
        region: Region of the body.
        num_scans: Number of scans in the list; None where it is not published. Owners may publish more scans than that.
        folders: Names of the folder it is published in; case and punctuation do not matter.
        expected: Content of that folder, in words for a message.
        image: Regular expression for the end of an image's path; None takes every scan that is no mask.
        left_out: Regular expression for the names of folders whose scans are not in the list.
        preset: Preset of the set, where the list has only the images that its fold 0 trains on.
    """

    name: str
    region: str
    num_scans: int | None
    folders: tuple[str, ...]
    expected: str = "DICOM series of CT, or images such as 00001.nii.gz"
    image: str | None = None
    left_out: str | None = None
    preset: Preset | None = None


_BTCV = ScanSet(
    name="BTCV",
    region="abdomen",
    num_scans=24,
    folders=("BTCV", "Synapse"),
    expected="files such as imagesTr/img0001.nii.gz",
    preset=BTCV,
)
_COVID = ScanSet(
    name="TCIA Covid19",
    region="chest",
    num_scans=722,
    folders=("TCIA Covid19", "CT Images in COVID-19", "CT-COVID-19-August2020", "CT-COVID-19-December2020"),
    expected="files such as volume-covid19-A-0000.nii.gz",
)

_MORE = (
    ScanSet(
        name="LUNA16",
        region="chest",
        num_scans=843,
        folders=("LUNA16", "LUNA", "Luna16-jx"),
        expected="the folders subset0 to subset9 with files such as 1.3.6.1.mhd",
        image=r"subset_?\d+/[^/]+\.(mhd|nii\.gz)",
    ),
    ScanSet(
        name="STOIC 2021",
        region="chest",
        num_scans=2000,
        folders=("STOIC2021", "STOIC", "stoic2021-training", "stoic21"),
        expected="files such as data/mha/10.mha",
    ),
    ScanSet(
        name="FLARE23",
        region="abdomen",
        num_scans=4000,
        folders=("FLARE23", "FLARE2023", "MICCAI-FLARE23"),
        expected="the folders imagesTr2200 and unlabeledTr1800 with files such as FLARE23_0001_0000.nii.gz",
        image=rf"[^/]+{NIFTI}",
        # The list is of its training set; label maps that others predicted are published beside it.
        left_out=r"(images)?(val|ts|test).*|.*pseudo.*",
    ),
    ScanSet(name="LIDC", region="chest", num_scans=589, folders=("LIDC-IDRI", "LIDC", "LIDC_convert_v1")),
    ScanSet(name="HNSCC", region="head and neck", num_scans=1071, folders=("HNSCC", "HNSCC_convert_v1")),
    ScanSet(
        name="TotalSegmentator",
        region="whole body",
        num_scans=1203,
        folders=("TotalSegmentator", "Totalsegmentator_dataset", "Totalsegmentator_dataset_v201"),
        expected="a folder for each case with its image, such as s0000/ct.nii.gz",
        image=rf"s\d+/ct{NIFTI}",
    ),
)

_LARGER = (
    ScanSet(name="OPC", region="head and neck", num_scans=606, folders=("OPC-Radiomics", "OPC", "OPC_convert_v1")),
    ScanSet(name="TCGA-HNSC", region="head and neck", num_scans=762, folders=("TCGA-HNSC", "TCGA-HNSC_convert_v1")),
    ScanSet(name="QIN Head-Neck", region="head and neck", num_scans=892, folders=("QIN-HEADNECK", "QIN_convert_v1")),
    ScanSet(
        name="HN-PET", region="head and neck", num_scans=384, folders=("Head-Neck-PET-CT", "HN-PET", "HNPC_convert_v1")
    ),
    ScanSet(
        name="CT colonography",
        region="abdomen",
        num_scans=1730,
        folders=("CT COLONOGRAPHY", "ACRIN 6664", "CT COLONOGRAPHY (ACRIN 6664)", "CT_COLONOGRAPHY_converted_v1"),
    ),
    ScanSet(
        name="Stony Brook chest",
        region="chest",
        num_scans=2316,
        folders=("COVID-19-NY-SBU", "Stony Brook", "StonyBrookChestCT_v1"),
    ),
    ScanSet(name="NLST", region="chest", num_scans=None, folders=("NLST", "NLST_convert_v1")),
)

#: The sets of each list; ``all`` is 10k with the sets that larger lists of the same group add.
LISTS: dict[str, tuple[ScanSet, ...]] = {
    "1k": (_BTCV, _COVID),
    "10k": (_BTCV, _COVID, *_MORE),
    "all": (_BTCV, _COVID, *_MORE, *_LARGER),
}


def pretraining_list(name: str, root: str | os.PathLike[str], *, log: Callable[[str], None] | None = None) -> CaseSet:
    """The images of a published pre-training list that are found below a folder: only CT, no masks.

    Of BTCV the cases that fold 0 holds out are left out, as in the list. Whether other scans belong to a downstream
    validation set under another name is found by the comparison of contents in pre-training and fine-tuning.

    Args:
        name: Name of the list, see ``LISTS``.
        root: Folder with the folders of the sets in it, at most three levels down.
        log: Function that takes one line per set: how many scans are there, and how many the list has.

    Raises:
        ConfigError: There is no such list; the sentence names those that there are.
        DataError: There is no such folder, or no scan of any of the sets. Where a set's folder was found, the sentence
            says what was expected in it.
    """
    if name not in LISTS:
        raise ConfigError(f"There is no pre-training list '{name}'.{nearest(name, LISTS)}")
    top = os.path.abspath(root)
    if not os.path.isdir(top):
        raise DataError(f"{root}: no such folder; give the one that holds the folders of the data sets.")
    entries: list[Case] = []
    missing, unread = list[str](), list[str]()
    for scans in LISTS[name]:
        folders = list(_folders_of(scans, top))
        images = [image for folder in folders for image in _images(scans, folder)]
        entries += [Case(images=(image,)) for image in images]
        if log is not None:
            log(_summary(scans, folders, len(images)))
        if not images:
            missing.append(scans.name if scans.num_scans is None else f"{scans.name} {scans.num_scans:,}")
            if folders:
                unread.append(f"{', '.join(folders)}: no scan of {scans.name} in here; expected {scans.expected}.")
    if not entries:
        every = ", ".join(scans.folders[0] for scans in LISTS[name])
        unread.append(f"{root}: holds none of the sets of the list {name}; expected folders named {every}.")
        raise DataError(unread[0])
    for sentence in unread:
        warnings.warn(sentence, stacklevel=2)
    if missing:
        warnings.warn(
            f"{root}: {len(missing)} of the {number_of(len(LISTS[name]), 'set')} of the list {name} "
            f"{verb_of(len(missing), 'are')} not here "
            f"({', '.join(missing)}); what comes of it cannot be compared with the whole list.",
            stacklevel=2,
        )
    return CaseSet(root=top, form="list", cases=to_cases(entries, top), labels={})


def _summary(scans: ScanSet, folders: Sequence[str], num_images: int) -> str:
    """One line: how many scans of a set are there, and how many the list has."""
    *others, last = scans.folders
    named = f"{', '.join(others)} or {last}" if others else last
    where = f" in {', '.join(folders)}" if folders else f": no folder named {named}"
    more = scans.num_scans is not None and num_images > scans.num_scans
    counted = number_of(num_images, "scan", of=None if more else scans.num_scans)
    if more:
        counted += f", of which the list has {scans.num_scans:,},"
    return f"{scans.name} ({scans.region}): {counted}{where}"


def _folders_of(scans: ScanSet, root: str) -> Iterator[str]:
    """Folders named like a set, the root itself included; folders below one of them are not searched."""
    wanted = {plain(folder) for folder in scans.folders}
    for folder, names, _ in os.walk(root, followlinks=True):
        if plain(os.path.basename(folder)) in wanted:
            yield folder
            names.clear()
            continue
        depth = os.path.relpath(folder, root).count(os.sep) + (folder != root)
        names[:] = sorted(name for name in names if not name.startswith(".")) if depth < MAX_DEPTH else []


def _images(scans: ScanSet, folder: str) -> list[str]:
    try:
        found = find_scans(folder)
    except DataError as error:
        warnings.warn(f"{scans.name}: {error}", stacklevel=4)
        return []
    return [path for path in found if _is_image(scans, path, folder)]


def _is_image(scans: ScanSet, path: str, folder: str) -> bool:
    """Whether a scan below the folder of a set is an image of the list."""
    if split_series(path)[1] or os.path.isdir(path):
        from mim3d.scans.dicom.series import open_series

        try:
            # The same collections hold PET, MRI and radiographs.
            return open_series(path).slices[0].modality == "CT"
        except DataError:
            # Whoever reads it is told why it cannot be used.
            return True
    inside = os.path.relpath(path, folder).replace(os.sep, "/")
    *parents, file = inside.split("/")
    if any(_MASK_FOLDER.fullmatch(part) for part in parents) or _MASK_FILE.fullmatch(file.partition(".")[0]):
        return False
    if any(scans.left_out and re.fullmatch(scans.left_out, part, re.IGNORECASE) for part in parents):
        return False
    files = scans.preset and scans.preset.files
    pattern = files.image if files else scans.image or ".*"
    match = re.fullmatch(rf"(?:.*/)?{pattern}", inside, re.DOTALL | re.IGNORECASE)
    if match is None or scans.preset is None:
        return match is not None
    _, *others = fold_numbers(scans.preset) or ()
    return str(int(match["case"])) in frozenset().union(*others)
