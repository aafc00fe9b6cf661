"""Label maps in a tree of scans: told by their names, grids and voxels, and paired with the scans they belong to."""

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mim3d.core.errors import DataError, listed
from mim3d.core.names import joined_name
from mim3d.datasets.label_voxels import Voxels, voxels_of
from mim3d.scans.files import nothing_said
from mim3d.scans.grids import Grid, file_of, require_same_grid, split_series
from mim3d.scans.volumes import read_grid, scan_id, suffix_of

#: Folders of label maps, in lower case, where scans lie beside them.
LABEL_FOLDERS = frozenset(
    "label labels labelstr labelsts labelsval labelmaps mask masks seg segs segmentation segmentations annotation "
    "annotations gt groundtruth ground_truth".split()
)

#: Words of a file name that stand for a label map, and ends of words that do.
_LABEL_WORDS = frozenset(
    "label labels labelmap labelmaps mask masks msk seg segs segm segmentation segmentations annotation annotations gt "
    "groundtruth aseg aparc dseg probseg manual prob probs probability probabilities softmax maske lesion lesions roi "
    "rois contour contours".split()
)
_LABEL_ENDS = ("segmentation", "mask", "masks", "labelmap", "seg")

#: Words that say what an image is, not whose: without them, names of one case are the same.
_IMAGE_FOLDERS = frozenset("image images imagestr imagests imagesval img imgs scan scans volume volumes anat".split())
_CHANNELS = frozenset(
    "ct ctres cta cbct mr mri pet pt suv t1 t1c t1n t1ce t1gd t1w t2 t2w t2f flair adc dwi pd".split()
)
_ROLES = _LABEL_WORDS | _IMAGE_FOLDERS | _CHANNELS | {"imaging", "vol", "combined", "ground", "truth"}

#: Words that tools add to the names of what they predict.
_PREDICTED = frozenset("pred preds predicted prediction predictions output".split())

#: End of the name of the first channel, which many tools keep in the names of what they make of it.
FIRST_CHANNEL = "_0000"

#: Words before the number of a case: ``img0001`` and ``label0001``.
_NUMBERED = "|".join(sorted(_LABEL_WORDS | _IMAGE_FOLDERS | {"ct", "mr", "mri", "vol", "imaging", "orig"}))

#: Files of one kind, such as every ``aorta.nii.gz``, that are looked into; of all kinds together.
_LOOKS_PER_KIND = 3
MAX_LOOKS = 100

#: Different kinds of files in one folder beyond which they are scans of as many names, not maps of as many structures.
MAX_KINDS = 200


@dataclass(frozen=True, kw_only=True)
class TreeCase:
    """Scans of a tree that belong together.

    Attributes:
        images: One path per channel.
        label: Path of the label map, or None.
        name: What the case is called, or empty where only its files say so.
        patient: Whose scans they are, or empty.
    """

    images: tuple[str, ...]
    label: str | None = None
    name: str = ""
    patient: str = ""


