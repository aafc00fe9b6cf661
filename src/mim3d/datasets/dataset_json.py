"""Cases from a ``dataset.json``: Medical Segmentation Decathlon and nnU-Net raw folders."""

import os
from collections.abc import Mapping
from typing import Any

from mim3d.core.errors import DataError, listed
from mim3d.datasets.entries import Entry
from mim3d.scans.volumes import channels_of


def is_nnunet(description: Mapping[str, Any]) -> bool:
    """Whether a dataset.json is nnU-Net's (version 2) rather than the Decathlon's."""
    return "channel_names" in description or "file_ending" in description


def read_msd(description: Mapping[str, Any], path: str) -> list[Entry]:
    """The ``training`` entries of a Decathlon dataset.json; files named ``._x`` are skipped.

    Args:
        description: Content of the dataset.json.
        path: Path of the dataset.json, to whose folder its own paths are relative.

    Raises:
        DataError: There is no training list, or an entry has no image.
    """
    training = description.get("training")
    if not isinstance(training, list) or not training:
        raise DataError(f'{path}: needs a list "training" of entries like {{"image": ..., "label": ...}}.')
    in_one_file = len(description.get("modality") or ()) > 1
    entries = []
    for number, item in enumerate(training, start=1):
        item = {"image": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not item.get("image"):
            raise DataError(f'{path}: entry {number} of "training" has no "image".')
        named = item["image"] if isinstance(item["image"], list) else [item["image"]]
        if any(os.path.basename(str(name)).startswith("._") for name in named):
            continue
        images = tuple(_absolute(path, name) for name in named)
        case_id = None
        channels = _channel_files(images[0])
        if channels:
            case_id = os.path.basename(images[0]).partition(".")[0]
            images = channels if len(images) == 1 else images
        elif in_one_file and len(images) == 1 and os.path.isfile(images[0]):
            images = channels_of(images[0])
        label = item.get("label")
        entries.append(Entry(id=case_id, images=images, label=_absolute(path, label) if label else None))
    return entries


def _absolute(description: str, name: object) -> str:
    """A path that a dataset.json names relative to its own folder."""
    return os.path.abspath(os.path.join(os.path.dirname(description), str(name)))


def _channel_files(path: str) -> tuple[str, ...]:
    """nnU-Net 1 lists ``x.nii.gz`` for the files ``x_0000.nii.gz``, ``x_0001.nii.gz``, ...; else nothing."""
    folder, name = os.path.split(path)
    stem, dot, suffix = name.partition(".")
    channels: list[str] = []
    while not os.path.exists(path):
        channel = os.path.join(folder, f"{stem}_{len(channels):04d}{dot}{suffix}")
        if not os.path.exists(channel):
            break
        channels.append(channel)
    return tuple(channels)


def read_nnunet(description: Mapping[str, Any], path: str) -> list[Entry]:
    """The cases of an nnU-Net raw folder: ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``.

    Args:
        description: Content of the dataset.json.
        path: Path of the dataset.json, to whose folder its own paths are relative.

    Raises:
        DataError: There are no images, or a case lacks one of its channels.
    """
    if isinstance(description.get("dataset"), dict):
        entries = []
        for case_id, item in description["dataset"].items():
            if not isinstance(item, dict) or not isinstance(item.get("images"), list) or not item["images"]:
                raise DataError(f'{path}: case {case_id!r} of "dataset" needs a list "images".')
            images = tuple(_absolute(path, name) for name in item["images"])
            label = item.get("label")
            entries.append(Entry(id=str(case_id), images=images, label=_absolute(path, label) if label else None))
        return entries
    ending = str(description.get("file_ending", ".nii.gz"))
    num_channels = len(description.get("channel_names") or {"0": ""})
    image_folder = os.path.join(os.path.dirname(path), "imagesTr")
    names = sorted(os.listdir(image_folder)) if os.path.isdir(image_folder) else []
    first = f"_0000{ending}"
    ids = [name.removesuffix(first) for name in names if name.endswith(first) and not name.startswith(".")]
    if not ids:
        raise DataError(f"{image_folder}: no image named CASE{first}, as {path} says.")
    entries = []
    for case_id in ids:
        channels = [f"{case_id}_{channel:04d}{ending}" for channel in range(num_channels)]
        missing = sorted(set(channels) - set(names))
        if missing:
            raise DataError(f"{image_folder}: case {case_id} lacks {listed(missing)} of {num_channels} channels.")
        images = tuple(os.path.join(image_folder, name) for name in channels)
        label = os.path.join(os.path.dirname(path), "labelsTr", case_id + ending)
        entries.append(Entry(id=case_id, images=images, label=label if os.path.exists(label) else None))
    return entries


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
        labels[number] = str(name)
    labels |= {number: f"label_{number}" for number in regions - set(labels)}
    labels.setdefault(0, "background")
    return dict(sorted(labels.items()))
