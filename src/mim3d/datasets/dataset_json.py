"""Cases from a ``dataset.json``: Medical Segmentation Decathlon and nnU-Net raw folders."""

import json
import os
from collections.abc import Mapping
from typing import Any

from mim3d.core.errors import DataError
from mim3d.datasets.ids import Entry
from mim3d.datasets.records import listed
from mim3d.scans.volumes import channels_of


def read_json(path: str) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: Not readable, or not JSON; names the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def is_nnunet(description: Mapping[str, Any]) -> bool:
    """Whether a dataset.json is nnU-Net's (version 2) rather than the Decathlon's."""
    return "channel_names" in description or "file_ending" in description


def read_msd(description: Mapping[str, Any], path: str, *, with_labels: bool) -> list[Entry]:
    """The ``training`` entries of a Decathlon dataset.json; files named ``._x`` are skipped.

    Raises:
        DataError: No training list, or an entry without an image.
    """
    training = description.get("training")
    if not isinstance(training, list) or not training:
        raise DataError(f'{path}: needs a list "training" of entries like {{"image": ..., "label": ...}}.')
    folder = os.path.dirname(path)
    in_one_file = len(description.get("modality") or ()) > 1
    entries = []
    for number, item in enumerate(training, start=1):
        item = {"image": item} if isinstance(item, str) else item
        if not isinstance(item, dict) or not item.get("image"):
            raise DataError(f'{path}: entry {number} of "training" has no "image".')
        named = item["image"] if isinstance(item["image"], list) else [item["image"]]
        if any(os.path.basename(str(name)).startswith("._") for name in named):
            continue
        images = tuple(os.path.abspath(os.path.join(folder, str(name))) for name in named)
        label = item.get("label") if with_labels else None
        channels = _channel_files(images[0])
        if in_one_file and not channels and len(images) == 1 and os.path.isfile(images[0]):
            images = channels_of(images[0])
        entries.append(
            Entry(
                images=channels if channels and len(images) == 1 else images,
                label=os.path.abspath(os.path.join(folder, str(label))) if label else None,
                id=os.path.basename(images[0]).partition(".")[0] if channels else None,
            )
        )
    return entries


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


def read_nnunet(description: Mapping[str, Any], path: str, *, with_labels: bool) -> list[Entry]:
    """The cases of an nnU-Net raw folder: ``imagesTr/CASE_0000.nii.gz`` and ``labelsTr/CASE.nii.gz``.

    Raises:
        DataError: No images, or a case without one of its channels.
    """
    folder = os.path.dirname(path)
    if isinstance(description.get("dataset"), dict):
        return _listed_nnunet(description["dataset"], path, with_labels=with_labels)
    ending = str(description.get("file_ending", ".nii.gz"))
    num_channels = len(description.get("channel_names") or {"0": ""})
    image_folder = os.path.join(folder, "imagesTr")
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
        label = os.path.join(folder, "labelsTr", case_id + ending)
        entries.append(
            Entry(
                id=case_id,
                images=tuple(os.path.join(image_folder, name) for name in channels),
                label=label if with_labels and os.path.exists(label) else None,
            )
        )
    return entries


def _listed_nnunet(dataset: Mapping[str, Any], path: str, *, with_labels: bool) -> list[Entry]:
    folder = os.path.dirname(path)
    entries = []
    for case_id, item in dataset.items():
        if not isinstance(item, dict) or not isinstance(item.get("images"), list) or not item["images"]:
            raise DataError(f'{path}: case {case_id!r} of "dataset" needs a list "images".')
        label = item.get("label") if with_labels else None
        entries.append(
            Entry(
                id=str(case_id),
                images=tuple(os.path.abspath(os.path.join(folder, str(name))) for name in item["images"]),
                label=os.path.abspath(os.path.join(folder, str(label))) if label else None,
            )
        )
    return entries


def read_labels(declared: Any, path: str) -> dict[int, str]:
    """Label value -> name, from ``{"1": "liver"}`` (Decathlon) or ``{"liver": 1}`` (nnU-Net), 0 included.

    A nnU-Net region (``"tumour": [1, 2]``) names no single value; its values are declared as ``label_1`` ...

    Raises:
        DataError: Neither form, a value outside 0 to 65535, or one value with two names.
    """
    if declared is None:
        return {}
    if not isinstance(declared, dict):
        raise DataError(f'{path}: "labels" must map values to names, not be a {type(declared).__name__}.')
    labels: dict[int, str] = {}
    regions: set[int] = set()
    for key, value in declared.items():
        if isinstance(value, list):
            regions.update(_label_value(item, path) for item in value)
            continue
        number, name = (key, value) if str(key).isdigit() else (value, key)
        number = _label_value(number, path)
        if number in labels:
            raise DataError(f"{path}: label value {number} has two names, {labels[number]!r} and {name!r}.")
        labels[number] = str(name)
    for number in regions - set(labels):
        labels[number] = f"label_{number}"
    labels.setdefault(0, "background")
    return dict(sorted(labels.items()))


def _label_value(value: Any, path: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number <= 65535:
        raise DataError(f"{path}: label value {value!r} is not a whole number from 0 to 65535.")
    return number