@dataclass(frozen=True, kw_only=True)
class SortedTree:
    """The scans of a tree, without the label maps among them.

    Attributes:
        cases: Scans in the order of their paths.
        channels: What each image of a case is, such as "t1c", where cases have several; else empty.
        notes: What is to be said of label maps that were found.
    """

    cases: tuple[TreeCase, ...]
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sort_tree(
    paths: Sequence[str], root: str, *, with_labels: bool, look: bool = True, channels: Sequence[str] = ()
) -> SortedTree:
    """Tell the label maps in a tree from the scans.

    Files are told by their names and folders, and a few of each kind are looked into: what is called a label map may be
    an image all the same, and what is not may hold labels, which are few whole numbers in large pieces.

    Args:
        paths: Paths of all scans and label maps below the root.
        root: The folder.
        with_labels: Whether label maps are paired with their scans, where the layout tells to which; scans that share
            a label map and its grid are then channels of one case. Otherwise label maps are left out.
        look: Whether voxels may be looked at.
        channels: What the images of a case are to be, such as "t1c", where label maps are left out: images that have
            these names are one case then.

    Raises:
        DataError: There are label maps alone.
    """
    called = _named_maps(paths, root)
    maps, shares = set(called), set[str]()
    others = [path for path in paths if path not in maps]
    if look:
        looks = _Looks()
        maps, shares = _checked_maps(called, looks)
        others = [path for path in paths if path not in maps]
        maps |= _seen_maps(others, maps, looks)
        others = [path for path in others if path not in maps]
    if not maps and len(channels) < 2:
        return SortedTree(cases=tuple(TreeCase(images=(path,)) for path in paths))
    if not others:
        raise DataError(
            f"{root}: only label maps in here, such as {os.path.relpath(min(maps), root)}; give the folder of the "
            "images, or a CSV that lists them as image."
        )
    groups = _Groups(others, sorted(maps - shares), root)
    wanted = () if with_labels or len(channels) < 2 else tuple(channels)
    cases = groups.cases_of(wanted) or groups.cases(others, with_labels=with_labels)
    paired = {case.label for case in cases if case.label is not None}
    left_paths = maps - paired
    left = [os.path.relpath(path, root) for path in sorted(left_paths)]
    said = []
    if paired:
        first = next(case for case in cases if case.label is not None)
        one, other = (os.path.relpath(path, root) for path in (first.images[0], str(first.label)))
        said.append(f"label maps paired with scans by their names: {len(paired)} (such as {other} with {one})")
    if left:
        said.append(f"label maps left out, since they are no scans: {len(left)} ({listed(left, 3)})")
    if left_paths - called.keys():
        said.append("some are told by their voxels alone: if those are scans, list them as image in a CSV")
    channels = groups.channels if with_labels else wanted if any(len(case.images) > 1 for case in cases) else ()
    if channels:
        said.append(f"the images of a case are its channels {', '.join(channels)}")
    unread = len(others) - sum(len(case.images) for case in cases)
    if unread:
        said.append(f"images that are none of these are left out: {unread}")
    if left and with_labels and any(case.label is None for case in cases):
        said.append(
            "to learn from labels, give each scan one label map of all its structures beside it (image and label, or a "
            "CSV with the columns image,label)"
        )
    return SortedTree(
        cases=tuple(cases), channels=tuple(channels), notes=(f"{root}: {'; '.join(said)}.",) if said else ()
    )


def _named_maps(paths: Sequence[str], root: str) -> dict[str, str]:
    """Files that are called label maps, or lie in a folder that is, beside scans -> what their kind is called."""
    names = {path: os.path.basename(path) for path in paths if suffix_of(path)}
    called = {
        path: _pattern(name) for path, name in names.items() if _is_called_label(name.removesuffix(suffix_of(name)))
    }
    return called | in_label_folders(paths, root)


def in_label_folders(paths: Iterable[str], root: str) -> dict[str, str]:
    """Files in a folder that is called one of label maps, beside scans -> that folder, without its numbers."""
    homes: dict[str, str] = {}
    beside: set[str] = set()
    for path in paths:
        parts = os.path.relpath(file_of(path), root).split(os.sep)[:-1]
        first = next((index for index, part in enumerate(parts) if _is_called_label(part)), None)
        if first is None:
            beside.update(os.sep.join(parts[:count]) for count in range(len(parts) + 1))
        else:
            homes[path] = os.sep.join(parts[: first + 1])
    return {path: _pattern(home + os.sep) for path, home in homes.items() if os.path.dirname(home) in beside}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _is_called_label(name: str) -> bool:
    """Whether the name of a folder, or of a file without its ending, is that of label maps."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]", name)]
    letters = [word for word in words if not word.isdigit()]
    return (
        name.lower() in LABEL_FOLDERS
        or not _LABEL_WORDS.isdisjoint(words)
        or ("ground", "truth") in itertools.pairwise(words)
        or bool(letters and letters[-1].endswith(_LABEL_ENDS))
    )


class _Looks:
    """What the voxels of a few files of each kind are; a kind is every file whose name differs by its numbers alone."""

    def __init__(self) -> None:
        self.seen: dict[str, Voxels] = {}
        self.num_looks = 0

    def of(self, paths: Sequence[str]) -> list[Voxels]:
        """What the first files of a kind hold, as far as there are looks left."""
        found: list[Voxels] = []
        for path in paths[:_LOOKS_PER_KIND]:
            if path not in self.seen:
                if self.num_looks >= MAX_LOOKS:
                    break
                self.num_looks += 1
                self.seen[path] = voxels_of(path)
            found.append(self.seen[path])
            if found[-1] is not Voxels.UNCLEAR and found.count(found[-1]) * 2 > _LOOKS_PER_KIND:
                break
        return found


def _checked_maps(called: Mapping[str, str], looks: _Looks) -> tuple[set[str], set[str]]:
    """Files that are called label maps, without the kinds that are images; and those of them that hold probabilities.

    Args:
        called: Path -> what its kind is called.
        looks: Where voxels are looked at.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for path, kind in called.items():
        kinds[kind].append(path)
    maps, shares = set[str](), set[str]()
    for files in kinds.values():
        seen = looks.of(files)
        if not _most(Voxels.IMAGE, seen):
            maps.update(files)
        if _most(Voxels.SHARES, seen):
            shares.update(files)
    return maps, shares


