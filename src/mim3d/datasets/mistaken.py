"""Folders that are given in the place of others: what they are, and what to give instead, for the end of a sentence."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mim3d.core.errors import DataError, listed
from mim3d.core.files import load_json
from mim3d.core.names import number_of
from mim3d.core.run_folder import MANIFEST_NAME

if TYPE_CHECKING:
    from mim3d.datasets.cases import LeftOut

#: Folders of images that make the folder around them a data set, with those of their labels.
_PAIRED = (("imagesTr", "labelsTr"), ("images", "labels"), ("images", "masks"))

#: Lists that mim3d predict leaves in its folder.
_LISTS = ("predictions.json", "classification.json")


def run_command(folder: str) -> str | None:
    """The command that made a run; None where the folder is no run."""
    with suppress(OSError, ValueError):
        content = load_json(os.path.join(folder, MANIFEST_NAME))
        if isinstance(content, dict) and isinstance(content.get("settings"), dict):
            return str(content.get("command"))
    return None


def is_prediction_folder(folder: str) -> bool:
    """Whether mim3d predict wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _LISTS)


def is_set(folder: str) -> bool:
    """Whether a folder is a data set by its description or the names of its folders."""
    there = {name for names in _PAIRED for name in names if os.path.isdir(os.path.join(folder, name))}
    return os.path.isfile(os.path.join(folder, "dataset.json")) or any(set(names) <= there for names in _PAIRED)


def not_scans(folder: str) -> str:
    """What a folder without scans is, as sentences with what to give; empty where that is not known."""
    if os.path.isfile(os.path.join(folder, "cache.json")):
        return " It is a cache, from which training reads (--data); give the scans that it was made of."
    command = run_command(folder)
    if command is None:
        return ""
    return (
        f" It is a run of mim3d {command}, which goes with --weights; give scans here, or for mim3d predict leave "
        "--input out, which takes the cases that the run held out."
    )


def not_run(folder: str) -> str | None:
    """What a folder without a run is, as a sentence with what to give; None where that is not known."""
    if os.path.isfile(os.path.join(folder, "cache.json")):
        return f"{folder} is a cache, from which runs read; give a run, the --out of mim3d pretrain or mim3d finetune."
    if is_prediction_folder(folder):
        return (
            f"{folder} holds predictions; score them (mim3d evaluate --predictions {folder} --references LABELS --out "
            "SCORES.json) and give --scores SCORES.json."
        )
    return None


def not_references(folder: str) -> str | None:
    """What a folder without label maps is, as a sentence with what to give; None where that is not known."""
    is_cache = os.path.isfile(os.path.join(folder, "cache.json"))
    command = run_command(folder)
    if not is_cache and command is None:
        return None
    what = "a cache, from which training reads" if is_cache else f"a run of mim3d {command}"
    return f"{folder} is {what}; give the folder of label maps to score against, such as labelsTr, or the data set."


def not_checkpoints(path: str, *, for_task: bool) -> str | None:
    """What the checkpoints of a run are, as a sentence with what to give; None where a path is none of them.

    Args:
        path: A folder or a file.
        for_task: Whether the network of a task is asked for. A checkpoint gives an encoder.
    """
    path = os.path.abspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    run = os.path.dirname(folder)
    command = run_command(run) if os.path.basename(folder) == "checkpoints" else None
    if command is None or not (for_task or folder == path):
        return None
    if command == "pretrain" and for_task:
        return not_weights(run, for_task=True) or f"{run} is a run of mim3d pretrain, which has learned no task."
    return f"{path} is for going on with a run of mim3d {command}; give the run itself: {run}."