def _most(what: Voxels, seen: Sequence[Voxels]) -> bool:
    return sum(each is what for each in seen) * 2 > len(seen)


def _seen_maps(paths: Sequence[str], maps: Iterable[str], looks: _Looks) -> set[str]:
    """Files whose voxels are labels, although their names do not say so.

    Small numbers in pieces are labels wherever they lie. Others are where they lie beside a label map, or on the grid
    of another kind of file of the same folder or name.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for path in filter(suffix_of, paths):
        folders[os.path.dirname(path)].append(path)
        names[os.path.basename(path)].append(path)
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for folder, files in folders.items():
        patterns = Counter(_pattern(os.path.basename(path)) for path in files)
        for path in files if len(patterns) <= MAX_KINDS else ():
            name = _pattern(os.path.basename(path))
            # Where each folder holds one file of a name, the folders are those of patients.
            kinds[_pattern(folder) if patterns[name] > 1 else "", name].append(path)
    homes = set(map(os.path.dirname, maps))

    def is_map(path: str, kind: Sequence[str]) -> bool:
        if looks.seen[path] is not Voxels.LABELS:
            return looks.seen[path] is Voxels.SMALL_LABELS
        beside = {*folders[os.path.dirname(path)], *names[os.path.basename(path)]} - {path}
        others = [other for other in beside if other not in kind or os.path.dirname(other) != os.path.dirname(path)]
        grid = _grid(path)
        return os.path.dirname(path) in homes or any(_is_same_grid(grid, _grid(other)) for other in others)

    found: set[str] = set()
    for files in kinds.values():
        looks.of(files)
    # Twice, as the first round may tell that label maps lie here.
    for files in (*kinds.values(), *kinds.values()):
        verdicts = {path: is_map(path, files) for path in files[:_LOOKS_PER_KIND] if path in looks.seen}
        others = sum(verdicts.values()) * 2 > len(verdicts)
        kind = {path for path in files if verdicts.get(path, others)}
        found |= kind
        homes.update(map(os.path.dirname, kind))
    return found


def _grid(path: str) -> Grid | None:
    """The grid of a scan; None where it cannot be read, which is found out and said when it is used."""
    try:
        with nothing_said():
            return read_grid(path)
    except Exception:  # Whatever a reader raises.
        return None


def _is_same_grid(one: Grid | None, two: Grid | None) -> bool:
    if one is None or two is None or sorted(one.shape) != sorted(two.shape):
        return False
    try:
        require_same_grid(one, two)
    except DataError:
        return False
    return True


class _Groups:
    """Scans and label maps by the case that their names and folders speak of.

    Args:
        images: Paths of scans.
        maps: Paths of label maps.
        root: The folder.
    """

    def __init__(self, images: Sequence[str], maps: Sequence[str], root: str) -> None:
        self.root = root
        self.images: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path in images:
            self.images[self._key(path)].append(path)
        by_key: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path in maps:
            by_key[self._key(path)].append(path)
        #: Key of a case -> its one label map.
        self.labels = {key: found[0] for key, found in by_key.items() if len(found) == 1 and key in self.images}
        self._pair_alone(maps)
        self._pair_same_names(by_key)
        #: Path -> patient, of all images of a case with a label map: a fold must not divide them.
        self.patients = {path: joined_name(key) for key in self.labels if key for path in self.images[key]}
        #: What the images of a case with several are, the same for all such cases.
        self.channels = self._channels()

    def _key(self, path: str) -> tuple[str, ...]:
        """The folders and the name of a file, without what says whether it is an image or a label map."""
        file, series = split_series(path)
        *folders, name = os.path.relpath(file, self.root).split(os.sep)
        kept = [part for part in folders if part.lower() not in LABEL_FOLDERS | _IMAGE_FOLDERS | _CHANNELS]
        stem = name.removesuffix(suffix_of(name))
        last = _without_roles(stem) if suffix_of(name) else stem
        # BraTS repeats the name of the folder in that of the file.
        return tuple(part for part in (*kept, last if last not in kept[-1:] else "", series) if part)

    def _pair_alone(self, maps: Sequence[str]) -> None:
        """Pair the one scan of a folder of its own with the one label map there, whatever their names."""
        paired = set(self.labels.values())
        images, labels = (
            self._by_folder(paths)
            for paths in (
                [path for key, found in self.images.items() if key not in self.labels for path in found],
                [path for path in maps if path not in paired],
            )
        )
        alone = {
            folder: (images[folder][0], found[0])
            for folder, found in labels.items()
            if folder and len(found) == 1 and len(images.get(folder, ())) == 1 and suffix_of(images[folder][0])
        }
        structures = {folder: self._structure(image, label) for folder, (image, label) in alone.items()}
        # A folder that differs from the others of its kind is found when headers are checked.
        verdicts: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        for folder, (image, label) in alone.items():
            # A map of a structure tells nothing where others are of another structure.
            is_whole = not structures[folder] or len(set(structures.values())) == 1
            seen = verdicts[tuple(_pattern(os.path.basename(path)) for path in (image, label))]
            if is_whole and len(seen) < _LOOKS_PER_KIND:
                seen.append(_is_same_grid(_grid(image), _grid(label)))
            if is_whole and (seen[-1] if len(seen) < _LOOKS_PER_KIND else any(seen)):
                self.images.pop(self._key(image))
                self.images[folder], self.labels[folder] = [image], label

    @staticmethod
    def _structure(image: str, label: str) -> str:
        """What the name of a label map says beside what it is and whose: ``liver`` of ``p1_liver_mask``."""
        return _without_roles(scan_id(label)).replace(_without_roles(scan_id(image)) or " ", "").strip("_-. ")

    def _pair_same_names(self, by_key: Mapping[tuple[str, ...], Sequence[str]]) -> None:
        """Pair a scan and a label map in different trees whose names, with a number in them, nothing else has."""
        images, labels = (
            self._by_name(keys)
            for keys in (self.images.keys() - self.labels.keys(), by_key.keys() - self.labels.keys())
        )
        for name, key in images.items():
            # nnU-Net numbers the channels of images.
            label = labels.get(name) or labels.get(name.removesuffix(FIRST_CHANNEL))
            if key and label and len(by_key[label]) == 1 and re.search(r"\d", name):
                self.labels[key] = by_key[label][0]

    @staticmethod
    def _by_name(keys: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """The last part of each key -> the key; empty where several have it."""
        found: dict[str, tuple[str, ...]] = {}
        for key in keys:
            if key:
                found[key[-1]] = () if key[-1] in found else key
        return found

    def _by_folder(self, paths: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
        found: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path in paths:
            found[self._key(os.path.join(os.path.dirname(path), "image.nii"))].append(path)
        return found

    def _named(self, images: Sequence[str]) -> dict[str, str]:
        """What each image of a case is, such as ``t1c`` -> its path; empty where that is not clear."""
        named: dict[str, str] = {}
        for path in images:
            words = re.split(r"[\W_]+", os.path.relpath(path.removesuffix(suffix_of(path)), self.root))
            roles = [word for word in words if word.lower() in _CHANNELS | {"imaging"}]
            named["_".join(roles) or "image"] = path
        return named if len(named) == len(images) else {}

    def _channels(self) -> tuple[str, ...]:
        """Find what the images of a case are, and put those aside that do not share the grid of the label map."""
        named = {key: self._named(self.images[key]) for key in self.labels}
        verdicts: dict[str, list[bool]] = defaultdict(list)
        for key, label in self.labels.items():
            for channel, path in named[key].items() if len(named[key]) > 1 else ():
                # A case that differs from the others is found when headers are checked.
                if len(verdicts[channel]) < _LOOKS_PER_KIND:
                    verdicts[channel].append(_is_same_grid(_grid(label), _grid(path)))
        apart = {channel for channel, seen in verdicts.items() if not any(seen)}
        if apart < verdicts.keys():
            for key, paths in named.items():
                if len(paths) > 1:
                    self.images[key] = [path for channel, path in paths.items() if channel not in apart]
                    named[key] = {channel: path for channel, path in paths.items() if channel not in apart}
        sets = {tuple(sorted(paths)) if len(self.images[key]) > 1 else ("image",) for key, paths in named.items()}
        only = sets.pop() if len(sets) == 1 else ()
        return only if len(only) > 1 else ()

    def cases_of(self, channels: Sequence[str]) -> list[TreeCase]:
        """The cases by their images of some channels, in the order of these; one that lacks a channel has fewer."""
        found = []
        for key, images in sorted(self.images.items()) if channels else ():
            named = {role.lower(): path for role, path in self._named(images).items()}
            own = tuple(named[channel.lower()] for channel in channels if channel.lower() in named)
            if own:
                name = key[-1] if key and re.search(r"[^\W\d_]", key[-1]) else ""
                found.append(TreeCase(images=own, name=name, patient=joined_name(key) if key else ""))
        return found

    def cases(self, paths: Sequence[str], *, with_labels: bool) -> list[TreeCase]:
        """The cases in the order of the paths; without labels, every image is one."""
        found: dict[str, TreeCase] = {}
        for key, images in self.images.items():
            label, named = self.labels.get(key), self._named(images)
            is_whole = len(images) == 1 or (bool(self.channels) and tuple(sorted(named)) == self.channels)
            if not is_whole or (label is None and len(images) == 1):
                continue
            patient = joined_name(key) if key else ""
            name = key[-1] if key and re.search(r"[^\W\d_]", key[-1]) else ""
            name = "" if name == scan_id(images[0]) else name
            if with_labels:
                channels = tuple(images if len(images) == 1 else (named[each] for each in self.channels))
                found[images[0]] = TreeCase(images=channels, label=label, name=name, patient=patient)
                found |= dict.fromkeys(images[1:], found[images[0]])
            else:
                # Of several images none can have the name of all.
                name = name if len(images) == 1 else ""
                found |= {path: TreeCase(images=(path,), name=name, patient=patient) for path in images}
        single = (TreeCase(images=(path,), patient=self.patients.get(path, "")) for path in paths)
        return list(dict.fromkeys(found.get(each.images[0], each) for each in single))


def case_of_name(name: str) -> tuple[str, frozenset[str]]:
    """Whose an image or a label map is, as its name says, and what kind of image it speaks of, such as ``ct``."""
    words = (re.sub(r"\d+$", "", word) if word not in _CHANNELS else word for word in re.split(r"[\W_]+", name.lower()))
    return _without_roles(name, _PREDICTED), frozenset(words) & _CHANNELS


def _without_roles(stem: str, also: frozenset[str] = frozenset()) -> str:
    """A name without the words that say what a file is: ``BraTS-1-t1c`` and ``BraTS-1-seg`` become ``BraTS-1``."""
    if stem.startswith("sub-"):
        # Parts of names in BIDS that say what a label map is of.
        stem = re.sub(r"_(label|desc|seg|space|res)-[^_]*", "", stem)
    parts = re.split(r"([\s._-]+)", stem)
    words = [(parts[index - 1] if index else "", word) for index, word in enumerate(parts) if index % 2 == 0]
    words = [(mark, re.sub(rf"(?i)^({_NUMBERED})(?=\d+$)", "", word)) for mark, word in words]
    kept = [(mark, word) for mark, word in words if word and word.lower() not in _ROLES | also]
    return "".join(mark * bool(index) + word for index, (mark, word) in enumerate(kept))


def has_pairs(paths: Sequence[str], root: str) -> bool:
    """Whether scans lie among label maps that are called so: then the folder is a data set, not one of label maps."""
    try:
        found = sort_tree(paths, root, with_labels=True, look=False)
    except DataError:
        return False
    return any(case.label is not None for case in found.cases)