def not_weights(folder: str, *, for_task: bool) -> str | None:
    """What a folder without the weights that are asked for is, as a sentence with what to give; None if not known.

    Args:
        folder: The folder.
        for_task: Whether the network of a task is asked for, so that an encoder is not enough.
    """
    if folds := sorted(glob.glob(os.path.join(glob.escape(folder), "fold_*", MANIFEST_NAME))):
        return (
            f"{folder} holds the runs of {number_of(len(folds), 'fold')}, each with its network; give one, such as "
            f"{os.path.dirname(folds[0])}, or for mim3d predict all of them: {folder}/fold_*."
        )
    command = run_command(folder)
    if command == "pretrain" and for_task and os.path.isdir(os.path.join(folder, "encoder")):
        return (
            f"{folder} is a run of mim3d pretrain: its encoder has learned no task yet. Fine-tune it on labelled scans "
            f"(mim3d finetune --data LABELLED --weights {folder} --out RUN), and give that RUN."
        )
    # What is asked for may be the network of another task than the one that is there.
    if command is not None and not glob.glob(os.path.join(glob.escape(folder), "*", "model.safetensors")):
        return (
            f"{folder} is a run of mim3d {command} that has exported no network yet; let it finish "
            f"(mim3d {command} --out {folder} --resume true), or give another run."
        )
    if is_prediction_folder(folder):
        return f"{folder} holds predictions, no network; give the run that made them."
    if is_set(folder):
        return f"{folder} is a data set, no network; give it as --data or --input, and as --weights a run or a file."
    return None


def sets_of_labels(root: str, labels: Iterable[str]) -> tuple[str, ...]:
    """The data sets around which a folder lies, by the label maps that are taken from each.

    Args:
        root: What the label maps were found in.
        labels: Absolute paths of the label maps.

    Returns:
        Folders of the data sets in the order of their paths; none where the root is a list or a data set itself. A
        folder with a single label map is one of a patient.
    """
    if not os.path.isdir(root) or is_set(root):
        return ()
    found: Counter[str] = Counter()
    for folder, number in Counter(map(os.path.dirname, labels)).items():
        above = itertools.takewhile(
            lambda place: len(place) > len(root), map(str, (Path(folder), *Path(folder).parents))
        )
        found[next(filter(is_set, above), "")] += number
    return tuple(sorted(name for name, number in found.items() if name and number > 1))


def on_several_sets(place: str, sets: Sequence[str]) -> str:
    """What is to be known of label maps that come from several data sets, as the beginning of a sentence."""
    names = listed([os.path.basename(each) for each in sets])
    return f"{place} holds label maps of {len(sets)} data sets ({names}), whose labels need not mean the same"


def refuse_several_sets(place: str, sets: Sequence[str]) -> None:
    """Refuse label maps of several data sets where labels are learned, since one value means another thing in each.

    Args:
        place: What the user gave: a folder or a cache.
        sets: Folders of the data sets that its label maps come from.

    Raises:
        DataError: There are two or more.
    """
    if len(sets) > 1:
        raise DataError(
            f"{on_several_sets(place, sets)}; give one of them, such as --data {sets[0]}, or a CSV list (image,label) "
            "of the scans of all."
        )


def refuse_unlearnable(root: str, left_out: "Sequence[LeftOut]") -> None:
    """Refuse a data set of which every case lacks what the task needs, with the layout or flag that would work.

    Args:
        root: The data set.
        left_out: All its cases, with what each lacks.

    Raises:
        DataError: It is known what would work.
    """
    reason = left_out[0].reason
    cases = [each.case for each in left_out]
    num_labels = sum(case.label is not None for case in cases)
    num_classes = sum(case.class_name is not None for case in cases)
    if num_classes and not num_labels and "centre is label" not in reason:
        remedy = (
            "They have classes: learn those with --task classification. To segment, name label maps in a column label."
        )
    elif num_labels and not num_classes and "no class" in reason:
        remedy = (
            "They have label maps: to segment, leave --task classification out. To classify, give a CSV list with the "
            "columns image and class."
        )
    elif num_labels or num_classes:
        return
    else:
        parent, name = os.path.split(os.path.abspath(root))
        labels = next((labels for images, labels in _PAIRED if images == name), None)
        if labels is not None and os.path.isdir(os.path.join(parent, labels)):
            remedy = f"Their label maps lie beside it in {labels}: give --data {parent}."
        else:
            remedy = (
                "Put label maps of the same names into labelsTr beside imagesTr and give the folder of both, or a CSV "
                "list with the columns image and label (or class); mim3d pretrain learns from images alone."
            )
    none = "its only case cannot" if len(cases) == 1 else f"none of {len(cases)} cases can"
    raise DataError(f"{root}: {none} be used: {reason} {remedy}")
